"""Linear maps as depthwise-separable convolutions over the sequence: the same function, with more to train."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flaxcompress import tree
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.config import ModelConfig
from flaxcompress.model import Model, abstract_flat

_KERNELS = ("projection_kernel", "feed_forward_kernel")


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class SeparableConvolutions(Step):
    """Puts a depthwise convolution over the sequence before linear maps, which become its pointwise part.

    The tap at the token itself is 1 and its neighbours' are 0, so that the model computes what it did; training then
    moves them (CvT, Wu et al. 2021; Primer, So et al. 2021, put such convolutions beside attention's projections).

    It is no compression, and cannot be made one by fitting taps and a pointwise map of lower rank to the original map's
    outputs: whatever the taps, outputs that pass R channels lie in an R-dimensional space, and in none are the original
    outputs approximated better than in that of their R leading principal components, where `LowRank` puts them without
    taps (Eckart & Young 1936).

    Attributes:
      projection_kernel: the convolutions' width before queries, keys and values, each its own; 0: none.
      feed_forward_kernel: of the one before the feed-forward's up and gate maps; 0: none.
    """

    projection_kernel: int = 0
    feed_forward_kernel: int = 0

    def __post_init__(self):
        if not self.projection_kernel and not self.feed_forward_kernel:
            raise ValueError("SeparableConvolutions: give projection_kernel, feed_forward_kernel or both; got neither")

    def _changed(self, config: ModelConfig) -> ModelConfig:
        wanted = {name: getattr(self, name) for name in _KERNELS if getattr(self, name)}
        for name in wanted:
            if there := getattr(config, name):
                raise ValueError(f"SeparableConvolutions: the model has convolutions of {name} {there} already")
        return config.replace(**wanted)

    def plan(self, config: ModelConfig) -> ModelConfig:
        planned = self._changed(config)
        return planned if config.decoder is None else planned.replace(decoder=self._changed(config.decoder))

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        config, there = self.plan(model.config), tree.View(model.params)
        added = {address: leaf for address, leaf in abstract_flat(config).items() if address not in there}
        taps = {}
        for address, leaf in added.items():
            stack = config.decoder if address.startswith("decoder/") and config.decoder is not None else config
            own = leaf.shape[0] - 1 if stack.causal else leaf.shape[0] // 2
            taps[address] = jnp.zeros(leaf.shape, leaf.dtype).at[own].set(1)
        return model.replace(params=tree.replace(model.params, taps), config=config)  # pyright: ignore[reportAttributeAccessIssue]

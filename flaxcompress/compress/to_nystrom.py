"""Full attention turned into Nyström attention, linear in the length of the sequence."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flaxcompress import tree
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.config import ModelConfig, Nystrom
from flaxcompress.model import Model, abstract_flat


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToNystrom(Step):
    """Turns an encoder's attention into Nyström attention (Nyströmformer, Xiong et al. 2021), which keeps its weights.

    Sequences of no more tokens than landmarks are computed as before; longer ones are approximated, so heal the model
    on such afterwards. Nothing becomes smaller: what is saved is time and memory on long sequences.

    Attributes:
      landmarks: m, how many segments of tokens stand for a sequence.
      iterations: of the pseudo-inverse.
      convolution: width of a depthwise convolution over the values, odd, which begins at zero for healing to use; 0:
        none.
    """

    landmarks: int
    iterations: int = 6
    convolution: int = 0

    def plan(self, config: ModelConfig) -> ModelConfig:
        if config.attention is not None or config.decoder is not None:
            found = "a decoder" if config.attention is None else f"{config.attention.kind} attention"
            raise ValueError(f"ToNystrom: only encoders with full attention can be turned; this model has {found}")
        settings = {"landmarks": self.landmarks, "iterations": self.iterations, "convolution": self.convolution}
        return config.replace(attention=Nystrom(**settings))

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        del context, key
        config, view = self.plan(model.config), tree.View(model.params)
        taps = {a: jnp.zeros(n.shape, n.dtype) for a, n in abstract_flat(config).items() if a not in view}
        return Model(params=tree.replace(model.params, taps), config=config, assets=model.assets)

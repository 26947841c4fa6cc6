"""Depthwise convolutions in front of linear maps, which together are depthwise-separable convolutions."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig
from flaxcompress.formats.base import vector_init
from flaxcompress.nn.cache import LayerCache
from flaxcompress.nn.context import Context
from flaxcompress.nn.linear import weight
from flaxcompress.ops import depthwise


class Depthwise(nn.Module):
    """Every channel convolved over the sequence, [B, T, D] -> [B, T, D]: causal in causal models, else centred.

    Attributes:
      width: k.
      features: D.
    """

    config: ModelConfig
    address: str
    width: int
    features: int

    def setup(self):
        own = self.width - 1 if self.config.causal else self.width // 2

        def near_identity(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            noise = jax.random.normal(key, shape, dtype) * self.config.initializer_range
            return noise.at[own].add(1.0)

        init = vector_init(self.config, f"{self.address}/taps", near_identity)
        self.taps = weight(self, "taps", init, (self.width, self.features))

    def __call__(self, x: Float[Array, "B T D"], before: Any = None) -> Float[Array, "B T D"]:
        """`before` are the k - 1 inputs in front of x while decoding."""
        return depthwise(x, self.taps, causal=self.config.causal, before=before)


def held_inputs(config: ModelConfig) -> dict[str, int]:
    """{name: how many} of the last inputs that decoding keeps for convolutions."""
    widths = {"projection_inputs": config.projection_kernel, "feed_forward_inputs": config.feed_forward_kernel}
    return {name: width - 1 for name, width in widths.items() if width}


def lead(
    x: Float[Array, "B T D"], name: str, context: Context, cache: LayerCache | None
) -> tuple[Float[Array, "B T D"], Float[Array, "B p D"] | None, LayerCache | None]:
    """x with zeros for padding, the inputs in front of it, and the cache with the last inputs exchanged."""
    if context.real is not None:
        x = jnp.where(context.real[..., None], x, 0)
    if cache is None:
        return x, None, None
    before = cache.read(name, x.dtype)[:, :, 0]
    last = jnp.concatenate([before, x], 1)[:, -before.shape[1] :]
    return x, before, cache.fill(name, last[:, :, None])

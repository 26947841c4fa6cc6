"""Residual addition and normalisation."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig
from flaxcompress.formats.base import vector_init
from flaxcompress.ops import layer_norm, rms_norm


class Norm(nn.Module):
    """The norm that `config.norm` names, over the last axis, computed in float32, returned in `dtype`."""

    config: ModelConfig
    address: str
    dtype: jnp.dtype = jnp.float32
    kind: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        config, shape = self.config, (x.shape[-1],)
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale = self.param("scale", vector_init(config, f"{self.address}/scale", ones), shape)
        if (self.kind or config.norm) == "rms":
            return rms_norm(x, scale, epsilon=config.norm_epsilon).astype(self.dtype)
        bias = None
        if config.norm_bias:
            bias = self.param("bias", vector_init(config, f"{self.address}/bias", zeros), shape)
        return layer_norm(x, scale, bias, epsilon=config.norm_epsilon).astype(self.dtype)


class Norms(nn.Module):
    """The norms of one layer, one weight set: they are shared (or not) apart from the matrices.

    Attributes:
      number: the weight set; without `config.first_norm` the first one has no norm before attention.
    """

    config: ModelConfig
    number: int
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        address = f"layers/{self.number}/norms"
        self.attention = (
            Norm(self.config, f"{address}/attention", self.dtype) if self.config.first_norm or self.number else None
        )
        self.feed_forward = Norm(self.config, f"{address}/feed_forward", self.dtype)

    def before(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """What attention reads where norms come before."""
        return x if self.attention is None else self.attention(x).astype(x.dtype)

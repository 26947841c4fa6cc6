"""Residual addition and normalisation."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig
from flaxcompress.formats.base import vector_init
from flaxcompress.ops import layer_norm


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32, returned in `dtype`."""

    config: ModelConfig
    address: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        shape = (x.shape[-1],)
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale = self.param("scale", vector_init(self.config, f"{self.address}/scale", ones), shape)
        bias = self.param("bias", vector_init(self.config, f"{self.address}/bias", zeros), shape)
        return layer_norm(x, scale, bias, epsilon=self.config.norm_epsilon).astype(self.dtype)


class Norms(nn.Module):
    """The norms of one layer, one weight set: they are shared (or not) apart from the matrices."""

    config: ModelConfig
    address: str
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.attention = LayerNorm(self.config, f"{self.address}/attention", self.dtype)
        self.feed_forward = LayerNorm(self.config, f"{self.address}/feed_forward", self.dtype)

"""Residual addition and normalisation."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig
from flaxcompress.ops import layer_norm


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32, returned in `dtype`."""

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones_init(), (self.config.width,))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.config.width,))
        return layer_norm(x, scale, bias, epsilon=self.config.norm_epsilon).astype(self.dtype)


class Norms(nn.Module):
    """The norms of one layer, one weight set: they are shared (or not) apart from the matrices."""

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.attention = LayerNorm(self.config, self.dtype)
        self.feed_forward = LayerNorm(self.config, self.dtype)

"""Residual addition and normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
      sublayers: the names of what is added to the residual stream.
      number: the weight set; without `config.first_norm` the first one has no norm before attention.
    """

    config: ModelConfig
    sublayers: tuple[str, ...]
    number: int
    prefix: str = ""

    def setup(self):
        for name in self.sublayers:
            if name != "attention" or self.config.first_norm or self.number:
                setattr(self, name, Norm(self.config, f"{self.prefix}layers/{self.number}/norms/{name}"))

    def residual(
        self, name: str, x: Float[Array, "B T D"], sublayer: Callable[[Float[Array, "B T D"]], tuple[Any, Any]]
    ) -> tuple[Float[Array, "B T D"], Any]:
        """x with a sublayer's output added, normalised where the config says, and what else the sublayer returned."""
        if self.config.norm_place == "pre":
            y, other = sublayer(self._norm(name, x))
            return x + y, other
        y, other = sublayer(x)
        return self._norm(name, x + y), other

    def _norm(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        norm = getattr(self, name, None)
        return x if norm is None else norm(x).astype(x.dtype)

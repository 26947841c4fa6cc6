"""Residual addition and normalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress.config import SUBLAYERS, ModelConfig
from flaxcompress.formats.base import vector_init
from flaxcompress.nn.adapter import Adapter
from flaxcompress.nn.logical import constrain
from flaxcompress.ops import layer_norm, rms_norm

Sublayer = Callable[[Any], tuple[Any, Any]]  # [B, T, D] -> what is added to it, and what else comes out


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
    """The norms of one layer, one weight set, and its adapters: they are shared (or not) apart from the matrices.

    Attributes:
      number: the weight set; without `config.first_norm` the first one has no norm before attention.
    """

    config: ModelConfig
    number: int
    prefix: str = ""

    def setup(self):
        for name in norm_names(self.config, self.number):
            setattr(self, name, Norm(self.config, f"{self.prefix}layers/{self.number}/norms/{name}"))
        for name in self.config.adapters.after if self.config.adapters else ():
            address = f"{self.prefix}layers/{self.number}/norms/{name}_adapter"
            setattr(self, f"{name}_adapter", Adapter(self.config, address))

    def residual(
        self, x: Float[Array, "B T D"], sublayers: Mapping[str, Sublayer], *, drop_rate: Float[Array, ""] | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """αx with what sublayers make of x added, normalised where the config says, and what else they returned.

        Several sublayers read the same x. With probability `drop_rate` an example does without what one adds.
        """
        config, other = self.config, {}
        before = config.norm_place != "post"
        total = x if config.residual_scale == 1.0 else x * jnp.asarray(config.residual_scale, x.dtype)
        for name, sublayer in sublayers.items():
            shared = "attention" if config.parallel == "one_norm" else name
            y, other[name] = sublayer(self._norm(shared, x) if before else x)
            y = y if (adapter := getattr(self, f"{name}_adapter", None)) is None else adapter(y)
            y = self._norm(f"{name}_after", y) if config.norm_place == "sandwich" else y
            total = constrain(total + self._drop(y, drop_rate), "batch", "length", None)
        return total if before else self._norm(next(iter(sublayers)), total), other

    def _norm(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        norm = getattr(self, name, None)
        return x if norm is None else norm(x).astype(x.dtype)

    def _drop(self, y: Float[Array, "B T D"], rate: Float[Array, ""] | None) -> Float[Array, "B T D"]:
        """Divided by the probability of staying, so that the expectation is y."""
        if rate is None:
            return y
        stays = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, (y.shape[0], 1, 1))
        return jnp.where(stays, y / (1 - rate).astype(y.dtype), 0)


def norm_names(config: ModelConfig, number: int) -> list[str]:
    """The norms of a weight set: one per sublayer, two in a sandwich, one for all where parallel ones share it."""
    sublayers = [part for part in SUBLAYERS if part in config.sharing.parts]
    names = list(sublayers[:1] if config.parallel == "one_norm" else sublayers)
    if not config.first_norm and number == 0:
        names.remove("attention")
    return names + [f"{name}_after" for name in sublayers if config.norm_place == "sandwich"]

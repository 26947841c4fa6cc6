"""Normalisation on plain arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], bias: Float[Array, " D"] | None, *, epsilon: float
) -> Float[Array, "*B D"]:
    """(x - mean)/√(variance + ε)·scale + bias over the last axis, in float32 (Ba et al. 2016)."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], *, epsilon: float) -> Float[Array, "*B D"]:
    """x/√(mean x² + ε)·scale over the last axis, in float32 (Zhang & Sennrich 2019)."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon) * scale).astype(x.dtype)

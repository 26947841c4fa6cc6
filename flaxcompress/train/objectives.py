"""Losses as plain functions of student and teacher outputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def cosine_loss(
    student: Float[Array, "B D"], teacher: Float[Array, "B D"], real: Bool[Array, " B"]
) -> Float[Array, ""]:
    """1 - the mean cosine between sentence vectors, over the rows that are `real`."""
    s = student * jax.lax.rsqrt(jnp.maximum(jnp.square(student).sum(-1, keepdims=True), 1e-24))
    t = teacher * jax.lax.rsqrt(jnp.maximum(jnp.square(teacher).sum(-1, keepdims=True), 1e-24))
    weights = real.astype(jnp.float32)
    return 1.0 - ((s * t).sum(-1) * weights).sum() / jnp.maximum(weights.sum(), 1.0)


def hidden_loss(
    student: Float[Array, "L B T D"], teacher: Float[Array, "L B T D"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Squared error of the hidden states over the teacher's squared norm, per layer, averaged over layers."""
    weights = mask.astype(jnp.float32)[None, :, :, None]
    error = (jnp.square(student - teacher) * weights).sum((1, 2, 3))
    size = (jnp.square(teacher) * weights).sum((1, 2, 3))
    return (error / jnp.maximum(size, 1e-12)).mean()


def logits_loss(
    student: Float[Array, "B T V"], teacher: Float[Array, "B T V"], mask: Bool[Array, "B T"], temperature: float = 1.0
) -> Float[Array, ""]:
    """KL(teacher‖student)·τ² over the real tokens (Hinton et al. 2015)."""
    log_t = jax.nn.log_softmax(teacher / temperature, axis=-1)
    log_s = jax.nn.log_softmax(student / temperature, axis=-1)
    divergence = (jnp.exp(log_t) * (log_t - log_s)).sum(-1)
    weights = mask.astype(jnp.float32)
    return (divergence * weights).sum() / jnp.maximum(weights.sum(), 1.0) * temperature**2

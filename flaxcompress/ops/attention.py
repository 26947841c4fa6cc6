"""The attention core on plain arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flaxcompress.ops.dispatch import dispatch


def attention_probabilities(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S H d"],
    mask: Bool[Array, "B S"] | None,
    bias: Float[Array, "H T S"] | None = None,
) -> Float[Array, "B H T S"]:
    """softmax(QKᵀ/√d + bias) over the keys that `mask` allows, in float32; a row with no key allowed is all zeros."""
    q = query.transpose(0, 2, 1, 3) * (query.shape[-1] ** -0.5)
    k = key.transpose(0, 2, 3, 1)
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    allowed = mask[:, None, None, :]
    scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1) * jnp.any(allowed, axis=-1, keepdims=True)


def attend_values(probabilities: Float[Array, "B H T S"], value: Float[Array, "B S H d"]) -> Float[Array, "B T H d"]:
    """The probability-weighted sum of the values."""
    v = value.transpose(0, 2, 1, 3)
    out = jnp.matmul(probabilities.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.transpose(0, 2, 1, 3).astype(value.dtype)


def _xla(query, key, value, mask, bias):
    return attend_values(attention_probabilities(query, key, mask, bias), value)


IMPLEMENTATIONS = {"xla": _xla}


def dot_product_attention(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S H d"],
    value: Float[Array, "B S H d"],
    mask: Bool[Array, "B S"] | None = None,
    bias: Float[Array, "H T S"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "B T H d"]:
    """softmax(QKᵀ/√d + bias)V (Vaswani et al. 2017, eq. 1), keys allowed where `mask` is true.

    Transposed batched matmuls: on CPU they cost an eighth less than the einsum "bthd,bshd->bhts".
    """
    return dispatch("dot_product_attention", IMPLEMENTATIONS, implementation, query, key, value, mask, bias)

"""The attention core on plain arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from flaxcompress.ops.dispatch import dispatch

_FORBIDDEN = -1e30  # finite, so that a row without any key needs no case of its own before the end

Mask = Bool[Array, "B S"] | Bool[Array, "B T S"] | Bool[Array, "1 T S"]


def sight(
    queries: Integer[Array, " T"], keys: Integer[Array, " S"], *, causal: bool = False, window: int = 0
) -> Bool[Array, "1 T S"]:
    """Which keys each query may see, by their places in the sequence.

    Args:
      causal: no key after the query.
      window: the largest distance, 0 for any.
    """
    distance = queries[:, None] - keys[None, :]
    allowed = distance >= 0 if causal else jnp.ones(distance.shape, bool)
    return (allowed & (jnp.abs(distance) <= window) if window else allowed)[None]


def both(a: Mask | None, b: Mask | None) -> Mask | None:
    """What both masks allow; None allows everything."""
    if a is None or b is None:
        return b if a is None else a
    a, b = (m[:, None, :] if m.ndim == 2 else m for m in (a, b))
    return a & b


def _exponentials(query, key, mask, bias, scale):
    """exp(QKᵀ·scale + bias - its maximum) [B, H, T, S], float32, and the factor that makes it probabilities."""
    b, t, h, d = query.shape
    s, groups = key.shape[1], key.shape[2]
    q = query.transpose(0, 2, 1, 3) * (d**-0.5 if scale is None else scale)
    k = key.transpose(0, 2, 3, 1)
    if groups != h:  # the queries that share a key head are one longer sequence
        q = q.reshape(b, groups, h // groups * t, d)
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32).reshape(b, h, t, s)
    if bias is not None:
        scores = scores + bias
    if mask is None:
        p = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        return p, 1.0 / p.sum(-1, keepdims=True)
    allowed = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None, :, :]
    scores = scores + jnp.where(allowed, 0.0, _FORBIDDEN)
    p = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))  # the maximum cancels in the quotient
    return p, allowed.any(-1, keepdims=True) / p.sum(-1, keepdims=True)


def attention_probabilities(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S K d"],
    mask: Mask | None,
    bias: Float[Array, "H T S"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Array, "B H T S"]:
    """softmax(QKᵀ·scale + bias) over the keys that `mask` allows, in float32; a row with none allowed is all zeros."""
    p, factor = _exponentials(query, key, mask, bias, scale)
    return p * factor


def attend_values(probabilities: Float[Array, "B H T S"], value: Float[Array, "B S K d"]) -> Float[Array, "B T H d"]:
    """The probability-weighted sum of the values; head h reads value head ⌊h·K/H⌋."""
    b, h, t, s = probabilities.shape
    groups, width = value.shape[2:]
    p = probabilities.astype(value.dtype).reshape(b, groups, h // groups * t, s)
    out = jnp.matmul(p, value.transpose(0, 2, 1, 3), preferred_element_type=jnp.float32)
    return out.reshape(b, h, t, width).transpose(0, 2, 1, 3).astype(value.dtype)


def _xla(query, key, value, mask, bias, scale):
    # Scaled after the product: T·d products instead of T·S, and one pass less over the scores, an eighth of an
    # encoder's time on CPU.
    p, factor = _exponentials(query, key, mask, bias, scale)
    b, h, t, s = p.shape
    groups, width = value.shape[2:]
    p = p.astype(value.dtype).reshape(b, groups, h // groups * t, s)
    out = jnp.matmul(p, value.transpose(0, 2, 1, 3), preferred_element_type=jnp.float32)
    return (out.reshape(b, h, t, width) * factor).transpose(0, 2, 1, 3).astype(value.dtype)


IMPLEMENTATIONS = {"xla": _xla}


def dot_product_attention(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S K d"],
    value: Float[Array, "B S K e"],
    mask: Mask | None = None,
    bias: Float[Array, "H T S"] | None = None,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H e"]:
    """softmax(QKᵀ·scale + bias)V (Vaswani et al. 2017, eq. 1), keys allowed where `mask` is true.

    Each of the K heads of keys and values serves H/K query heads (Ainslie et al. 2023). Values may have another width
    than keys. Transposed batched matmuls: on CPU they cost an eighth less than the einsum "bthd,bshd->bhts".

    Args:
      scale: of the scores; None for 1/√d.
    """
    return dispatch("dot_product_attention", IMPLEMENTATIONS, implementation, query, key, value, mask, bias, scale)

"""Attention to keys and values projected along the sequence, on plain arrays (Wang et al. 2020)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flaxcompress.ops.attention import dot_product_attention
from flaxcompress.ops.dispatch import dispatch


def project_places(
    x: Float[Array, "B S K d"], rows: Float[Array, "S h k"], real: Bool[Array, "B S"] | None
) -> Float[Array, "B k K d"]:
    """Σ_s E_sp x_s for every place p, over the tokens that are no padding; h is K, or 1 where heads share E."""
    if real is not None:
        x = jnp.where(real[:, :, None, None], x, 0)
    matrices = jnp.broadcast_to(rows, (rows.shape[0], x.shape[2], rows.shape[2])).astype(x.dtype)
    return jnp.einsum("skp,bskd->bpkd", matrices, x, preferred_element_type=jnp.float32).astype(x.dtype)


def _xla(query, key, value, key_rows, value_rows, real, scale):
    key, value = project_places(key, key_rows, real), project_places(value, value_rows, real)
    return dot_product_attention(query, key, value, scale=scale)


IMPLEMENTATIONS = {"xla": _xla}


def linformer_attention(
    query: Float[Array, "B T H r"],
    key: Float[Array, "B S K r"],
    value: Float[Array, "B S K d"],
    key_rows: Float[Array, "S h k"],
    value_rows: Float[Array, "S h k"],
    real: Bool[Array, "B S"] | None = None,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H d"]:
    """softmax(Q(EᵀK)ᵀ·scale)FᵀV (Wang et al. 2020, eq. 7), time and memory linear in S.

    Padding adds nothing to the projections; a sequence of padding alone gives zeros.

    Args:
      key_rows, value_rows: E and F, the rows of the places 0 … S - 1, for every key head or for all of them.
      scale: of the scores; None for 1/√r.
    """
    inputs = (query, key, value, key_rows, value_rows, real, scale)
    return dispatch("linformer_attention", IMPLEMENTATIONS, implementation, *inputs)

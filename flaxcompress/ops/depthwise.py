"""A depthwise convolution over the sequence, on plain arrays."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress.ops.dispatch import dispatch


def _xla(x, taps, causal, before):
    width, length = taps.shape[0], x.shape[1]
    left = width - 1 if causal else width // 2
    if before is None:
        before = jnp.zeros((x.shape[0], left, x.shape[2]), x.dtype)
    after = jnp.zeros((x.shape[0], width - 1 - left, x.shape[2]), x.dtype)
    padded = jnp.concatenate([before, x, after], 1).astype(jnp.float32)
    shifted = (padded[:, i : i + length] * taps[i].astype(jnp.float32) for i in range(width))
    return sum(shifted).astype(x.dtype)  # pyright: ignore[reportAttributeAccessIssue]  (width is 1 or more)


IMPLEMENTATIONS = {"xla": _xla}


def depthwise(
    x: Float[Array, "B T D"],
    taps: Float[Array, "k D"],
    *,
    causal: bool,
    before: Float[Array, "B p D"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T D"]:
    """y_t = Σ_i taps_i · x_{t-p+i}, every channel by itself, with zeros beyond the ends; float32 inside.

    Args:
      causal: y_t reads nothing after x_t (p = k - 1); otherwise it is centred (p = ⌊k/2⌋).
      before: the p inputs in front of the first one; None for zeros.
    """
    return dispatch("depthwise", IMPLEMENTATIONS, implementation, x, taps, causal, before)

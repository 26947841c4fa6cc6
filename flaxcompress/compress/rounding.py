"""Rounding weights to levels: nearest, with error-minimising scales, and GPTQ.

Matrices are given as rows [r, n] over the inputs, as `Quantized` stores them. All functions are pure and run under jit.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flaxcompress.formats.banded import BandedSpec, band_levels, column_steps, column_tops
from flaxcompress.formats.scaled import ScaledSpec, absmax_scale, grouped, safe_ratio, spread_scale

_SHRINK = 24  # candidates for a group's scale, from 0.3 to 1.05 of the largest value's


def _best_scale(groups: Float[Array, "r G g"], weights: Float[Array, "*r G g"], spec: ScaledSpec):
    """Each group's scale of least weighted squared error, rounded to the stored dtype."""
    full = jnp.abs(groups).max(-1) / spec.top

    def error(factor):
        scale = (full * factor).astype(spec.scale_dtype).astype(jnp.float32)
        back = spec.round(safe_ratio(groups, scale[..., None])) * scale[..., None]
        return (weights * (groups - back) ** 2).sum(-1), scale

    errors, scales = jax.lax.map(error, jnp.linspace(0.3, 1.05, _SHRINK))
    return jnp.take_along_axis(scales, errors.argmin(0)[None], axis=0)[0]


@functools.partial(jax.jit, static_argnames=("spec", "rounding"))
def round_rows(
    rows: Float[Array, "r n"],
    spec: ScaledSpec,
    *,
    rounding: str = "mse",
    weights: Float[Array, " n"] | None = None,
) -> tuple[Float[Array, "r n"], Float[Array, "r G"]]:
    """Levels and scales, every value rounded by itself.

    Args:
      rounding: "nearest" (the largest value meets the top level) or "mse" (the scale of least squared error).
      weights: importance of each input for "mse", e.g. the diagonal of its second moment.
    """
    rows = rows.astype(jnp.float32)
    if rounding == "nearest":
        scale = absmax_scale(rows, spec)
    else:
        groups = grouped(rows, spec.group)
        importance = jnp.ones_like(rows[:1]) if weights is None else weights[None].astype(jnp.float32)
        scale = _best_scale(groups, grouped(importance, spec.group), spec)
    return spec.round(safe_ratio(rows, spread_scale(scale, rows.shape[-1], spec.group))), scale


@functools.partial(jax.jit, static_argnames=("spec",))
def round_banded(
    rows: Float[Array, "r n"], costs: Float[Array, " n"], spec: BandedSpec
) -> tuple[Float[Array, "r n"], Float[Array, "r 1"]]:
    """Levels and one scale per row for banded coefficients, the scale of least squared error weighted by `costs`."""
    steps = column_steps(spec.bands)
    stored = (column_tops(spec.bands) > 0).astype(np.float32) * costs
    typical = jnp.sqrt((stored * rows**2).sum(1, keepdims=True) / jnp.maximum(stored.sum(), 1e-30))

    def error(factor):
        scale = (typical * factor).astype(spec.scale_dtype).astype(jnp.float32)
        back = band_levels(rows, scale, spec.bands) * steps * scale
        return (stored * (rows - back) ** 2).sum(1, keepdims=True), scale

    errors, scales = jax.lax.map(error, jnp.linspace(0.5, 1.6, _SHRINK))
    scale = jnp.take_along_axis(scales, errors.argmin(0)[None], axis=0)[0]
    return band_levels(rows, scale, spec.bands), scale


def inverse_factor(second_moment: Float[Array, "n n"], size: int, damping: float) -> Float[Array, "p p"]:
    """The upper U with H⁻¹ = UᵀU, H = C + λI scaled to a mean diagonal of 1, filled up to `size` by the identity.

    Args:
      damping: λ as a fraction of the mean of C's diagonal; directions that never occur are left alone by it.
    """
    n = len(second_moment)
    h = second_moment.astype(jnp.float32)
    h = h / jnp.maximum(jnp.trace(h) / n, 1e-30) + damping * jnp.eye(n)
    h = jnp.eye(size).at[:n, :n].set(h)
    # Invert the Cholesky factor of the reversed matrix.
    lower = jnp.linalg.cholesky(h[::-1, ::-1])
    inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(size), lower=True)
    return inverse[::-1, ::-1]


@functools.partial(jax.jit, static_argnames=("spec", "damping"))
def gptq(
    rows: Float[Array, "r n"],
    second_moment: Float[Array, "n n"],
    spec: ScaledSpec,
    *,
    damping: float = 0.01,
) -> tuple[Float[Array, "r n"], Float[Array, "r G"]]:
    """GPTQ (Frantar et al. 2023): columns are rounded one after the other, the rest makes up for each one's error.

    With H = C + λI and the upper Cholesky factor U of H⁻¹, rounding column i adds -(w_i - q_i)/U_ii · U_i,j to every
    later column j. A group's scale is chosen when its first column is reached, from the updated weights, by least
    squared error weighted with 1/U_jj², the error's true cost. Columns are worked off in blocks of one group.

    Args:
      second_moment: C = E[xᵀx] of the matrix's input; directions that never occur are left alone by the damping.
      damping: λ as a fraction of the mean of C's diagonal.
    """
    count, n = rows.shape
    block = min(spec.group or 128, n)
    blocks = -(-n // block)
    padded = blocks * block
    u = inverse_factor(second_moment, padded, damping)
    cost = 1.0 / jnp.diagonal(u) ** 2
    w = jnp.pad(rows.astype(jnp.float32), ((0, 0), (0, padded - n)))
    whole_row = None
    if spec.group is None:
        whole_row = _best_scale(w[:, None, :], cost[None, None, :], spec)[:, 0]

    def one_block(w, start):
        part = jax.lax.dynamic_slice(w, (0, start), (count, block))
        mixing = jax.lax.dynamic_slice(u, (start, start), (block, block))
        if whole_row is None:
            importance = jax.lax.dynamic_slice(cost, (start,), (block,))
            scale = _best_scale(part[:, None, :], importance[None, None, :], spec)[:, 0]
        else:
            scale = whole_row

        def one_column(i, carry):
            part, levels, errors = carry
            column = part[:, i]
            level = spec.round(safe_ratio(column, scale))
            error = (column - level * scale) / mixing[i, i]
            part = part - error[:, None] * jnp.where(jnp.arange(block) > i, mixing[i], 0.0)
            return part, levels.at[:, i].set(level), errors.at[:, i].set(error)

        _, levels, errors = jax.lax.fori_loop(0, block, one_column, (part, jnp.zeros_like(part), jnp.zeros_like(part)))
        later = jnp.arange(padded) >= start + block
        w = w - (errors @ jax.lax.dynamic_slice(u, (start, 0), (block, padded))) * later
        return w, (levels, scale)

    _, (levels, scales) = jax.lax.scan(one_block, w, jnp.arange(blocks) * block)
    levels = levels.transpose(1, 0, 2).reshape(count, padded)[:, :n]
    scale = scales.T if whole_row is None else whole_row[:, None]
    return levels, scale

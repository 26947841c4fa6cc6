"""Pruning that repairs itself: of the weights that go, the others of their row make up for what they did (SparseGPT).

Matrices are given as rows [r, n] over the inputs. All functions are pure and run under jit.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flaxcompress.compress.rounding import inverse_factor

BLOCK = 128  # columns whose weights are chosen together


def kept_in_blocks(rows: int, columns: int, sparsity: float) -> list[int]:
    """How many weights of each block of columns stay."""
    widths = [min(BLOCK, columns - start) for start in range(0, columns, BLOCK)]
    return [rows * width - round(sparsity * rows * width) for width in widths]


@functools.partial(jax.jit, static_argnames=("sparsity", "n_of_m", "damping"))
def sparse_gpt(
    rows: Float[Array, "r n"],
    second_moment: Float[Array, "n n"],
    *,
    sparsity: float = 0.5,
    n_of_m: tuple[int, int] | None = None,
    damping: float = 0.01,
) -> tuple[Float[Array, "r n"], Bool[Array, "r n"]]:
    """The rows after pruning, and which entries are kept (Frantar & Alistarh 2023, algorithm 1).

    With H = C + λI and the upper Cholesky factor U of H⁻¹, the weights of a block of 128 columns with the smallest
    w²/U_jj² go, U_jj² being the j-th entry of the inverse of what is left of H: the least that the output's error
    grows by. Column by column, a weight that goes adds -w_i/U_ii · U_ij to every later column j of its row.

    Args:
      second_moment: C = E[xᵀx] of the matrix's input.
      sparsity: the share of each block that goes.
      n_of_m: keep n of every m neighbours instead, chosen when the first of them is reached.
      damping: λ as a fraction of the mean of C's diagonal.
    """
    count, n = rows.shape
    group = 1 if n_of_m is None else n_of_m[1]
    block = max(group, BLOCK // group * group)
    blocks = -(-n // block)
    padded = blocks * block
    u = inverse_factor(second_moment, padded, damping)
    w = jnp.pad(rows.astype(jnp.float32), ((0, 0), (0, padded - n)))
    kept_counts = jnp.asarray(kept_in_blocks(count, n, sparsity) if n_of_m is None else [0] * blocks)

    def of_block(part, diagonal, start, kept):
        """The mask of a block, all its columns at once."""
        real = start + jnp.arange(block) < n
        cost = jnp.where(real, (part / diagonal) ** 2, -1.0).reshape(-1)
        order = jnp.argsort(-cost, stable=True)
        return jnp.zeros(cost.shape, bool).at[order].set(jnp.arange(cost.size) < kept).reshape(part.shape)

    def of_group(part, diagonal):
        """The mask of m neighbours, [r, m]."""
        assert n_of_m is not None
        order = jnp.argsort(-((part / diagonal) ** 2), axis=-1, stable=True)
        return jnp.argsort(order, axis=-1) < n_of_m[0]

    def one_block(w, block_of):
        start, kept = block_of
        part = jax.lax.dynamic_slice(w, (0, start), (count, block))
        mixing = jax.lax.dynamic_slice(u, (start, start), (block, block))
        diagonal = jnp.diagonal(mixing)
        mask = of_block(part, diagonal, start, kept) if n_of_m is None else jnp.zeros(part.shape, bool)

        def one_column(i, carry):
            part, mask, errors = carry
            column = part[:, i]
            error = jnp.where(mask[:, i], 0.0, column) / mixing[i, i]
            part = part - error[:, None] * jnp.where(jnp.arange(block) > i, mixing[i], 0.0)
            part = part.at[:, i].set(jnp.where(mask[:, i], column, 0.0))
            return part, mask, errors.at[:, i].set(error)

        def one_group(g, carry):
            part, mask, errors = carry
            at = g * group
            if n_of_m is not None:
                here = jax.lax.dynamic_slice(part, (0, at), (count, group))
                chosen = of_group(here, jax.lax.dynamic_slice(diagonal, (at,), (group,)))
                mask = jax.lax.dynamic_update_slice(mask, chosen, (0, at))
            return jax.lax.fori_loop(at, at + group, one_column, (part, mask, errors))

        carry = (part, mask, jnp.zeros_like(part))
        part, mask, errors = jax.lax.fori_loop(0, block // group, one_group, carry)
        later = jnp.arange(padded) >= start + block
        w = w - (errors @ jax.lax.dynamic_slice(u, (start, 0), (block, padded))) * later
        return w, (part, mask)

    _, (parts, masks) = jax.lax.scan(one_block, w, (jnp.arange(blocks) * block, kept_counts))
    whole = lambda stacked: stacked.transpose(1, 0, 2).reshape(count, padded)[:, :n]  # noqa: E731
    return whole(parts), whole(masks)

"""A matrix most of whose entries are zero: one bit for every entry, and the values of those that are kept.

The matrix is seen as *rows*, the rows of a table or the outputs of a kernel, as in `quantized`. The kept values lie one
after the other, row by row, cut into blocks of 64 so that they are a table or a kernel themselves, dense or quantized,
with a scale for every block. Zeros fill the last block.

    bytes = rows·⌈n/8⌉ + 64·⌈kept/64⌉·(bytes of a value)

Products rebuild the rows first, so that they take as many operations as a dense matrix does.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from flaxcompress.formats.base import axes, materialize, register, spec_of
from flaxcompress.formats.masked import MaskedRows, MaskedSpec
from flaxcompress.ops import pack, unpack

BLOCK = 64


def blocks_of(kept: int) -> int:
    """Blocks that so many values fill."""
    return -(-kept // BLOCK)


@flax.struct.dataclass
class Sparse(MaskedRows):
    """`mask` [rows, ⌈n/8⌉] of bits and `values` [blocks, 64], transposed for a kernel."""

    values: Any
    mask: Any
    kept: int = flax.struct.field(pytree_node=False)
    columns: int = flax.struct.field(pytree_node=False)
    transposed: bool = flax.struct.field(pytree_node=False)

    @property
    def shape(self):
        rows = self.mask.shape[-2]
        return (self.columns, rows) if self.transposed else (rows, self.columns)

    def part_targets(self, dense):
        rows = dense.T if self.transposed else dense
        return [_in_blocks(rows[np.asarray(self.kept_entries())], np, self.transposed)]

    def axes(self, rows, columns):
        stored, _ = self.stored_axes(rows, columns)
        return dataclasses.replace(self, values=axes(self.values, None, None), mask=PartitionSpec(stored, None))

    def spec(self):
        return SparseSpec(kept=self.kept, values=spec_of(self.values))

    def kept_entries(self):
        return unpack(self.mask, 1, self.columns).astype(bool)

    def _decode(self, kept: Bool[Array, "*B n"], before: Any) -> Float[Array, "*B n"]:
        """Rows from their masks and the number of values before each."""
        place = before[..., None] + jnp.cumsum(kept, axis=-1, dtype=jnp.int32) - 1
        values = materialize(self.values)
        values = (values.T if self.transposed else values).reshape(-1)
        return jnp.where(kept, jnp.take(values, place, mode="clip"), 0.0)

    def _before(self) -> Any:
        counts = jax.lax.population_count(self.mask).sum(-1, dtype=jnp.int32)
        return jnp.cumsum(counts) - counts

    def rows(self):
        return self._decode(self.kept_entries(), self._before())

    def take_rows(self, ids):
        masks = jnp.take(self.mask, ids, axis=0, mode="clip")
        before = jnp.take(self._before(), ids, mode="clip")
        return self._decode(unpack(masks, 1, self.columns).astype(bool), before)

    def stored_values(self):
        return self.kept


@register
@dataclasses.dataclass(frozen=True)
class SparseSpec(MaskedSpec):
    """How many entries are `kept`, and the format of their values' matrix [⌈kept/64⌉, 64]."""

    kind: ClassVar[str] = "sparse"
    kept: int

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.kept, int) or self.kept < 1:
            raise ValueError(f"sparse format: kept must be a positive integer, got {self.kept!r}")

    def pack(self, rows, kept, *, transposed):
        xp: Any = np if isinstance(rows, np.ndarray) else jnp
        where = jnp.nonzero(kept.reshape(-1), size=self.kept)[0] if xp is jnp else np.flatnonzero(kept)
        return Sparse(
            values=jnp.asarray(_in_blocks(rows.reshape(-1)[where], xp, transposed), self.values_dtype),
            mask=pack(kept, 1),
            kept=self.kept,
            columns=rows.shape[-1],
            transposed=transposed,
        )

    def _values(self, key, initializer, *, table):
        blocks = blocks_of(self.kept)
        return self.values.init(key, (blocks, BLOCK) if table else (BLOCK, blocks), initializer, table=table)

    def init(self, key, shape, initializer, *, table):
        rows, columns = shape if table else shape[::-1]
        if self.kept > rows * columns:
            raise ValueError(f"sparse format: {self.kept} entries kept of a {shape[0]}×{shape[1]} matrix")
        chances = jax.random.uniform(key, (rows * columns,))
        first = jnp.argsort(chances)[: self.kept]
        kept = jnp.zeros(rows * columns, bool).at[first].set(True).reshape(rows, columns)
        return Sparse(
            values=self._values(key, initializer, table=table),
            mask=pack(kept, 1),
            kept=self.kept,
            columns=columns,
            transposed=not table,
        )


def _in_blocks(values: Any, xp: Any, transposed: bool) -> Any:
    """[kept] -> [blocks, 64], filled up with zeros, or its transpose."""
    blocks = xp.pad(values, (0, -len(values) % BLOCK)).reshape(-1, BLOCK)
    return blocks.T if transposed else blocks

"""N:M sparsity: of every M neighbours in a row, N are kept, each with its place among them (Mishra et al. 2021).

The matrix is seen as *rows*, the rows of a table or the outputs of a kernel, so that a kernel's groups run along its
inputs, as hardware for 2:4 wants them. The kept values are a narrower table or a lower kernel, dense or quantized. A
place takes the bits that M - 1 takes: two for 2:4.

    bytes = rows·⌈n/M·N·bits/8⌉ + rows·n/M·N·(bytes of a value)
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from flaxcompress.formats.base import axes, materialize, register, select, spec_of, take
from flaxcompress.formats.masked import MaskedRows, MaskedSpec
from flaxcompress.ops import pack, unpack

GROUPS = (2, 4, 8, 16)  # what M may be


def place_bits(m: int) -> int:
    """Bits of a place among m."""
    return (m - 1).bit_length()


@flax.struct.dataclass
class SemiStructured(MaskedRows):
    """`values` [rows, n/M·N], transposed for a kernel, and `places` [rows, bytes]."""

    values: Any
    places: Any
    n: int = flax.struct.field(pytree_node=False)
    m: int = flax.struct.field(pytree_node=False)
    transposed: bool = flax.struct.field(pytree_node=False)

    @property
    def columns(self) -> int:
        """Entries of a row."""
        return self._kept // self.n * self.m

    @property
    def _kept(self) -> int:
        return self.values.shape[-2 if self.transposed else -1]

    @property
    def shape(self):
        rows = self.places.shape[-2]
        return (self.columns, rows) if self.transposed else (rows, self.columns)

    def part_targets(self, dense):
        rows = dense.T if self.transposed else dense
        return [_turned(rows[np.asarray(self.kept_entries())].reshape(len(rows), -1), self.transposed)]

    def axes(self, rows, columns):
        stored, _ = self.stored_axes(rows, columns)
        values = axes(self.values, None, stored) if self.transposed else axes(self.values, stored, None)
        return dataclasses.replace(self, values=values, places=PartitionSpec(stored, None))

    def spec(self):
        return SemiStructuredSpec(n=self.n, m=self.m, values=spec_of(self.values))

    def _at(self, places):
        """[*B, n/M·N] -> [*B, n/M, N, M]: whether a kept value stands at a place."""
        among = unpack(places, place_bits(self.m), self._kept)
        among = among.reshape(*among.shape[:-1], -1, self.n)
        return among[..., None] == jnp.arange(self.m, dtype=among.dtype)

    def _decode(self, values, places):
        grouped = values.reshape(*values.shape[:-1], -1, self.n)
        spread = jnp.where(self._at(places), grouped[..., None], 0.0).sum(-2)
        return spread.reshape(*values.shape[:-1], -1)

    def kept_entries(self):
        at = self._at(self.places).any(-2)
        return at.reshape(*self.places.shape[:-1], -1)

    def rows(self):
        return self._decode(_turned(materialize(self.values), self.transposed), self.places)

    def take_rows(self, ids):
        return self._decode(take(self.values, ids), jnp.take(self.places, ids, axis=0, mode="clip"))

    def chosen(self, ids):
        return dataclasses.replace(self, values=select(self.values, ids, int(self.transposed)), places=self.places[ids])

    def stored_values(self):
        return int(np.prod(self.values.shape[-2:]))


@register
@dataclasses.dataclass(frozen=True)
class SemiStructuredSpec(MaskedSpec):
    """`n` of every `m`, and the format of the values' matrix [rows, columns/m·n]."""

    kind: ClassVar[str] = "semi_structured"
    n: int
    m: int

    def __post_init__(self):
        super().__post_init__()
        if self.m not in GROUPS or not isinstance(self.n, int) or not 1 <= self.n < self.m:
            raise ValueError(
                f"semi_structured format: n of every m with m in {GROUPS} and 1 <= n < m, got {self.n!r} of {self.m!r}"
            )

    def kept_per_row(self, columns: int) -> int:
        """Values stored of a row. Raises ValueError where m does not divide it."""
        if columns % self.m:
            raise ValueError(f"{self.n}:{self.m} sparsity: {self.m} does not divide rows of {columns} entries")
        return columns // self.m * self.n

    def pack(self, rows, kept, *, transposed):
        xp: Any = np if isinstance(rows, np.ndarray) else jnp
        self.kept_per_row(rows.shape[-1])
        grouped, marked = (x.reshape(*rows.shape[:-1], -1, self.m) for x in (rows, kept))
        places = xp.argsort(~marked, axis=-1, stable=True)[..., : self.n]
        values = xp.take_along_axis(grouped, places, axis=-1)
        return SemiStructured(
            values=jnp.asarray(_turned(values.reshape(len(rows), -1), transposed), self.values_dtype),
            places=pack(places.reshape(*rows.shape[:-1], -1), place_bits(self.m)),
            n=self.n,
            m=self.m,
            transposed=transposed,
        )

    def _values(self, key, held, initializer, *, table):
        return self.values.init(key, held if table else held[::-1], initializer, table=table)

    def init(self, key, shape, initializer, *, table):
        rows, columns = shape if table else shape[::-1]
        kept = self.kept_per_row(columns)
        chances = jax.random.uniform(key, (rows, columns // self.m, self.m))
        places = jnp.sort(jnp.argsort(chances, axis=-1)[..., : self.n], axis=-1)
        return SemiStructured(
            values=self._values(key, (rows, kept), initializer, table=table),
            places=pack(places.reshape(rows, kept), place_bits(self.m)),
            n=self.n,
            m=self.m,
            transposed=not table,
        )


def _turned(values: Any, transposed: bool) -> Any:
    """The stored values of a kernel, as rows, or back."""
    return values.T if transposed else values

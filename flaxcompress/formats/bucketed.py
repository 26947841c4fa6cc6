"""A table whose rows fall into tiers, each tier a table in a format of its own.

Frequent tokens deserve more rank and bits than rare ones (GroupReduce, Chen et al. 2018). `assignment` holds each row's
tier, two (or four) bits per row; a row's place inside its tier is its rank among the tier's rows in id order, counted
when needed from blocks of 64 rows, so that no index table is stored.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from flaxcompress.formats.base import (
    Format,
    Part,
    Spec,
    attend,
    axes,
    materialize,
    matmul_flops,
    parse_spec,
    register,
    reject_unknown,
    select,
    spec_of,
    stored_values,
    take,
    take_flops,
)
from flaxcompress.ops import pack, unpack

_BLOCK = 64
MAX_TIERS = 16


def assignment_bits(tiers: int) -> int:
    """Bits per row of the packed assignment."""
    return 2 if tiers <= 4 else 4


@flax.struct.dataclass
class Bucketed(Format):
    """`tiers`: one table per tier; `assignment`: packed tier numbers, one per row, in id order."""

    tiers: tuple[Any, ...]
    assignment: Any

    @classmethod
    def from_tiers(cls, tiers: tuple[Any, ...], tier_of_row: np.ndarray) -> Bucketed:
        """Packs `tier_of_row` [V]; tier i's table holds its rows in id order."""
        return cls(tiers=tuple(tiers), assignment=pack(jnp.asarray(tier_of_row), assignment_bits(len(tiers))))

    @property
    def shape(self):
        return (sum(t.shape[-2] for t in self.tiers), self.tiers[0].shape[-1])

    def parts(self):
        return tuple(Part(tier, table=True) for tier in self.tiers)

    def with_parts(self, nodes):
        return Bucketed(tiers=tuple(nodes), assignment=self.assignment)

    def part_targets(self, dense):
        numbers = np.asarray(self.tier_of_row())
        return [dense[numbers == i] for i in range(len(self.tiers))]

    def select(self, ids, axis):
        if axis != 0:
            raise ValueError("Bucketed: rows can be selected, not columns")
        tier, row = (np.asarray(x) for x in self.locate(jnp.asarray(ids)))
        used = np.unique(tier)  # a tier that nothing is left of is dropped
        tiers = tuple(select(self.tiers[number], row[tier == number], 0) for number in used)
        return Bucketed.from_tiers(tiers, np.searchsorted(used, tier).astype(np.uint8))

    def spec(self):
        return BucketedSpec(tiers=tuple(Tier(rows=t.shape[-2], format=spec_of(t)) for t in self.tiers))

    def tier_of_row(self):
        """[V] uint8."""
        return unpack(self.assignment, assignment_bits(len(self.tiers)), self.shape[0])

    def locate(self, ids):
        """(tier, row inside the tier) of each id."""
        codes = self.tier_of_row()
        blocks = jnp.pad(codes, (0, -codes.shape[0] % _BLOCK), constant_values=255).reshape(-1, _BLOCK)
        kinds = jnp.arange(len(self.tiers), dtype=jnp.uint8)
        counts = (blocks[:, :, None] == kinds).sum(1, dtype=jnp.int32)
        before = jnp.cumsum(counts, axis=0) - counts
        ids = jnp.clip(ids, 0, codes.shape[0] - 1)
        block, inside = ids // _BLOCK, ids % _BLOCK
        tier = codes[ids]
        earlier = (blocks[block] == tier[..., None]) & (jnp.arange(_BLOCK) < inside[..., None])
        row = before[block, tier.astype(jnp.int32)] + earlier.sum(-1, dtype=jnp.int32)
        return tier, row

    def take(self, ids):
        tier, row = self.locate(ids)
        out = take(self.tiers[0], row)
        for number in range(1, len(self.tiers)):
            out = jnp.where((tier == number)[..., None], take(self.tiers[number], row), out)
        return out

    def _order(self):
        """Column of each id in the tiers' tables laid end to end."""
        tier, row = self.locate(jnp.arange(self.shape[0]))
        starts = np.cumsum([0, *(t.shape[-2] for t in self.tiers[:-1])])
        return jnp.asarray(starts)[tier.astype(jnp.int32)] + row

    def attend(self, x):
        scores = jnp.concatenate([attend(x, t) for t in self.tiers], axis=-1)
        return jnp.take(scores, self._order(), axis=-1)

    def materialize(self):
        return jnp.concatenate([materialize(t) for t in self.tiers], axis=0)[self._order()]

    def axes(self, rows, columns):
        tiers = tuple(axes(tier, rows, columns) for tier in self.tiers)
        return Bucketed(tiers=tiers, assignment=PartitionSpec(None))

    def matmul_flops(self):
        return sum(matmul_flops(t) for t in self.tiers)  # of `attend`

    def take_flops(self):
        return sum(take_flops(t) for t in self.tiers)  # every tier is read, the row's own one is kept

    def stored_values(self):
        return sum(stored_values(t) for t in self.tiers) + self.shape[0]


@dataclasses.dataclass(frozen=True)
class Tier:
    """`rows` rows in one format."""

    rows: int
    format: Spec


@register
@dataclasses.dataclass(frozen=True)
class BucketedSpec(Spec):
    """The tiers in order; their rows add up to the table's."""

    kind: ClassVar[str] = "bucketed"
    tiers: tuple[Tier, ...]

    def __post_init__(self):
        if not 1 <= len(self.tiers) <= MAX_TIERS:
            raise ValueError(f"bucketed format: 1 to {MAX_TIERS} tiers, got {len(self.tiers)}")
        for tier in self.tiers:
            if not isinstance(tier.rows, int) or tier.rows < 1:
                raise ValueError(f"bucketed format: a tier's rows must be a positive integer, got {tier.rows!r}")

    @classmethod
    def parse(cls, data, where):
        reject_unknown(where, data, ("kind", "tiers"))
        tiers = []
        for number, tier in enumerate(data.get("tiers", ())):
            here = f"{where}/tiers/{number}"
            reject_unknown(here, tier, ("rows", "format"))
            tiers.append(Tier(rows=tier.get("rows"), format=parse_spec(tier.get("format"), here)))
        return cls(tiers=tuple(tiers))

    def to_json(self):
        return {"kind": self.kind, "tiers": [{"rows": t.rows, "format": t.format.to_json()} for t in self.tiers]}

    def init(self, key, shape, initializer, *, table):
        if not table:
            raise ValueError("bucketed format: only embedding tables have tiers")
        rows = [t.rows for t in self.tiers]
        if sum(rows) != shape[0]:
            raise ValueError(f"bucketed format: tiers of {rows} rows do not add up to the table's {shape[0]}")
        keys = jax.random.split(key, len(self.tiers))
        tiers = [
            t.format.init(k, (t.rows, shape[1]), initializer, table=True) for t, k in zip(self.tiers, keys, strict=True)
        ]
        return Bucketed.from_tiers(tuple(tiers), np.repeat(np.arange(len(rows), dtype=np.uint8), rows))

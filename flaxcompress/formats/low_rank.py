"""W = left · right, [n, R] · [R, m], each factor in a format of its own."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress.formats.base import (
    DenseSpec,
    Format,
    Part,
    Spec,
    attend,
    axes,
    materialize,
    matmul,
    matmul_flops,
    parse_spec,
    register,
    select,
    spec_of,
    take,
    take_flops,
)
from flaxcompress.formats.basis import Basis


def break_even_rank(n: int, m: int) -> int:
    """The largest rank at which the factors hold fewer values than the n×m matrix: r < nm/(n + m)."""
    return max(0, (n * m - 1) // (n + m))


def rank_for(shape: tuple[int, int], rank: int | None, keep: float | None, allow_larger: bool, address: str) -> int:
    """The rank that `rank` or `keep` (a fraction of the matrix's values) asks for; ValueError when it cannot help."""
    n, m = shape
    if (rank is None) == (keep is None):
        raise ValueError(f"{address}: give either rank or keep, got rank={rank}, keep={keep}")
    if keep is not None:
        if not 0 < keep <= 1:
            raise ValueError(f"{address}: keep {keep} must lie in (0, 1], the fraction of the matrix's parameters")
        rank = max(1, int(keep * n * m / (n + m)))
    assert rank is not None
    if not 1 <= rank <= min(n, m):
        raise ValueError(f"{address}: rank {rank} is not in 1 … {min(n, m)} for a {n}×{m} matrix")
    limit = break_even_rank(n, m)
    if rank > limit and not allow_larger:
        raise ValueError(
            f"{address}: rank {rank} would enlarge a {n}×{m} matrix; use rank <= {limit}, drop it from the pattern, "
            "or set allow_larger: true"
        )
    return rank


@flax.struct.dataclass
class LowRank(Format):
    """The rank-R matrix left · right; a table's rows are looked up in `left`, which may be a `Basis`."""

    left: Any
    right: Any

    @property
    def shape(self):
        return (self.left.shape[-2], self.right.shape[-1])

    @property
    def rank(self) -> int:
        """R."""
        return self.left.shape[-1]

    def parts(self):
        right = Part(self.right, table=False)
        return (right,) if isinstance(self.left, Basis) else (Part(self.left, table=True), right)

    def with_parts(self, nodes):
        *left, right = nodes
        return LowRank(left=left[0] if left else self.left, right=right)

    def part_targets(self, dense):
        if isinstance(self.left, Basis):
            return [None]
        right = np.asarray(materialize(self.right), np.float64)
        left = np.asarray(dense, np.float64) @ np.linalg.pinv(right)
        return [left.astype(np.float32), right.astype(np.float32)]

    def select(self, ids, axis):
        if axis == 0:
            return LowRank(left=select(self.left, ids, 0), right=self.right)
        return LowRank(left=self.left, right=select(self.right, ids, 1))

    def spec(self):
        return LowRankSpec(rank=self.rank, left=spec_of(self.left), right=spec_of(self.right))

    def matmul(self, x):
        return matmul(matmul(x, self.left), self.right)

    def attend(self, x):
        return attend(attend(x, self.right), self.left)

    def take(self, ids):
        return matmul(take(self.left, ids), self.right)

    def materialize(self):
        return jnp.matmul(materialize(self.left), materialize(self.right), precision=jax.lax.Precision.HIGHEST)

    def axes(self, rows, columns):
        return LowRank(left=axes(self.left, rows, "rank"), right=axes(self.right, "rank", columns))

    def matmul_flops(self):
        return matmul_flops(self.left) + matmul_flops(self.right)

    def take_flops(self):
        return take_flops(self.left) + matmul_flops(self.right)


@register
@dataclasses.dataclass(frozen=True)
class LowRankSpec(Spec):
    """`rank` and the formats of the two factors."""

    kind: ClassVar[str] = "low_rank"
    rank: int
    left: Spec = dataclasses.field(default_factory=DenseSpec)
    right: Spec = dataclasses.field(default_factory=DenseSpec)

    def __post_init__(self):
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"low_rank format: rank must be a positive integer, got {self.rank!r}")

    @classmethod
    def parse(cls, data, where):
        spec = super().parse(data, where)
        left, right = parse_spec(data.get("left"), f"{where}/left"), parse_spec(data.get("right"), f"{where}/right")
        return dataclasses.replace(spec, left=left, right=right)

    def to_json(self):
        return {"kind": self.kind, "rank": self.rank, "left": self.left.to_json(), "right": self.right.to_json()}

    def init(self, key, shape, initializer, *, table):
        n, m = shape
        left_key, right_key = jax.random.split(key)
        # Rows of `right` with variance 1/R keep the product's variance equal to that of `left`.
        unit = jax.nn.initializers.normal(self.rank**-0.5)
        return LowRank(
            left=self.left.init(left_key, (n, self.rank), initializer, table=table),
            right=self.right.init(right_key, (self.rank, m), unit, table=False),
        )

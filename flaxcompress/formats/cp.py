"""W as a sum of R rank-one tensors: canonical polyadic decomposition (Hitchcock 1927; Kolda & Bader 2009, §3).

W[i, j] = Σ_r A_1[i_1, r] · … · A_a[i_a, r] · B_1[j_1, r] · … · B_b[j_b, r]

With one factor for the rows and one for the columns it is the low-rank format.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flaxcompress.formats.base import register
from flaxcompress.formats.decomposed import Decomposed, DecomposedSpec, digits, padded
from flaxcompress.linalg import cp, full_cp_rank

_EXACT = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class CP(Decomposed):
    """`factors`: A_1 … A_a, B_1 … B_b, each [size of its mode, R]; `row_modes`: a; `rows`: n."""

    factors: tuple[Any, ...]
    row_modes: int = flax.struct.field(pytree_node=False)
    rows: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self):
        return (self.rows, math.prod(self._sizes(columns=True)))

    @property
    def rank(self) -> int:
        """R."""
        return self.factors[0].shape[-1]

    def _sizes(self, *, columns: bool) -> list[int]:
        return [factor.shape[-2] for factor in self._half(columns=columns)]

    def _half(self, *, columns: bool) -> tuple[Any, ...]:
        return self.factors[self.row_modes :] if columns else self.factors[: self.row_modes]

    def spec(self):
        rows, columns = (tuple(self._sizes(columns=side)) for side in (False, True))
        return CPSpec(rows=rows, columns=columns, rank=self.rank, dtype=str(self.factors[0].dtype))

    def forward(self, x):
        return self._through(padded(x, self._sizes(columns=False)), columns=True)

    def backward(self, x):
        return self._through(x, columns=False)[..., : self.rows]

    def _through(self, x, *, columns: bool):
        """x [*B, Π a_k] -> [*B, Π b_k]: the modes that it has are summed over, the others spread out."""
        y = x.reshape(-1, x.shape[-1], 1)
        for number, factor in enumerate(self._half(columns=not columns)):
            y = y.reshape(
                len(y), factor.shape[0], -1, y.shape[-1]
            )  # [B, a_k, a_{k+1}…, R], but at first [B, a_1, …, 1]
            step = "bazr,ar->bzr" if number else "bazo,ar->bzr"
            y = jnp.einsum(step, y, factor.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
        return _spread(y[:, 0], self._half(columns=columns)).reshape(*x.shape[:-1], -1)

    def take(self, ids):
        ids = jnp.clip(ids, 0, self.rows - 1)
        rows = self._half(columns=False)
        y = jnp.ones((*ids.shape, self.rank), jnp.float32)
        for factor, digit in zip(rows, digits(ids, self._sizes(columns=False)), strict=True):
            y = y * jnp.take(factor, digit, axis=0).astype(jnp.float32)
        return _spread(y.reshape(-1, self.rank), self._half(columns=True)).reshape(*ids.shape, -1)

    def materialize(self):
        sides = []
        for columns in (False, True):
            y = jnp.ones((1, self.rank), jnp.float32)
            for factor in self._half(columns=columns):  # the Khatri-Rao product
                y = (y[:, None] * factor.astype(jnp.float32)).reshape(-1, self.rank)
            sides.append(y)
        return jnp.matmul(sides[0][: self.rows], sides[1].T, precision=_EXACT)

    def axes(self, rows, columns):
        names = [rows if self.row_modes == 1 else None] * self.row_modes
        names += [columns if len(self.factors) == self.row_modes + 1 else None] * (len(self.factors) - self.row_modes)
        return dataclasses.replace(self, factors=tuple(PartitionSpec(name, "rank") for name in names))

    def chain_flops(self, *, transposed):
        summed, flops = self._sizes(columns=transposed), 0
        left = math.prod(summed)
        for size in summed:
            flops += 2 * left * self.rank
            left //= size
        return flops + self._spread_flops(columns=not transposed)

    def _spread_flops(self, *, columns: bool) -> int:
        done, flops = 1, 0
        *sizes, last = self._sizes(columns=columns)
        for size in sizes:
            done *= size
            flops += done * self.rank
        return flops + 2 * done * last * self.rank

    def build_flops(self):
        return 2 * math.prod(self.shape) * self.rank

    def take_flops(self):
        return (self.row_modes - 1) * self.rank + self._spread_flops(columns=True)


def _spread(y, factors):
    """[B, R] -> [B, Π b_k]: Σ_r y_r · B_1[:, r] ⊗ … ⊗ B_b[:, r], the sum with the last factor."""
    *first, last = factors
    y = y[:, None]
    for factor in first:
        y = (y[:, :, None] * factor.astype(y.dtype)).reshape(len(y), -1, y.shape[-1])
    exact = _EXACT if y.dtype == jnp.float32 else None
    z = jnp.einsum("bzr,mr->bzm", y, last.astype(y.dtype), preferred_element_type=jnp.float32, precision=exact)
    return z.astype(y.dtype).reshape(len(y), -1)


@register
@dataclasses.dataclass(frozen=True)
class CPSpec(DecomposedSpec):
    """Factors of the rows (their product at least n) and of the columns (exactly m), the rank, and the dtype."""

    kind: ClassVar[str] = "cp"
    rank: int
    dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"cp format: rank must be a positive integer, got {self.rank!r}")

    def shapes(self):
        return [(size, self.rank) for size in self.modes]

    def init(self, key, shape, initializer, *, table):
        self.check(shape)
        keys, shapes = jax.random.split(key, len(self.modes)), self.shapes()
        # An entry of W is a sum of R products: with this deviation, that of the first factor is kept.
        others = jax.nn.initializers.normal(self.rank ** (-0.5 / (len(shapes) - 1)))
        draws = [initializer, *(others for _ in shapes[1:])]
        factors = [draw(k, s, jnp.float32).astype(self.dtype) for draw, k, s in zip(draws, keys, shapes, strict=True)]
        return CP(factors=tuple(factors), row_modes=len(self.rows), rows=shape[0])

    def compress(self, matrix, metric=None):
        """By alternating least squares (see `linalg.cp`)."""
        first, *others = cp(self.tensor(matrix, metric), self.rank)
        factors = (first if metric is None else metric.undo(first), *others)
        held = tuple(jnp.asarray(factor, self.dtype) for factor in factors)
        return CP(factors=held, row_modes=len(self.rows), rows=len(matrix))

    def full_rank(self) -> int:
        """A rank at which any tensor of these modes is held exactly."""
        return full_cp_rank(self.modes)

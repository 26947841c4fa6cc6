"""W as a small core multiplied by a matrix in every mode (Tucker 1966; Kolda & Bader 2009, §4).

W[i, j] = Σ G[p_1 … p_a, q_1 … q_b] · A_1[i_1, p_1] · … · A_a[i_a, p_a] · B_1[j_1, q_1] · … · B_b[j_b, q_b]
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from flaxcompress.formats.base import register
from flaxcompress.formats.decomposed import Decomposed, DecomposedSpec, digits, padded
from flaxcompress.linalg import tucker

_EXACT = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class Tucker(Decomposed):
    """`core` G; `factors`: A_1 … A_a, B_1 … B_b, each [size of its mode, its rank]; `row_modes`: a; `rows`: n."""

    core: Any
    factors: tuple[Any, ...]
    row_modes: int = flax.struct.field(pytree_node=False)
    rows: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self):
        return (self.rows, math.prod(self._sizes(columns=True)))

    def _half(self, *, columns: bool) -> tuple[Any, ...]:
        return self.factors[self.row_modes :] if columns else self.factors[: self.row_modes]

    def _sizes(self, *, columns: bool) -> list[int]:
        return [factor.shape[-2] for factor in self._half(columns=columns)]

    def _ranks(self, *, columns: bool) -> list[int]:
        return [factor.shape[-1] for factor in self._half(columns=columns)]

    def _core_matrix(self):
        return self.core.reshape(math.prod(self._ranks(columns=False)), -1)

    def spec(self):
        rows, columns = (tuple(self._sizes(columns=side)) for side in (False, True))
        ranks = (*self._ranks(columns=False), *self._ranks(columns=True))
        return TuckerSpec(rows=rows, columns=columns, ranks=ranks, dtype=str(self.core.dtype))

    def forward(self, x):
        y = _by_modes(padded(x, self._sizes(columns=False)), self._half(columns=False), "baz,ap->bzp")
        y = _product("bp,pq->bq", y, self._core_matrix())
        return _by_modes(y, self._half(columns=True), "bqz,cq->bzc").reshape(*x.shape[:-1], -1)

    def backward(self, x):
        y = _by_modes(x, self._half(columns=True), "baz,ap->bzp")
        y = _product("bq,pq->bp", y, self._core_matrix())
        return _by_modes(y, self._half(columns=False), "bqz,cq->bzc")[:, : self.rows].reshape(*x.shape[:-1], -1)

    def take(self, ids):
        flat = jnp.clip(ids, 0, self.rows - 1).reshape(-1)
        y = self.core.astype(jnp.float32).reshape(1, -1)
        for factor, digit in zip(self._half(columns=False), digits(flat, self._sizes(columns=False)), strict=True):
            chosen = jnp.take(factor, digit, axis=0).astype(jnp.float32)
            step = "op,opz->oz" if len(y) > 1 else "op,pz->oz"
            y = y.reshape(len(y), factor.shape[-1], -1)
            y = jnp.einsum(step, chosen, y if len(y) > 1 else y[0], precision=_EXACT)
        return _by_modes(y, self._half(columns=True), "bqz,cq->bzc").reshape(*ids.shape, -1)

    def materialize(self):
        core = self._core_matrix().astype(jnp.float32)
        left = _by_modes(core.T, self._half(columns=False), "bqz,cq->bzc").T[: self.rows]
        return _by_modes(left, self._half(columns=True), "bqz,cq->bzc")

    def axes(self, rows, columns):
        names = [rows if self.row_modes == 1 else None] * self.row_modes
        names += [columns if len(self.factors) == self.row_modes + 1 else None] * (len(self.factors) - self.row_modes)
        factors = tuple(PartitionSpec(name, "core") for name in names)
        core = PartitionSpec("core", *(None,) * (len(self.factors) - 1))
        return dataclasses.replace(self, core=core, factors=factors)

    def chain_flops(self, *, transposed):
        core = 2 * math.prod(self._ranks(columns=False)) * math.prod(self._ranks(columns=True))
        return self._flops(columns=transposed, shrinking=True) + core + self._spread_flops(columns=not transposed)

    def _spread_flops(self, *, columns: bool) -> int:
        return self._flops(columns=columns, shrinking=False)

    def _flops(self, *, columns: bool, shrinking: bool) -> int:
        """Of multiplying by one matrix per mode, from sizes to ranks (`shrinking`) or back."""
        sizes, ranks = self._sizes(columns=columns), self._ranks(columns=columns)
        before, after = (sizes, ranks) if shrinking else (ranks, sizes)
        return sum(2 * math.prod(after[: k + 1]) * math.prod(before[k:]) for k in range(len(sizes)))

    def build_flops(self):
        widths = math.prod(self._ranks(columns=True)), self.rows
        return widths[0] * self._spread_flops(columns=False) + widths[1] * self._spread_flops(columns=True)

    def take_flops(self):
        ranks = self._ranks(columns=False)
        last = math.prod(self._ranks(columns=True))
        gathered = sum(2 * math.prod(ranks[k:]) * last for k in range(len(ranks)))
        return gathered + self._spread_flops(columns=True)


def _product(step: str, y, matrix):
    """An einsum with one matrix, accumulated in float32, in y's dtype; exact in float32."""
    exact = _EXACT if y.dtype == jnp.float32 else None
    z = jnp.einsum(step, y, matrix.astype(y.dtype), preferred_element_type=jnp.float32, precision=exact)
    return z.astype(y.dtype)


def _by_modes(x, factors, step: str):
    """[*B, Π a_k] -> [B, Π b_k], one mode after the other; each goes to the end, so that all stand in order again."""
    y = x.reshape(-1, x.shape[-1])
    for factor in factors:
        size = factor.shape[0] if step.startswith("ba") else factor.shape[1]
        y = _product(step, y.reshape(len(y), size, -1), factor).reshape(len(y), -1)
    return y


@register
@dataclasses.dataclass(frozen=True)
class TuckerSpec(DecomposedSpec):
    """Factors of the rows (their product at least n) and columns (exactly m), a rank for each mode, and the dtype.

    One number as `ranks` stands for all modes, cut where a lower one is as good (see `useful`).
    """

    kind: ClassVar[str] = "tucker"
    ranks: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        full, ranks = self.full_ranks(), self.ranks
        ranks = self.useful((ranks,) * len(full)) if isinstance(ranks, int) else tuple(ranks)
        object.__setattr__(self, "ranks", ranks)
        if len(ranks) != len(full) or not all(
            isinstance(r, int) and 1 <= r <= f for r, f in zip(ranks, full, strict=True)
        ):
            raise ValueError(
                f"tucker format: ranks must be {len(full)} numbers from 1 to {list(full)}, got {list(ranks)}"
            )

    def full_ranks(self) -> tuple[int, ...]:
        """The ranks at which any tensor of these modes is held exactly."""
        whole = math.prod(self.modes)
        return tuple(min(size, whole // size) for size in self.modes)

    def useful(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """The ranks, none above the size of its mode, nor above the product of the others: more would hold nothing."""
        found = [min(rank, full) for rank, full in zip(ranks, self.full_ranks(), strict=True)]
        for mode in np.argsort(found, kind="stable"):  # the largest last: cutting it leaves the others as they are
            found[mode] = min(found[mode], math.prod(found) // found[mode])
        return tuple(found)

    def shapes(self):
        return [self.ranks, *zip(self.modes, self.ranks, strict=True)]

    def init(self, key, shape, initializer, *, table):
        self.check(shape)
        core_key, *keys = jax.random.split(key, len(self.modes) + 1)
        # Rows of the factors with variance 1/rank keep the deviation of the core.
        core = initializer(core_key, self.ranks, jnp.float32).astype(self.dtype)
        factors = [
            jax.nn.initializers.normal(rank**-0.5)(k, (size, rank), jnp.float32).astype(self.dtype)
            for k, size, rank in zip(keys, self.modes, self.ranks, strict=True)
        ]
        return Tucker(core=core, factors=tuple(factors), row_modes=len(self.rows), rows=shape[0])

    def compress(self, matrix, metric=None):
        """By higher-order orthogonal iteration (see `linalg.tucker`)."""
        core, (first, *others) = tucker(self.tensor(matrix, metric), self.ranks)
        factors = (first if metric is None else metric.undo(first), *others)
        held = tuple(jnp.asarray(factor, self.dtype) for factor in factors)
        return Tucker(core=jnp.asarray(core, self.dtype), factors=held, row_modes=len(self.rows), rows=len(matrix))

"""W as a train of cores (Oseledets 2011; as embeddings: Hrinchuk et al. 2020, "Tensorized embedding layers").

Row i and column j are written in mixed radix, i = (i_1 … i_d), j = (j_1 … j_d), the first digit the most significant:
W[i, j] = G_1[:, i_1, j_1, :] · … · G_d[:, i_d, j_d, :], a product of small matrices. Rows may be padded up to Π n_k.
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
from flaxcompress.linalg import tensor_train


@flax.struct.dataclass
class TensorTrain(Decomposed):
    """`cores`: d arrays [r_{k-1}, n_k, m_k, r_k] with r_0 = r_d = 1; `rows`: n, of which Π n_k is at least n."""

    cores: tuple[Any, ...]
    rows: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self):
        return (self.rows, math.prod(core.shape[-2] for core in self.cores))

    def spec(self):
        return TensorTrainSpec(
            rows=tuple(core.shape[-3] for core in self.cores),
            columns=tuple(core.shape[-2] for core in self.cores),
            ranks=tuple(core.shape[-1] for core in self.cores[:-1]),
            dtype=str(self.cores[0].dtype),
        )

    def forward(self, x):
        return self._contract(padded(x, [core.shape[1] for core in self.cores]), "brnz,rnms->bmsz", 1)

    def backward(self, x):
        return self._contract(x, "brmz,rnms->bnsz", 2)[..., : self.rows]

    def _contract(self, x, step: str, axis: int):
        """x [*B, Π a_k] -> [*B, Π b_k]: each core turns [B·b_1…b_{k-1}, r_{k-1}, a_k…a_d] into [B·b_1…b_k, r_k, …]."""
        y = x.reshape(-1, 1, x.shape[-1])
        for core in self.cores:
            y = y.reshape(*y.shape[:2], core.shape[axis], -1)
            y = jnp.einsum(step, y, core.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
            y = y.reshape(-1, *y.shape[2:])
        return y.reshape(*x.shape[:-1], -1)

    def take(self, ids):
        ids = jnp.clip(ids, 0, self.rows - 1)
        y = jnp.ones((*ids.shape, 1, 1), jnp.float32)
        for core, digit in zip(self.cores, digits(ids, [core.shape[1] for core in self.cores]), strict=True):
            slices = jnp.take(core, digit, axis=1).astype(jnp.float32)  # [r, *B, m_k, s]
            y = jnp.einsum("...ar,r...ms->...ams", y, slices, precision=jax.lax.Precision.HIGHEST)
            y = y.reshape(*ids.shape, -1, core.shape[-1])
        return y[..., 0]

    def materialize(self):
        y = jnp.ones((1, 1, 1), jnp.float32)
        for core in self.cores:
            y = jnp.einsum("abr,rnms->anbms", y, core.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
            y = y.reshape(y.shape[0] * y.shape[1], -1, core.shape[-1])
        return y[: self.rows, :, 0]

    def axes(self, rows, columns):
        del rows, columns  # digits of both run over all cores, so that no device could do with some rows of W
        return TensorTrain(cores=(PartitionSpec(None, "core", None, None),) * len(self.cores), rows=self.rows)

    def chain_flops(self, *, transposed):
        of, to = (-2, -3) if transposed else (-3, -2)
        left, done, flops = math.prod(core.shape[of] for core in self.cores), 1, 0
        for core in self.cores:
            rank, following = core.shape[-4], core.shape[-1]
            left //= core.shape[of]
            flops += 2 * done * rank * core.shape[of] * left * core.shape[to] * following
            done *= core.shape[to]
        return flops

    def build_flops(self):
        done, flops = 1, 0
        for core in self.cores:
            rank, n, m, following = core.shape[-4:]
            flops += 2 * done * rank * n * m * following
            done *= n * m
        return flops

    def take_flops(self):
        done, flops = 1, 0
        for core in self.cores:
            rank, _, m, following = core.shape[-4:]
            flops += 2 * done * rank * m * following
            done *= m
        return flops


def full_ranks(rows: tuple[int, ...], columns: tuple[int, ...]) -> tuple[int, ...]:
    """The ranks at which a train holds any matrix: what the smaller side of each cut has entries."""
    sizes = [n * m for n, m in zip(rows, columns, strict=True)]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def balanced_factors(size: int, count: int, *, exact: bool) -> tuple[int, ...]:
    """`count` factors, as equal as possible, whose product is `size`, or at least that."""
    factors: list[int] = []
    for left in range(count, 0, -1):
        root = size ** (1 / left)
        if exact:
            divisors = [d for d in range(1, size + 1) if size % d == 0]
            factor = min(divisors, key=lambda d: abs(math.log(d / root))) if left > 1 else size
            size //= factor
        else:
            factor = max(1, math.ceil(root - 1e-9))
            size = -(-size // factor)
        factors.append(factor)
    return tuple(sorted(factors))


@register
@dataclasses.dataclass(frozen=True)
class TensorTrainSpec(DecomposedSpec):
    """Factors of the rows and of the columns, one of each per core, and the ranks between the cores.

    Attributes:
      rows: n_k; their product is at least n.
      columns: m_k; their product is m.
      ranks: r_1 … r_{d-1}, or one number for all, cut where a full rank is lower.
      dtype: what the cores are stored in.
    """

    kind: ClassVar[str] = "tensor_train"
    ranks: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        if len(self.rows) != len(self.columns) or len(self.rows) < 2:
            raise ValueError(
                "tensor_train format: rows and columns need as many factors, at least 2, got "
                f"{list(self.rows)} and {list(self.columns)}"
            )
        full = full_ranks(self.rows, self.columns)
        ranks = tuple(min(self.ranks, f) for f in full) if isinstance(self.ranks, int) else tuple(self.ranks)
        object.__setattr__(self, "ranks", ranks)
        if len(ranks) != len(full) or not all(
            isinstance(r, int) and 1 <= r <= f for r, f in zip(ranks, full, strict=True)
        ):
            raise ValueError(
                f"tensor_train format: ranks must be {len(full)} numbers from 1 to {list(full)}, got {list(ranks)}"
            )

    @classmethod
    def balanced(cls, shape: tuple[int, int], *, cores: int, rank: int, dtype: str = "float32") -> TensorTrainSpec:
        """Factors as equal as possible for a matrix of `shape`: the rows' padded up, the columns' exact."""
        rows, columns = (balanced_factors(shape[side], cores, exact=bool(side)) for side in (0, 1))
        ranks = tuple(min(rank, full) for full in full_ranks(rows, columns[::-1]))
        return cls(rows=rows, columns=columns[::-1], ranks=ranks, dtype=dtype)

    def shapes(self) -> list[tuple[int, int, int, int]]:
        """[r_{k-1}, n_k, m_k, r_k] of every core."""
        ranks = (1, *self.ranks, 1)
        return [(ranks[k], n, m, ranks[k + 1]) for k, (n, m) in enumerate(zip(self.rows, self.columns, strict=True))]

    def init(self, key, shape, initializer, *, table):
        self.check(shape)
        keys, shapes = jax.random.split(key, len(self.rows)), self.shapes()
        # An entry of W is a sum over r_1·…·r_{d-1} paths: cores of variance 1/r_{k-1} keep that of the first.
        draws = [initializer, *(jax.nn.initializers.normal(r**-0.5) for r in self.ranks)]
        cores = [draw(k, s, jnp.float32) for draw, k, s in zip(draws, keys, shapes, strict=True)]
        return TensorTrain(cores=tuple(core.astype(self.dtype) for core in cores), rows=shape[0])

    def compress(self, matrix, metric=None):
        """By truncated singular value decompositions (see `linalg.tensor_train`).

        A metric is one over the first digit of the rows, which is the whole row where the others' sizes are 1.
        """
        tensor = self.tensor(matrix, metric).reshape(math.prod(self.rows), -1)
        first, *others = tensor_train(tensor, self.rows, self.columns, self.ranks)
        if metric is not None:
            first = metric.undo(first[0].reshape(self.rows[0], -1)).reshape(first.shape)
        cores = tuple(jnp.asarray(core, self.dtype) for core in (first, *others))
        return TensorTrain(cores=cores, rows=len(matrix))

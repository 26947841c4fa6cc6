"""What formats of a reshaped matrix have in common: W [n, m] as a tensor [n_1, …, n_a, m_1, …, m_b].

Row i and column j are written in mixed radix, i = (i_1 … i_a), j = (j_1 … j_b), the first digit the most significant.
Rows may be padded up to Π n_k, columns may not. A tensor with few values may still take more operations to multiply by
than the matrix (CP and Tucker decompositions of high rank do), so a product goes through its factors only where that is
cheaper, and through the matrix, multiplied back for the call, where it is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from flaxcompress.formats.base import Format, Spec, check_dtype, dot
from flaxcompress.linalg import Metric


class Decomposed(Format):
    """A matrix held as factors of a tensor; `rows` is n, of which Π n_k is at least n."""

    rows: int

    def forward(self, x: Float[Array, "*B n"]) -> Float[Array, "*B m"]:
        """x @ W through the factors."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def backward(self, x: Float[Array, "*B m"]) -> Float[Array, "*B n"]:
        """x @ Wᵀ through the factors."""
        raise NotImplementedError(f"{type(self).__name__}.backward")

    def chain_flops(self, *, transposed: bool) -> int:
        """Operations of `forward`, or of `backward` (`transposed`), per row of x."""
        raise NotImplementedError(f"{type(self).__name__}.chain_flops")

    def build_flops(self) -> int:
        """Operations of `materialize`."""
        raise NotImplementedError(f"{type(self).__name__}.build_flops")

    def stays_decomposed(self, vectors: float, *, transposed: bool = False) -> bool:
        """Whether multiplying that many rows takes fewer operations through the factors than through the matrix."""
        saved = 2 * math.prod(self.shape) - self.chain_flops(transposed=transposed)
        return saved >= 0 or vectors * -saved <= self.build_flops()

    def matmul(self, x):
        if self.stays_decomposed(x.size // x.shape[-1]):
            return self.forward(x)
        return dot(x, self.materialize(), 0)

    def attend(self, x):
        if self.stays_decomposed(x.size // x.shape[-1], transposed=True):
            return self.backward(x)
        return dot(x, self.materialize(), 1)

    def matmul_flops(self):
        """Per row of x, of many: what multiplying back takes is spread over them all."""
        return min(self.chain_flops(transposed=False), 2 * math.prod(self.shape))


def padded(x: Float[Array, "*B n"], rows: Sequence[int]) -> Float[Array, "*B N"]:
    """x with zeros behind it, up to N = Π n_k."""
    short = math.prod(rows) - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)]) if short else x


def digits(ids: Integer[Array, "*B"], sizes: Sequence[int]) -> list[Integer[Array, "*B"]]:
    """The digits of numbers below Π n_k in mixed radix, the most significant first."""
    below, found = math.prod(sizes), []
    for size in sizes:
        below //= size
        found.append(ids // below % size)
    return found


@dataclasses.dataclass(frozen=True)
class DecomposedSpec(Spec):
    """The factors of rows and columns; a subclass adds its ranks and `dtype`."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def __post_init__(self):
        check_dtype(getattr(self, "dtype", "float32"), f"{self.kind} format")
        for name in ("rows", "columns"):
            factors = getattr(self, name)
            if not isinstance(factors, (list, tuple)) or not all(isinstance(f, int) and f > 0 for f in factors):
                raise ValueError(f"{self.kind} format: {name} must be a list of positive integers, got {factors!r}")
            object.__setattr__(self, name, tuple(factors))
        if not self.rows or not self.columns:
            raise ValueError(f"{self.kind} format: rows and columns need at least one factor each")

    @property
    def modes(self) -> tuple[int, ...]:
        """The tensor's shape, n_1 … n_a, m_1 … m_b."""
        return (*self.rows, *self.columns)

    def to_json(self):
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"kind": self.kind, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}

    def shapes(self) -> list[tuple[int, ...]]:
        """Of the stored arrays."""
        raise NotImplementedError(f"{type(self).__name__}.shapes")

    def values(self) -> int:
        """How many values are stored."""
        return sum(map(math.prod, self.shapes()))

    def check(self, shape: tuple[int, int]) -> None:
        """Raises ValueError for a matrix that the factors do not fit."""
        if math.prod(self.rows) < shape[0] or math.prod(self.columns) != shape[1]:
            raise ValueError(
                f"{self.kind} format: rows {list(self.rows)} and columns {list(self.columns)} do not fit a "
                f"{shape[0]}×{shape[1]} matrix: products of at least {shape[0]} and of exactly {shape[1]} are wanted"
            )

    def tensor(self, matrix: Float[np.ndarray, "n m"], metric: Metric | None = None) -> np.ndarray:
        """The matrix as a float64 tensor of shape `modes`, in a metric over its first mode; padding is zero."""
        w = np.asarray(matrix, np.float64)
        self.check((w.shape[0], w.shape[1]))
        w = np.pad(w, ((0, math.prod(self.rows) - len(w)), (0, 0)))
        first = w.reshape(self.rows[0], -1)
        return (first if metric is None else metric.apply(first)).reshape(self.modes)

    def compress(self, matrix: Float[np.ndarray, "n m"], metric: Metric | None = None) -> Any:
        """The node of this spec that approximates a dense matrix, equal to it at full rank.

        Args:
          metric: over the first mode (all rows, where they are one factor). The error in it is what is made small, and
            it is undone in the first factor.
        """
        raise NotImplementedError(f"{type(self).__name__}.compress")

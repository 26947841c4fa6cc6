"""Rows of levels times scales, in groups of neighbours that share one: w ≈ level(code)·scale."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from flaxcompress.formats.base import check_dtype
from flaxcompress.formats.rows import RowFormat, RowSpec
from flaxcompress.ops import packed_width


def group_count(columns: int, group: int | None) -> int:
    """Groups per row of `columns` values."""
    return 1 if group is None else -(-columns // group)


def spread_scale(scale: Float[Array, "*B G"], columns: int, group: int | None) -> Float[Array, "*B n"]:
    """One scale per value: every group's scale repeated over its columns."""
    if group is None:
        return jnp.broadcast_to(scale, (*scale.shape[:-1], columns))
    spread = jnp.broadcast_to(scale[..., None], (*scale.shape, group))
    return spread.reshape(*scale.shape[:-1], -1)[..., :columns]


def safe_ratio(x: Array, scale: Array) -> Array:
    """x/scale, and 0 where the scale is 0 (an all-zero group)."""
    return jnp.where(scale > 0, x / jnp.where(scale > 0, scale, 1.0), 0.0)


def grouped(rows: Float[Array, "r n"], group: int | None) -> Float[Array, "r G g"]:
    """Rows cut into groups, the last one padded with zeros."""
    size = rows.shape[-1] if group is None else group
    short = -rows.shape[-1] % size
    return jnp.pad(rows, ((0, 0), (0, short))).reshape(rows.shape[0], -1, size)


def absmax_scale(rows: Float[Array, "r n"], spec: ScaledSpec) -> Float[Array, "r G"]:
    """The scale at which each group's largest value meets the top level, rounded to the stored dtype."""
    scale = jnp.abs(grouped(rows, spec.group)).max(-1) / spec.top
    return scale.astype(spec.scale_dtype).astype(jnp.float32)


class ScaledRows(RowFormat):
    """`values` [rows, bytes] and `scale` [rows, groups]; `transposed` when the matrix is rowsᵀ (a kernel).

    Attributes:
      columns: n, the values of a row.
      group: the neighbours that share a scale; None: the whole row.
    """

    values: Any
    scale: Any
    columns: int
    group: int | None

    def stored_levels(self, values: Any) -> Float[Array, "*B n"]:
        """The levels of stored values, float32."""
        raise NotImplementedError(f"{type(self).__name__}.stored_levels")

    @property
    def shape(self):
        rows = self.values.shape[-2]
        return (self.columns, rows) if self.transposed else (rows, self.columns)

    def axes(self, rows, columns):
        stored, along = self.stored_axes(rows, columns)
        return self._with(PartitionSpec(stored, along), PartitionSpec(stored, None))

    def rows(self):
        return self._decode(self.values, self.scale)

    def take_rows(self, ids):
        return self._decode(*(jnp.take(part, ids, axis=0, mode="clip") for part in (self.values, self.scale)))

    def chosen(self, ids):
        return self._with(self.values[ids], self.scale[ids])

    def stored_values(self):
        return self.values.shape[-2] * self.columns + int(np.prod(self.scale.shape))

    def _decode(self, values: Any, scale: Any) -> Float[Array, "*B n"]:
        levels = self.stored_levels(values)
        return levels * spread_scale(scale.astype(jnp.float32), self.columns, self.group)

    def _with(self, values: Any, scale: Any) -> ScaledRows:
        return dataclasses.replace(self, values=values, scale=scale)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class ScaledSpec(RowSpec):
    """How rows are rounded: values per scale (`group`, None for the whole row), and the scales' dtype."""

    group: int | None = None

    def __post_init__(self):
        if self.group is not None and (not isinstance(self.group, int) or self.group < 1):
            raise ValueError(f"{self.kind} format: group must be a positive integer or null, got {self.group!r}")
        check_dtype(self.scale_dtype, f"{self.kind} format: scale_dtype")

    @property
    def value_bits(self) -> int:
        """Bits of a stored value."""
        raise NotImplementedError(f"{type(self).__name__}.value_bits")

    @property
    def top(self) -> float:
        """The largest level; the smallest is its negative."""
        raise NotImplementedError(f"{type(self).__name__}.top")

    def round(self, x: Float[Array, "*B n"]) -> Float[Array, "*B n"]:
        """The nearest level to x."""
        return self.nearest(x, self.value_bits)

    def spread(self, scale, columns):
        return spread_scale(scale, columns, self.group)

    def row_bytes(self, columns: int) -> int:
        """Bytes of one stored row."""
        scale_bytes = 4 if self.scale_dtype == "float32" else 2
        return packed_width(columns, self.value_bits) + scale_bytes * group_count(columns, self.group)

    def init(self, key, shape, initializer, *, table):
        dense = initializer(key, shape, jnp.float32)
        rows = dense if table else dense.T
        scale = absmax_scale(rows, self)
        levels = self.round(safe_ratio(rows, self.spread(scale, rows.shape[-1])))
        return self.pack(levels, scale, transposed=not table)

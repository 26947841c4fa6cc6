"""Integers times scales: 8 bits per row, or 6 to 2 bits in groups, packed.

The matrix is held as *rows*: the outputs of a kernel (so that a row runs over its inputs) or the rows of a table. A
row is cut into groups of neighbours that share one scale: w ≈ level(code)·scale. The levels are symmetric:

    8 bits   -127 … 127, stored as int8
    6 bits   -31 … 31, stored as code = level + 32
    5 bits   -15 … 15, stored as code = level + 16
    4 bits   -7 … 7, stored as code = level + 8
    3 bits   ±0.5, ±1.5, ±2.5, ±3.5, stored as code = level + 3.5
    2 bits   ±0.5, ±1.5, stored as code = level + 1.5

Half-integer levels waste no code: a Gaussian's best 2-bit error falls from 0.19 (levels -1, 0, 1) to 0.119 (Max 1960).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer

from flaxcompress.formats.base import check_dtype, register
from flaxcompress.formats.rows import Levels, RowFormat, RowSpec
from flaxcompress.ops import on_host, pack, packed_width, unpack

BITS = (2, 3, 4, 5, 6, 8)


def level_offset(bits: int) -> float:
    """code - level."""
    return {8: 0.0, 6: 32.0, 5: 16.0, 4: 8.0, 3: 3.5, 2: 1.5}[bits]


def top_level(bits: int) -> float:
    """The largest level; the smallest is its negative."""
    return {8: 127.0, 6: 31.0, 5: 15.0, 4: 7.0, 3: 3.5, 2: 1.5}[bits]


def nearest_level(x: Float[Array, "*B"], bits: int) -> Float[Array, "*B"]:
    """The nearest level to x, clipped to the range."""
    top = top_level(bits)
    shift = 0.0 if bits >= 4 else 0.5
    return jnp.clip(jnp.round(x - shift) + shift, -top, top)


def group_count(columns: int, group: int | None) -> int:
    """Groups per row of `columns` values."""
    return 1 if group is None else -(-columns // group)


def spread_scale(scale: Float[Array, "*B G"], columns: int, group: int | None) -> Float[Array, "*B n"]:
    """One scale per value: every group's scale repeated over its columns."""
    if group is None:
        return jnp.broadcast_to(scale, (*scale.shape[:-1], columns))
    spread = jnp.broadcast_to(scale[..., None], (*scale.shape, group))
    return spread.reshape(*scale.shape[:-1], -1)[..., :columns]


def dequantize(
    values: Integer[Array, "*B p"], scale: Float[Array, "*B G"], *, bits: int, columns: int, group: int | None
) -> Float[Array, "*B n"]:
    """level(code)·scale, float32."""
    levels = unpack(values, bits, columns) if bits < 8 else values
    levels = levels.astype(jnp.float32) - level_offset(bits)
    return levels * spread_scale(scale.astype(jnp.float32), columns, group)


@flax.struct.dataclass
class Quantized(RowFormat):
    """`values` [rows, packed bytes] and `scale` [rows, groups]; `transposed` when the matrix is rowsᵀ (a kernel)."""

    values: Any
    scale: Any
    bits: int = flax.struct.field(pytree_node=False)
    columns: int = flax.struct.field(pytree_node=False)
    group: int | None = flax.struct.field(pytree_node=False)
    transposed: bool = flax.struct.field(pytree_node=False)

    @classmethod
    def from_levels(cls, levels: Float[Array, "r n"], scale: Float[Array, "r G"], spec: QuantizedSpec, *, table: bool):
        """Packs levels that a rounding method chose."""
        codes = on_host(levels) + level_offset(spec.bits)
        values = jnp.asarray(codes, jnp.int8) if spec.bits == 8 else pack(codes.astype(np.int32), spec.bits)
        return cls(
            values=values,
            scale=scale.astype(spec.scale_dtype),
            bits=spec.bits,
            columns=levels.shape[-1],
            group=spec.group,
            transposed=not table,
        )

    @property
    def shape(self):
        rows = self.values.shape[-2]
        return (self.columns, rows) if self.transposed else (rows, self.columns)

    def axes(self, rows, columns):
        stored, along = self.stored_axes(rows, columns)
        return dataclasses.replace(self, values=PartitionSpec(stored, along), scale=PartitionSpec(stored, None))

    def spec(self):
        return QuantizedSpec(bits=self.bits, group=self.group, scale_dtype=str(self.scale.dtype))

    def rows(self):
        return dequantize(self.values, self.scale, bits=self.bits, columns=self.columns, group=self.group)

    def take_rows(self, ids):
        values = jnp.take(self.values, ids, axis=0, mode="clip")
        scale = jnp.take(self.scale, ids, axis=0, mode="clip")
        return dequantize(values, scale, bits=self.bits, columns=self.columns, group=self.group)

    def chosen(self, ids):
        return dataclasses.replace(self, values=self.values[ids], scale=self.scale[ids])

    def stored_values(self):
        rows, columns = self.values.shape[-2], self.columns
        return rows * columns + int(np.prod(self.scale.shape))


@register
@dataclasses.dataclass(frozen=True)
class QuantizedSpec(RowSpec):
    """`bits`, values per scale (`group`, None for the whole row), and the scales' dtype."""

    kind: ClassVar[str] = "quantized"
    bits: int = 8
    group: int | None = None

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"quantized format: bits must be one of {BITS}, got {self.bits!r}")
        if self.group is not None and (not isinstance(self.group, int) or self.group < 1):
            raise ValueError(f"quantized format: group must be a positive integer or null, got {self.group!r}")
        check_dtype(self.scale_dtype, "quantized format: scale_dtype")

    @property
    def top(self) -> float:
        """The largest level."""
        return top_level(self.bits)

    @property
    def leaf_bits(self):
        return self.bits

    def template(self):
        return dataclasses.replace(self, bits=BITS[-1])

    def with_bits(self, bits):
        return dataclasses.replace(self, bits=bits)

    def levels(self, bits):
        which = (bits == np.asarray(BITS)).argmax()
        tops = jnp.asarray([top_level(b) for b in BITS], jnp.float32)
        return Levels(np.float32(1.0), tops[which], jnp.where(bits < 4, 0.5, 0.0).astype(jnp.float32))

    def spread(self, scale, columns):
        return spread_scale(scale, columns, self.group)

    def pack(self, levels, scale, *, transposed):
        return Quantized.from_levels(levels, scale, self, table=not transposed)

    def row_bytes(self, columns: int) -> int:
        """Bytes of one stored row."""
        scale_bytes = 4 if self.scale_dtype == "float32" else 2
        return packed_width(columns, self.bits) + scale_bytes * group_count(columns, self.group)

    def init(self, key, shape, initializer, *, table):
        dense = initializer(key, shape, jnp.float32)
        rows = dense if table else dense.T
        scale = absmax_scale(rows, self)
        return Quantized.from_levels(
            nearest_level(safe_ratio(rows, spread_scale(scale, rows.shape[-1], self.group)), self.bits),
            scale,
            self,
            table=table,
        )


def safe_ratio(x: Array, scale: Array) -> Array:
    """x/scale, and 0 where the scale is 0 (an all-zero group)."""
    return jnp.where(scale > 0, x / jnp.where(scale > 0, scale, 1.0), 0.0)


def grouped(rows: Float[Array, "r n"], group: int | None) -> Float[Array, "r G g"]:
    """Rows cut into groups, the last one padded with zeros."""
    size = rows.shape[-1] if group is None else group
    short = -rows.shape[-1] % size
    return jnp.pad(rows, ((0, 0), (0, short))).reshape(rows.shape[0], -1, size)


def absmax_scale(rows: Float[Array, "r n"], spec: Any) -> Float[Array, "r G"]:
    """The scale at which each group's largest value meets the top level, rounded to the stored dtype."""
    scale = jnp.abs(grouped(rows, spec.group)).max(-1) / spec.top
    return scale.astype(spec.scale_dtype).astype(jnp.float32)

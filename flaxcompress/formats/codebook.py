"""Numbers of 4 or 8 bits that are not evenly apart: NormalFloat (nf4) and floating point (fp8), times scales.

A matrix is held as rows, as in `quantized`, in groups of neighbours that share one scale: w ≈ level(code)·scale.

    nf4   16 levels in [-1, 1], quantiles of a normal distribution (Dettmers et al. 2023, appendix E); codes in order,
          two in a byte, the first in the low half
    fp8   the numbers of float8_e4m3fn, up to 448 (Micikevicius et al. 2022); a byte each, their bits
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from flaxcompress.formats.base import check_dtype, register
from flaxcompress.formats.quantized import absmax_scale, group_count, safe_ratio, spread_scale
from flaxcompress.formats.rows import Interval, Levels, RowFormat, RowSpec
from flaxcompress.ops import pack, packed_width, unpack

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FLOAT8 = jnp.float8_e4m3fn
_INSIDE = 0.98  # of the way to where rounding changes, for latents that start beside their level


@flax.struct.dataclass
class Coded(RowFormat):
    """`values` [rows, bytes] and `scale` [rows, groups]; `transposed` when the matrix is rowsᵀ (a kernel)."""

    values: Any
    scale: Any
    columns: int = flax.struct.field(pytree_node=False)
    target: CodebookSpec = flax.struct.field(pytree_node=False)
    transposed: bool = flax.struct.field(pytree_node=False)

    @property
    def shape(self):
        rows = self.values.shape[-2]
        return (self.columns, rows) if self.transposed else (rows, self.columns)

    def axes(self, rows, columns):
        stored, along = self.stored_axes(rows, columns)
        return dataclasses.replace(self, values=PartitionSpec(stored, along), scale=PartitionSpec(stored, None))

    def spec(self):
        return dataclasses.replace(self.target, scale_dtype=str(self.scale.dtype))

    def _decode(self, values: Any, scale: Any) -> Any:
        levels = self.target.decode(values, self.columns)
        return levels * spread_scale(scale.astype(jnp.float32), self.columns, self.target.group)

    def rows(self):
        return self._decode(self.values, self.scale)

    def take_rows(self, ids):
        return self._decode(*(jnp.take(part, ids, axis=0, mode="clip") for part in (self.values, self.scale)))

    def chosen(self, ids):
        return dataclasses.replace(self, values=self.values[ids], scale=self.scale[ids])

    def stored_values(self):
        return self.values.shape[-2] * self.columns + int(np.prod(self.scale.shape))


@dataclasses.dataclass(frozen=True)
class CodebookSpec(RowSpec):
    """Values per scale (`group`, None for the whole row), and the scales' dtype."""

    bits: ClassVar[int]
    top: ClassVar[float]
    group: int | None = None

    def __post_init__(self):
        if self.group is not None and (not isinstance(self.group, int) or self.group < 1):
            raise ValueError(f"{self.kind} format: group must be a positive integer or null, got {self.group!r}")
        check_dtype(self.scale_dtype, f"{self.kind} format: scale_dtype")

    def encode(self, levels: Float[Array, "r n"]) -> Any:
        """The bytes of levels [r, p]."""
        raise NotImplementedError(f"{type(self).__name__}.encode")

    def decode(self, values: Any, columns: int) -> Float[Array, "*B n"]:
        """The levels, float32."""
        raise NotImplementedError(f"{type(self).__name__}.decode")

    def levels(self, bits):
        del bits
        return Levels(np.float32(1.0), np.float32(self.top), np.float32(0.0))

    def spread(self, scale, columns):
        return spread_scale(scale, columns, self.group)

    def pack(self, levels, scale, *, transposed):
        values, scale = self.encode(levels), scale.astype(self.scale_dtype)
        columns = levels.shape[-1]
        return Coded(values=values, scale=scale, columns=columns, target=self, transposed=transposed)

    def row_bytes(self, columns: int) -> int:
        """Bytes of one stored row."""
        scale_bytes = 4 if self.scale_dtype == "float32" else 2
        return packed_width(columns, self.bits) + scale_bytes * group_count(columns, self.group)

    def init(self, key, shape, initializer, *, table):
        dense = initializer(key, shape, jnp.float32)
        rows = dense if table else dense.T
        scale = absmax_scale(rows, self)
        levels = self.nearest(safe_ratio(rows, self.spread(scale, rows.shape[-1])), self.bits)
        return self.pack(levels, scale, transposed=not table)


@register
@dataclasses.dataclass(frozen=True)
class NF4Spec(CodebookSpec):
    """NormalFloat in 4 bits."""

    kind: ClassVar[str] = "nf4"
    bits: ClassVar[int] = 4
    top: ClassVar[float] = 1.0

    def nearest(self, x, bits):
        return jnp.asarray(NF4, jnp.float32)[self._codes(x)]

    def interval(self, level, bits):
        levels, codes = np.asarray(NF4, np.float32), self._codes(level)
        middles = (levels[1:] + levels[:-1]) / 2
        low, high = (jnp.asarray(np.concatenate(ends)) for ends in (([-1.0], middles), (middles, [1.0])))
        return Interval(*(level + _INSIDE * (ends[codes] - level) for ends in (low, high)))

    def _codes(self, x: Any) -> Any:
        levels = np.asarray(NF4, np.float32)
        return jnp.searchsorted(jnp.asarray((levels[1:] + levels[:-1]) / 2), x, side="left", method="compare_all")

    def encode(self, levels):
        return pack(self._codes(levels), 4)

    def decode(self, values, columns):
        return jnp.asarray(NF4, jnp.float32)[unpack(values, 4, columns)]


@register
@dataclasses.dataclass(frozen=True)
class FP8Spec(CodebookSpec):
    """Floating point in 8 bits: four of exponent, three of mantissa."""

    kind: ClassVar[str] = "fp8"
    bits: ClassVar[int] = 8
    top: ClassVar[float] = 448.0

    def nearest(self, x, bits):
        return jnp.clip(x, -self.top, self.top).astype(_FLOAT8).astype(jnp.float32)

    def interval(self, level, bits):
        # Half of the spacing below a power of two, where it is the narrower one; of the smallest numbers 2⁻⁹.
        exponent = jnp.floor(jnp.log2(jnp.maximum(jnp.abs(level), 2.0**-6)))
        is_power = jnp.abs(level) == 2.0**exponent
        spacing = 2.0 ** jnp.maximum(exponent - is_power, -6.0) / 8
        reach = 0.5 * _INSIDE * spacing
        return Interval(jnp.maximum(level - reach, -self.top), jnp.minimum(level + reach, self.top))

    def encode(self, levels):
        return jax.lax.bitcast_convert_type(jnp.asarray(levels).astype(_FLOAT8), jnp.uint8)

    def decode(self, values, columns):
        del columns
        return jax.lax.bitcast_convert_type(values, _FLOAT8).astype(jnp.float32)

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
from jaxtyping import Array, Float

from flaxcompress.formats.base import register
from flaxcompress.formats.rows import Interval, Levels
from flaxcompress.formats.scaled import ScaledRows, ScaledSpec
from flaxcompress.ops import pack, unpack

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FLOAT8 = jnp.float8_e4m3fn
_INSIDE = 0.98  # of the way to where rounding changes, for latents that start beside their level


@flax.struct.dataclass
class Coded(ScaledRows):
    """Codes of a codebook's levels, `values` [rows, bytes], and `scale` [rows, groups]."""

    values: Any
    scale: Any
    columns: int = flax.struct.field(pytree_node=False)
    target: CodebookSpec = flax.struct.field(pytree_node=False)
    transposed: bool = flax.struct.field(pytree_node=False)

    @property
    def group(self):
        return self.target.group

    def stored_levels(self, values):
        return self.target.decode(values, self.columns)

    def spec(self):
        return dataclasses.replace(self.target, scale_dtype=str(self.scale.dtype))


@dataclasses.dataclass(frozen=True)
class CodebookSpec(ScaledSpec):
    """Levels that are not evenly apart."""

    bits: ClassVar[int]

    def encode(self, levels: Float[Array, "r n"]) -> Any:
        """The bytes of levels [r, p]."""
        raise NotImplementedError(f"{type(self).__name__}.encode")

    def decode(self, values: Any, columns: int) -> Float[Array, "*B n"]:
        """The levels, float32."""
        raise NotImplementedError(f"{type(self).__name__}.decode")

    @property
    def value_bits(self):
        return self.bits

    def levels(self, bits):
        del bits
        return Levels(np.float32(1.0), np.float32(self.top), np.float32(0.0))

    def pack(self, levels, scale, *, transposed):
        values, scale = self.encode(levels), scale.astype(self.scale_dtype)
        columns = levels.shape[-1]
        return Coded(values=values, scale=scale, columns=columns, target=self, transposed=transposed)


@register
@dataclasses.dataclass(frozen=True)
class NF4Spec(CodebookSpec):
    """NormalFloat in 4 bits."""

    kind: ClassVar[str] = "nf4"
    bits: ClassVar[int] = 4

    @property
    def top(self):
        return 1.0

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

    @property
    def top(self):
        return 448.0

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

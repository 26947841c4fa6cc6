"""Rows of coefficients in bands of columns, each band with its own number of bits, one scale per row.

The row factor of a token table after a rotation to principal components: leading components carry more energy and earn
more bits (reverse water-filling, Cover & Thomas, §10.3.3). A band's coefficients are divided by the band's typical size
first, which the other factor makes up for, so that one scale per row serves all bands:

    w_ij ≈ scale_i · step(b_j) · level(code_ij)

with the levels of `quantized`, 1 bit meaning ±0.5, and step(b) the spacing that suits a unit Gaussian best. A band of 0
bits is all zeros and stores nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from flaxcompress.formats.base import check_dtype, register
from flaxcompress.formats.rows import Levels, RowFormat, RowSpec
from flaxcompress.ops import on_host, pack, packed_width, unpack

Bands = tuple[tuple[int, int], ...]  # (columns, bits) from left to right

# Spacing of uniform levels with the least squared error on a unit Gaussian, and what error it leaves (Max 1960).
GAUSSIAN_STEP = {0: 1.0, 1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3534, 8: 0.0310}
GAUSSIAN_LOSS = {0: 1.0, 1: 0.3634, 2: 0.1188, 3: 0.0374, 4: 0.0129, 8: 0.0001}
_TOP = {0: 0.0, 1: 0.5, 2: 1.5, 3: 3.5, 4: 7.0, 8: 127.0}
_OFFSET = {1: 0.5, 2: 1.5, 3: 3.5, 4: 8.0, 8: 128.0}


def band_bytes(columns: int, bits: int) -> int:
    """Bytes of one row's codes in one band."""
    return 0 if bits == 0 else packed_width(columns, bits)


def per_column(bands: Bands, table: dict[int, float]) -> np.ndarray:
    """A value per column from a value per number of bits, float32."""
    return np.concatenate([np.full(columns, table[bits], np.float32) for columns, bits in bands])


def column_steps(bands: Bands) -> np.ndarray:
    """step(b_j) of every column."""
    return per_column(bands, GAUSSIAN_STEP)


def column_tops(bands: Bands) -> np.ndarray:
    """The largest level of every column; 0 where nothing is stored."""
    return per_column(bands, _TOP)


def column_shifts(bands: Bands) -> np.ndarray:
    """0.5 where levels are half-integers, 0 where they are integers."""
    return per_column(bands, {0: 0.0, 1: 0.5, 2: 0.5, 3: 0.5, 4: 0.0, 8: 0.0})


@flax.struct.dataclass
class Banded(RowFormat):
    """`values` [rows, bytes] and `scale` [rows, 1] of a table [rows, Σ columns]."""

    values: Any
    scale: Any
    bands: Bands = flax.struct.field(pytree_node=False)
    transposed = False  # tables only

    @classmethod
    def from_levels(cls, levels: Float[Array, "r n"], scale: Float[Array, "r 1"], spec: BandedSpec) -> Banded:
        """Packs levels that a rounding method chose."""
        levels, parts, start = on_host(levels), [], 0
        for columns, bits in spec.bands:
            if bits:
                codes = levels[:, start : start + columns] + _OFFSET[bits]
                parts.append(pack(codes.astype(np.int32), bits))
            start += columns
        values = jnp.concatenate(parts, axis=1)
        return cls(values=values, scale=scale.astype(spec.scale_dtype), bands=spec.bands)

    @property
    def shape(self):
        return (self.values.shape[-2], sum(columns for columns, _ in self.bands))

    def axes(self, rows, columns):
        del columns  # a row's bands lie end to end
        return dataclasses.replace(self, values=PartitionSpec(rows, None), scale=PartitionSpec(rows, None))

    def spec(self):
        return BandedSpec(bands=self.bands, scale_dtype=str(self.scale.dtype))

    def _decode(self, values, scale):
        parts, start = [], 0
        for columns, bits in self.bands:
            if bits == 0:
                parts.append(jnp.zeros((*values.shape[:-1], columns), jnp.float32))
                continue
            size = band_bytes(columns, bits)
            codes = unpack(values[..., start : start + size], bits, columns).astype(jnp.float32)
            parts.append((codes - _OFFSET[bits]) * GAUSSIAN_STEP[bits])
            start += size
        return jnp.concatenate(parts, axis=-1) * scale.astype(jnp.float32)

    def take_rows(self, ids):
        return self._decode(
            jnp.take(self.values, ids, axis=0, mode="clip"), jnp.take(self.scale, ids, axis=0, mode="clip")
        )

    def rows(self):
        return self._decode(self.values, self.scale)

    def chosen(self, ids):
        return dataclasses.replace(self, values=self.values[ids], scale=self.scale[ids])

    def stored_values(self):
        rows = self.values.shape[-2]
        return rows * (1 + sum(columns for columns, bits in self.bands if bits))


@register
@dataclasses.dataclass(frozen=True)
class BandedSpec(RowSpec):
    """The bands, (columns, bits) each, and the scales' dtype."""

    kind: ClassVar[str] = "banded"
    bands: Bands

    def __post_init__(self):
        if not all(isinstance(band, (list, tuple)) and len(band) == 2 for band in self.bands):
            raise ValueError(f"banded format: a band is (columns, bits), got {list(self.bands)!r}")
        bands = tuple((int(c), int(b)) for c, b in self.bands)
        object.__setattr__(self, "bands", bands)
        if not any(bits for _, bits in bands):
            raise ValueError("banded format: at least one band needs bits")
        for columns, bits in bands:
            if columns < 1 or bits not in GAUSSIAN_STEP:
                raise ValueError(
                    f"banded format: a band is (columns >= 1, bits in {sorted(GAUSSIAN_STEP)}), got {(columns, bits)}"
                )
        check_dtype(self.scale_dtype, "banded format: scale_dtype")

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row, its scale included."""
        return sum(band_bytes(c, b) for c, b in self.bands) + (4 if self.scale_dtype == "float32" else 2)

    def to_json(self):
        return {"kind": self.kind, "bands": [list(band) for band in self.bands], "scale_dtype": self.scale_dtype}

    def levels(self, bits):
        del bits
        return Levels(column_steps(self.bands), column_tops(self.bands), column_shifts(self.bands))

    def spread(self, scale, columns):
        del columns
        return scale

    def pack(self, levels, scale, *, transposed):
        del transposed
        return Banded.from_levels(levels, scale, self)

    def init(self, key, shape, initializer, *, table):
        if not table or shape[1] != sum(columns for columns, _ in self.bands):
            raise ValueError(f"banded format: bands {self.bands} do not fit a {shape[0]}×{shape[1]} table")
        dense = initializer(key, shape, jnp.float32)
        scale = jnp.sqrt(jnp.square(dense).mean(1, keepdims=True))
        return Banded.from_levels(band_levels(dense, scale, self.bands), scale, self)


def band_levels(rows: Float[Array, "r n"], scale: Float[Array, "r 1"], bands: Bands) -> Float[Array, "r n"]:
    """The nearest level of every coefficient."""
    unit = jnp.where(scale > 0, rows / jnp.where(scale > 0, scale, 1.0), 0.0) / column_steps(bands)
    shift, top = column_shifts(bands), column_tops(bands)
    return jnp.clip(jnp.round(unit - shift) + shift, -top, top)

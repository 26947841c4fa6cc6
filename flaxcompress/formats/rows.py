"""What formats of rounded rows have in common: levels times scales, and how training rounds to them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress.formats.base import Format, Spec, dot


class RowFormat(Format):
    """A table [V, D] stored row by row, or a kernel [n, m] whose columns are the stored rows (`transposed`)."""

    transposed: bool

    def chosen(self, ids: Any) -> Any:
        """Some of the stored rows, in this format."""
        raise NotImplementedError(f"{type(self).__name__}.chosen")

    def rows(self) -> Float[Array, "r n"]:
        """The stored rows, dequantized."""
        raise NotImplementedError(f"{type(self).__name__}.rows")

    def take_rows(self, ids: Any) -> Float[Array, "*B n"]:
        """Some of the stored rows, without dequantizing the others."""
        raise NotImplementedError(f"{type(self).__name__}.take_rows")

    def stored_axes(self, rows: str | None, columns: str | None) -> tuple[str | None, str | None]:
        """The logical axes of the stored rows, and along them."""
        return (columns, rows) if self.transposed else (rows, columns)

    def select(self, ids, axis):
        if axis != int(self.transposed):
            raise ValueError(f"{type(self).__name__}: stored rows can be selected, not parts of them")
        return self.chosen(ids)

    def matmul(self, x):
        return dot(x, self.rows(), 1 if self.transposed else 0)

    def attend(self, x):
        return dot(x, self.rows(), 0 if self.transposed else 1)

    def take(self, ids):
        return jnp.take(self.rows().T, ids, axis=0, mode="clip") if self.transposed else self.take_rows(ids)

    def materialize(self):
        rows = self.rows()
        return rows.swapaxes(-1, -2) if self.transposed else rows


class TrainingForm(RowFormat):
    """What training changes in a stored format's stead: float rows, `latent`, that compute the same."""

    latent: Any

    @property
    def shape(self):
        rows, columns = self.latent.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    def freeze(self) -> RowFormat:
        """The stored format of the values as they are now."""
        raise NotImplementedError(f"{type(self).__name__}.freeze")


class Levels(NamedTuple):
    """Per column, or for all: the spacing of the levels, the largest level, and 0.5 where levels are half-integers."""

    step: Any
    top: Any
    shift: Any


class Interval(NamedTuple):
    """Between which values lies what rounds to a level, a little inside of both ends."""

    low: Any
    high: Any


@dataclasses.dataclass(frozen=True)
class RowSpec(Spec):
    """What training must know of a format of rounded rows.

    The number of bits travels as a leaf in training, not as structure, so that layers of different bits share a scan:
    `template` is the spec without it, `with_bits` puts it back.

    Attributes:
      scale_dtype: how scales are stored.
    """

    scale_dtype: str = dataclasses.field(default="float16", kw_only=True)

    @property
    def leaf_bits(self) -> int:
        """The number that `with_bits` restores; 0 where the structure says all."""
        return 0

    def template(self) -> RowSpec:
        """The same for all specs that may share a scan in training."""
        return self

    def with_bits(self, bits: int) -> RowSpec:
        """The inverse of `template`."""
        del bits
        return self

    def levels(self, bits: Any) -> Levels:
        """The levels of rows in `bits` bits, which may be traced; where they are not evenly apart, the largest one."""
        raise NotImplementedError(f"{type(self).__name__}.levels")

    def nearest(self, x: Float[Array, "*B n"], bits: Any) -> Float[Array, "*B n"]:
        """The nearest level to x, in units of the levels' spacing, clipped to the range."""
        _, top, shift = self.levels(bits)
        return jnp.clip(jnp.round(x - shift) + shift, -top, top)

    def interval(self, level: Float[Array, "*B n"], bits: Any) -> Interval:
        """What rounds to a level."""
        del bits
        return Interval(level - 0.49, level + 0.49)

    def spread(self, scale: Float[Array, "*B G"], columns: int) -> Float[Array, "*B n"]:
        """One scale per value, or an array that broadcasts to it."""
        raise NotImplementedError(f"{type(self).__name__}.spread")

    def pack(self, levels: Float[Array, "r n"], scale: Float[Array, "r G"], *, transposed: bool) -> RowFormat:
        """The stored form of levels and scales."""
        raise NotImplementedError(f"{type(self).__name__}.pack")

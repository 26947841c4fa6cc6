"""A matrix that is rounded in the forward pass only: what healing trains in place of an integer format.

    y = s·(c + stop_gradient(round(c) - c)),   c = clip(latent/s)

with s = start·exp(log_scale), so that the latent gets the straight-through gradient inside the range and none outside,
and the scale the gradient of learned step sizes (LSQ, Esser et al. 2020, eq. 3). `freeze` returns the integer format
that computes the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress.formats.banded import Banded, BandedSpec, column_shifts, column_steps, column_tops
from flaxcompress.formats.base import Format, dot
from flaxcompress.formats.quantized import BITS, Quantized, spread_scale, top_level


@flax.struct.dataclass
class FakeQuantized(Format):
    """`latent` [rows, n] and `log_scale` [rows, groups], float32; rounds as `target` says, in `bits` bits.

    Scales are trained as the logarithm of their ratio to where they started: one learning rate then suits them all,
    none turns negative, and the start is exact. The number of bits of a quantized target is a leaf, not structure, so
    that layers of different bits still share one scan.
    """

    latent: Any
    log_scale: Any
    start: Any  # the bits of the float32 starting scales as int32: an integer leaf, which training leaves alone
    bits: Any  # uint8 scalar; 0 for a banded target, whose bands say it
    target: Any = flax.struct.field(pytree_node=False)  # BandedSpec, or QuantizedSpec whose own bits do not count
    transposed: bool = flax.struct.field(pytree_node=False)

    @property
    def shape(self):
        rows, columns = self.latent.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    def spec(self):
        if isinstance(self.target, BandedSpec):
            return self.target
        return dataclasses.replace(self.target, bits=int(self.bits))

    def rounding(self):
        """(spacing, top level, shift of the levels) per column."""
        if isinstance(self.target, BandedSpec):
            bands = self.target.bands
            return column_steps(bands), column_tops(bands), column_shifts(bands)
        known = np.asarray(BITS)
        which = (self.bits == known).argmax()
        tops = jnp.asarray([top_level(b) for b in BITS], jnp.float32)
        return np.float32(1.0), tops[which], jnp.where(self.bits < 4, 0.5, 0.0).astype(jnp.float32)

    def spread(self, log_scale, start, columns: int):
        """One scale per value, as stored, with a straight-through gradient past the rounding of the scale itself."""
        scale = _scale(log_scale, start)
        stored = scale.astype(self.target.scale_dtype).astype(jnp.float32)
        stored = scale + jax.lax.stop_gradient(stored - scale)
        if isinstance(self.target, BandedSpec):
            return stored
        return spread_scale(stored, columns, self.target.group)

    def levels(self, latent, spread):
        """The clipped, unrounded levels and the rounded ones."""
        step, top, shift = self.rounding()
        unit = jnp.where(spread > 0, latent / jnp.where(spread > 0, spread, 1.0), 0.0) / step
        inside = jnp.clip(unit, -top, top)
        return inside, jnp.clip(jnp.round(inside - shift) + shift, -top, top)

    def _decode(self, latent, log_scale, start):
        spread = self.spread(log_scale, start, latent.shape[-1])
        inside, level = self.levels(latent, spread)
        return (inside + jax.lax.stop_gradient(level - inside)) * self.rounding()[0] * spread

    def rows(self):
        """The rounded rows."""
        return self._decode(self.latent, self.log_scale, self.start)

    def matmul(self, x):
        return dot(x, self.rows(), 1 if self.transposed else 0)

    def attend(self, x):
        return dot(x, self.rows(), 0 if self.transposed else 1)

    def take(self, ids):
        if self.transposed:
            return jnp.take(self.rows().T, ids, axis=0, mode="clip")
        parts = (self.latent, self.log_scale, self.start)
        return self._decode(*(jnp.take(part, ids, axis=0, mode="clip") for part in parts))

    def materialize(self):
        rows = self.rows()
        return rows.swapaxes(-1, -2) if self.transposed else rows

    def freeze(self) -> Quantized | Banded:
        """The integer format of the same values."""
        level, scale = _frozen(self)
        spec = self.spec()
        if isinstance(spec, BandedSpec):
            return Banded.from_levels(level, scale, spec)
        return Quantized.from_levels(level, scale, spec, table=not self.transposed)


def _scale(log_scale, start):
    return jax.lax.bitcast_convert_type(start, jnp.float32) * jnp.exp(log_scale)


@jax.jit
def _frozen(node: FakeQuantized):
    spread = node.spread(node.log_scale, node.start, node.latent.shape[-1])
    return node.levels(node.latent, spread)[1], _scale(node.log_scale, node.start)


@jax.jit
def thaw(node: Quantized | Banded, latent: Any = None) -> FakeQuantized:
    """The trainable form of a quantized or banded matrix: its forward pass computes exactly what `node` does.

    Args:
      latent: rows [r, n] of the unrounded weights. Each is moved into its level's rounding interval, so that nothing
        changes at first but a weight near a boundary stays near it. None puts latents on the levels themselves.
    """
    spec = node.spec()
    scale = node.scale.astype(jnp.float32)
    rows = node.rows() if isinstance(node, Quantized) else node.materialize()
    out = FakeQuantized(
        latent=rows,
        log_scale=jnp.zeros_like(scale),
        start=jax.lax.bitcast_convert_type(scale, jnp.int32),
        bits=jnp.uint8(node.bits if isinstance(node, Quantized) else 0),
        target=dataclasses.replace(spec, bits=BITS[-1]) if isinstance(node, Quantized) else spec,
        transposed=isinstance(node, Quantized) and node.transposed,
    )
    if latent is None:
        return out
    reach = 0.49 * out.rounding()[0] * out.spread(out.log_scale, out.start, rows.shape[-1])
    moved = rows + jnp.clip(latent.astype(jnp.float32) - rows, -reach, reach)
    return out.replace(latent=moved)  # pyright: ignore[reportAttributeAccessIssue]

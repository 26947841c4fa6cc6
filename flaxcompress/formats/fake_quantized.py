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
from jax.sharding import PartitionSpec

from flaxcompress.formats.rows import RowFormat, RowSpec, TrainingForm


@flax.struct.dataclass
class FakeQuantized(TrainingForm):
    """`latent` [rows, n] and `log_scale` [rows, groups], float32; rounds as `target` says, in `bits` bits.

    Scales are trained as the logarithm of their ratio to where they started: one learning rate then suits them all,
    none turns negative, and the start is exact. The number of bits of a quantized target is a leaf, not structure, so
    that layers of different bits still share one scan.
    """

    latent: Any
    log_scale: Any
    start: Any  # the bits of the float32 starting scales as int32: an integer leaf, which training leaves alone
    bits: Any  # uint8 scalar, see `RowSpec`
    target: RowSpec = flax.struct.field(pytree_node=False)  # a template
    transposed: bool = flax.struct.field(pytree_node=False)

    def axes(self, rows, columns):
        stored, along = self.stored_axes(rows, columns)
        scales = PartitionSpec(stored, None)
        return dataclasses.replace(
            self, latent=PartitionSpec(stored, along), log_scale=scales, start=scales, bits=PartitionSpec()
        )

    def spec(self):
        return self.target.with_bits(int(self.bits))

    def spread(self, log_scale, start, columns: int):
        """One scale per value, as stored, with a straight-through gradient past the rounding of the scale itself."""
        scale = _scale(log_scale, start)
        stored = scale.astype(self.target.scale_dtype).astype(jnp.float32)
        return self.target.spread(scale + jax.lax.stop_gradient(stored - scale), columns)

    def rounded(self, latent, spread):
        """The clipped, unrounded levels and the rounded ones."""
        step, top, _ = self.target.levels(self.bits)
        unit = jnp.where(spread > 0, latent / jnp.where(spread > 0, spread, 1.0), 0.0) / step
        inside = jnp.clip(unit, -top, top)
        return inside, self.target.nearest(inside, self.bits)

    def _decode(self, latent, log_scale, start):
        spread = self.spread(log_scale, start, latent.shape[-1])
        inside, level = self.rounded(latent, spread)
        step = self.target.levels(self.bits).step
        return (inside + jax.lax.stop_gradient(level - inside)) * step * spread

    def rows(self):
        return self._decode(self.latent, self.log_scale, self.start)

    def take_rows(self, ids):
        parts = (self.latent, self.log_scale, self.start)
        return self._decode(*(jnp.take(part, ids, axis=0, mode="clip") for part in parts))

    def freeze(self) -> RowFormat:
        """The integer format of the same values."""
        level, scale = _frozen(self)
        return self.spec().pack(level, scale, transposed=self.transposed)


def _scale(log_scale, start):
    return jax.lax.bitcast_convert_type(start, jnp.float32) * jnp.exp(log_scale)


@jax.jit
def _frozen(node: FakeQuantized):
    spread = node.spread(node.log_scale, node.start, node.latent.shape[-1])
    return node.rounded(node.latent, spread)[1], _scale(node.log_scale, node.start)


@jax.jit
def thaw(node: RowFormat, latent: Any = None) -> FakeQuantized:
    """The trainable form of a matrix in a format of rounded rows: its forward pass computes exactly what `node` does.

    Args:
      latent: rows [r, n] of the unrounded weights. Each is moved into its level's rounding interval, so that nothing
        changes at first but a weight near a boundary stays near it. None puts latents on the levels themselves.
    """
    spec, rows = node.spec(), node.rows()
    assert isinstance(spec, RowSpec)
    scale = node.scale.astype(jnp.float32)  # pyright: ignore[reportAttributeAccessIssue]
    out = FakeQuantized(
        latent=rows,
        log_scale=jnp.zeros_like(scale),
        start=jax.lax.bitcast_convert_type(scale, jnp.int32),
        bits=jnp.uint8(spec.leaf_bits),
        target=spec.template(),
        transposed=node.transposed,
    )
    if latent is None:
        return out
    spread = out.spread(out.log_scale, out.start, rows.shape[-1])
    unit = spec.levels(spec.leaf_bits).step * spread
    _, level = out.rounded(rows, spread)
    low, high = (unit * end for end in spec.interval(level, spec.leaf_bits))
    moved = jnp.clip(latent.astype(jnp.float32), low, high)
    return out.replace(latent=moved)  # pyright: ignore[reportAttributeAccessIssue]

"""A matrix that is rounded in the forward pass only: what healing trains in place of an integer format.

    y = s·(c + stop_gradient(round(c) - c)),   c = clip(latent/s)

with s = exp(log_scale), so that the latent gets the straight-through gradient inside the range and none outside, and the scale the gradient of
learned step sizes (LSQ, Esser et al. 2020, eq. 3). `freeze` returns the integer format that computes the same.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress.formats.banded import Banded, BandedSpec, column_shifts, column_steps, column_tops
from flaxcompress.formats.base import Format, dot
from flaxcompress.formats.quantized import Quantized, spread_scale, top_level


@flax.struct.dataclass
class FakeQuantized(Format):
    """`latent` [rows, n] and `log_scale` [rows, groups], float32; rounds as `target` says.

    Scales are trained in the logarithm: one learning rate then suits them all, and none turns negative.
    """

    latent: Any
    log_scale: Any
    target: Any = flax.struct.field(pytree_node=False)  # QuantizedSpec or BandedSpec
    transposed: bool = flax.struct.field(pytree_node=False)

    @property
    def shape(self):
        rows, columns = self.latent.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    def spec(self):
        return self.target

    def _rounding(self, columns: int):
        """(spacing, top level, shift of the levels) per column."""
        if isinstance(self.target, BandedSpec):
            bands = self.target.bands
            return column_steps(bands), column_tops(bands), column_shifts(bands)
        bits = self.target.bits
        return np.float32(1.0), np.float32(top_level(bits)), np.float32(0.0 if bits >= 4 else 0.5)

    def _spread(self, log_scale, columns: int):
        scale = jnp.exp(log_scale)
        stored = jnp.where(scale < 1e-29, 0.0, scale).astype(self.target.scale_dtype).astype(jnp.float32)
        stored = scale + jax.lax.stop_gradient(stored - scale)
        if isinstance(self.target, BandedSpec):
            return stored
        return spread_scale(stored, columns, self.target.group)

    def _levels(self, latent, spread):
        step, top, shift = self._rounding(latent.shape[-1])
        unit = jnp.where(spread > 0, latent / jnp.where(spread > 0, spread, 1.0), 0.0) / step
        inside = jnp.clip(unit, -top, top)
        level = jnp.clip(jnp.round(inside - shift) + shift, -top, top)
        return inside, level, step

    def _decode(self, latent, log_scale):
        spread = self._spread(log_scale, latent.shape[-1])
        inside, level, step = self._levels(latent, spread)
        return (inside + jax.lax.stop_gradient(level - inside)) * step * spread

    def rows(self):
        """The rounded rows."""
        return self._decode(self.latent, self.log_scale)

    def matmul(self, x):
        return dot(x, self.rows(), 1 if self.transposed else 0)

    def attend(self, x):
        return dot(x, self.rows(), 0 if self.transposed else 1)

    def take(self, ids):
        if self.transposed:
            return jnp.take(self.rows().T, ids, axis=0, mode="clip")
        return self._decode(
            jnp.take(self.latent, ids, axis=0, mode="clip"), jnp.take(self.log_scale, ids, axis=0, mode="clip")
        )

    def materialize(self):
        rows = self.rows()
        return rows.swapaxes(-1, -2) if self.transposed else rows

    def freeze(self) -> Quantized | Banded:
        """The integer format of the same values."""
        _, level, _ = self._levels(self.latent, self._spread(self.log_scale, self.latent.shape[-1]))
        scale = jnp.where(self.log_scale < -66.0, 0.0, jnp.exp(self.log_scale))
        if isinstance(self.target, BandedSpec):
            return Banded.from_levels(level, scale, self.target)
        return Quantized.from_levels(level, scale, self.target, table=not self.transposed)


def thaw(node: Any, latent: Any = None) -> FakeQuantized:
    """The trainable form of a quantized or banded matrix: its forward pass computes exactly what `node` does.

    Args:
      latent: rows [r, n] of the unrounded weights. Each is moved into its level's rounding interval, so that nothing
        changes at first but a weight near a boundary stays near it. None puts latents on the levels themselves.
    """
    assert isinstance(node, (Quantized, Banded))
    spec = node.spec()
    log_scale = jnp.log(jnp.maximum(node.scale.astype(jnp.float32), 1e-30))  # 0 stays 0 in the stored dtype
    rows = node.rows() if isinstance(node, Quantized) else node.materialize()
    transposed = isinstance(node, Quantized) and node.transposed
    out = FakeQuantized(latent=rows, log_scale=log_scale, target=spec, transposed=transposed)
    if latent is None:
        return out
    spread = out._spread(log_scale, rows.shape[-1])
    step, _, _ = out._rounding(rows.shape[-1])
    reach = 0.49 * step * spread
    moved = rows + jnp.clip(jnp.asarray(latent, jnp.float32) - rows, -reach, reach)
    return out.replace(latent=moved)  # pyright: ignore[reportAttributeAccessIssue]

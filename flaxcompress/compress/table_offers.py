"""What the token table may take, and what it is predicted to cost with so many bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from flaxcompress import linalg
from flaxcompress.compress.factorize_embedding import metric_root
from flaxcompress.compress.kernel_offers import Offer
from flaxcompress.compress.tiers import Layout, choose_layout, smallest_layout
from flaxcompress.formats import QuantizedSpec
from flaxcompress.formats.banded import GAUSSIAN_LOSS, per_column

MAX_TIERS = 8
_BITS = (0.4, 0.55, 0.75, 1.0, 1.4, 1.9, 2.6, 3.6, 5.0, 7.0)  # average bits at which a layout is searched
_STEPS = 64  # offers between them, by interpolation


@dataclasses.dataclass(frozen=True)
class TableCurve:
    """Predicted losses of a table by bytes.

    Attributes:
      bytes: from the smallest layout on.
      losses: of tiers of banded coefficients in so many bytes.
      whole: (bytes, loss) of the whole table in 8 bits.
    """

    bytes: Float[np.ndarray, " k"]
    losses: Float[np.ndarray, " k"]
    whole: tuple[int, float]

    def loss(self, size: float) -> float:
        """Of a table in `size` bytes; between two layouts it falls exponentially."""
        return float(np.exp(np.interp(size, self.bytes, np.log(self.losses))))

    def offers(self) -> list[Offer]:
        """Sizes from the smallest to the table in 8 bits."""
        sizes = np.unique(np.geomspace(self.bytes[0], self.bytes[-1], _STEPS).astype(int))
        found = [
            Offer("table", None, None, None, int(size), 0, self.loss(float(size)))
            for size in sizes
            if size < self.whole[0]
        ]
        return [*found, Offer("bits", 8, None, None, self.whole[0], 0, min(self.whole[1], found[-1].loss / 2))]


def table_curve(
    table: Float[np.ndarray, "V D"],
    weights: Float[np.ndarray, " V"],
    metric: Float[np.ndarray, "D D"],
    tokens: float,
) -> TableCurve:
    """The curve of a token table.

    An error e in a token's row costs about ½·e·G·eᵀ each time that the token is read, and it is read `tokens` times the
    token's weight.

    Args:
      weights: of the rows, summing to one (see `tiers.token_weights`).
      metric: G = E[gᵀg] of token vectors (see `Calibration.token_gradient_moment`).
      tokens: per answer.
    """
    vocabulary, width = table.shape
    root, _ = metric_root(metric, width)
    sizes = layout_sizes(vocabulary, width)
    scale = 0.5 * tokens * float(np.trace(metric)) / width  # `metric_root` makes the mean eigenvalue 1
    coefficients = linalg.row_weighted_svd(table @ root.astype(table.dtype), width, weights).left
    losses = [
        scale * layout_loss(coefficients, weights, choose_layout(coefficients, weights, size, max_tiers=MAX_TIERS))
        for size in sizes
    ]
    energy = float((weights[:, None] * np.square(coefficients, dtype=np.float64)).sum())
    whole = whole_bytes(vocabulary, width), scale * energy * GAUSSIAN_LOSS[8]
    floor = 1e-12 * max(losses)
    falling = np.minimum.accumulate(np.maximum(losses, floor))
    return TableCurve(np.asarray(sizes, np.float64), falling, whole)


def layout_sizes(vocabulary: int, width: int) -> list[int]:
    """Bytes at which a table's layout is searched, from the smallest layout on."""
    least = smallest_layout(vocabulary, width, MAX_TIERS)
    return [least, *(size for bits in _BITS if (size := int(vocabulary * width * bits / 8)) > 1.05 * least)]


def whole_bytes(vocabulary: int, width: int) -> int:
    """Bytes of a table in 8 bits."""
    return vocabulary * QuantizedSpec(bits=8).row_bytes(width)


def layout_loss(
    coefficients: Float[np.ndarray, "V D"], weights: Float[np.ndarray, " V"], layouts: Sequence[Layout]
) -> float:
    """The weighted squared error that a layout is predicted to leave: Σ_v w_v Σ_j δ(bits_vj) z_vj²."""
    order = np.argsort(-weights, kind="stable")
    total, start = 0.0, 0
    for layout in layouts:
        rows = order[start : start + layout.rows]
        start += layout.rows
        left = per_column(layout.bands, GAUSSIAN_LOSS)
        total += float((weights[rows] @ np.square(coefficients[rows], dtype=np.float64)) @ left)
    return total

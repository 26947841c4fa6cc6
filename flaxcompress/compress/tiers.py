"""How a token table is cut into tiers: which rows get how much rank and how many bits.

The criterion needs no model run. In a basis that diagonalises the metric, coefficients z stored in b bits lose δ_b·Σz²,
where δ_b is what rounding a Gaussian to b bits leaves and δ_0 = 1. Rows are ordered by weight and columns by energy; a
tier is a stretch of rows, a band a stretch of columns. For a price λ per byte every (tier, band) takes its cheapest
bits, dynamic programming finds the best cut into tiers, and bisection the λ at which the table fits: reverse
water-filling in both directions.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from jaxtyping import Float

from flaxcompress.formats import QuantizedSpec
from flaxcompress.formats.banded import GAUSSIAN_LOSS, Bands, band_bytes
from flaxcompress.formats.bucketed import assignment_bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class TierSetting:
    """One tier: how many rows (None: all that are left), their rank, and bits of the row factor (None: float32)."""

    rows: int | None = None
    rank: int
    bits: int | None = None


def zipf_prior(start: int, vocabulary: int) -> Float[np.ndarray, " V"]:
    """1/(rank + 10) for ids from `start` on, summing to one: vocabularies are ordered by frequency (Zipf 1949)."""
    prior = np.zeros(vocabulary)
    prior[start:] = 1.0 / (np.arange(vocabulary - start) + 10.0)
    return prior / max(prior.sum(), 1e-30)


def token_weights(
    counts: Float[np.ndarray, " V"], *, start: int, prior: str = "zipf", power: float = 0.5
) -> Float[np.ndarray, " V"]:
    """The weight of each row in the table's error, summing to one.

    Args:
      counts: occurrences in the calibration text.
      start: the first id of an ordinary token; what stands before are special and unused entries, which get next to no
        weight unless the text holds them.
      prior: "zipf" adds the expected frequency by id, as much in total as the counts; "uniform" the same for all.
      power: tempers the frequencies. Below 1, rare tokens gain: text of another domain uses other words.
    """
    if prior not in ("zipf", "uniform"):
        raise ValueError(f"prior {prior!r}; known: uniform, zipf")
    counts = np.asarray(counts, np.float64)
    expected = zipf_prior(start, len(counts)) if prior == "zipf" else np.full(len(counts), 1.0 / len(counts))
    frequency = counts / max(counts.sum(), 1.0) + expected
    weights = np.maximum(frequency, 1e-9) ** power
    special = np.arange(len(counts)) < start
    if start < len(counts):
        weights[special & (counts == 0)] = 1e-2 * weights[start:].min()
    weights[special & (counts > 0)] = weights.max()
    return weights / weights.sum()


def left_spec(bits: int | None) -> QuantizedSpec | None:
    """The row factor's format: one scale per row, which a rotation of the rank makes as good as small groups."""
    return None if bits is None else QuantizedSpec(bits=bits, group=None)


def row_bytes(rank: int, bits: int | None) -> int:
    """Bytes of one row's factor."""
    spec = left_spec(bits)
    return 4 * rank if spec is None else spec.row_bytes(rank)


def basis_bytes(rank: int, width: int, bits: int | None) -> int:
    """Bytes of a tier's [rank, width] factor: 8 bits with a scale per column, or float32."""
    return 4 * rank * width if bits is None else (rank + 2) * width


@dataclasses.dataclass(frozen=True)
class Layout:
    """A tier of the searched kind: its rows and its bands, the same columns in every tier."""

    rows: int
    bands: Bands


def band_width(width: int) -> int:
    """Columns per band: 24, or fewer for narrow tables; always a multiple of 8, so that no packed byte is wasted."""
    return 24 if width >= 192 else 8


def smallest_layout(vocabulary: int, width: int, max_tiers: int) -> int:
    """Bytes below which `choose_layout` finds nothing: one bit in the first band of every row, and the whole basis."""
    row = band_bytes(min(band_width(width), width), 1) + 2
    return vocabulary * row + fixed_bytes(vocabulary, width, max_tiers)


def fixed_bytes(vocabulary: int, width: int, max_tiers: int, *, used: int | None = None) -> int:
    """Bytes of the packed assignment and of the 8-bit basis of `used` components (None: of all)."""
    return (vocabulary * assignment_bits(max_tiers) + 7) // 8 + basis_bytes(used or width, width, 8)


def columns_used(bands: Bands) -> int:
    """Columns up to the last band that stores anything."""
    ends = np.cumsum([columns for columns, _ in bands])
    return int(max(end for end, (_, bits) in zip(ends, bands, strict=True) if bits))


def choose_layout(
    coefficients: Float[np.ndarray, "V D"],
    weights: Float[np.ndarray, " V"],
    target_bytes: int,
    *,
    max_tiers: int = 8,
    bits: tuple[int, ...] = (0, 1, 2, 3, 4, 8),
    steps: int = 32,
) -> list[Layout]:
    """The tiers and bands of least weighted error that fit `target_bytes`, heaviest rows first.

    Args:
      coefficients: of every row in the metric's basis, leading components first.
      weights: each row's weight.

    Raises ValueError when even the smallest layout is larger, naming its size.
    """
    vocabulary, width = coefficients.shape
    order = np.argsort(-weights, kind="stable")
    edges = np.unique(np.round(np.geomspace(min(100, vocabulary), vocabulary, steps)).astype(int))
    edges = np.concatenate([[0], edges])
    last = len(edges) - 1
    starts = np.arange(0, width, band_width(width))
    columns = np.diff(np.append(starts, width))
    ends = np.append(starts[1:], width)
    bands = np.stack(
        [np.square(coefficients[:, a:b], dtype=np.float64).sum(1) for a, b in zip(starts, ends, strict=True)], axis=1
    )
    blocks = np.add.reduceat((weights[:, None] * bands)[order], edges[:-1], axis=0)
    sums = np.concatenate([np.zeros((1, len(columns))), np.cumsum(blocks, 0)])
    first, end = np.triu_indices(len(edges), 1)
    energy = sums[end] - sums[first]  # [stretches, bands]
    rows = edges[end] - edges[first]
    size = np.array([[band_bytes(int(c), b) for b in bits] for c in columns])  # [bands, bits]
    loss = energy[:, :, None] * np.array([GAUSSIAN_LOSS[b] for b in bits])
    bytes_ = rows[:, None, None] * size

    def plan(price: float, kept: int) -> tuple[int, list[Layout]]:
        """Bytes and layout at a price per byte, from the first `kept` bands."""
        choice = (loss + price * bytes_).argmin(-1)  # [stretches, bands]
        choice[:, kept:] = bits.index(0)
        choice[:, 0] = np.maximum(choice[:, 0], 1)  # every row stores something
        pick = choice[:, :, None]
        cost = np.take_along_axis(loss, pick, 2).sum((1, 2))
        stored = np.take_along_axis(bytes_, pick, 2).sum((1, 2)) + 2 * rows
        value = np.full((len(edges), len(edges)), np.inf)
        value[first, end] = cost + price * stored
        best = np.full(len(edges), np.inf)
        best[0] = 0.0
        came = []
        complete: tuple[float, list[int]] = (np.inf, [])
        for _ in range(max_tiers):
            total = best[:, None] + value
            came.append(total.argmin(0))
            best = total.min(0)
            if best[last] < complete[0]:
                path, at = [last], last
                for previous in reversed(came):
                    at = int(previous[at])
                    path.append(at)
                complete = (float(best[last]), path[::-1])
        index = {(int(i), int(j)): n for n, (i, j) in enumerate(zip(first, end, strict=True))}
        spans = [index[span] for span in itertools.pairwise(complete[1])]
        layouts = [
            Layout(int(rows[n]), tuple((int(c), bits[k]) for c, k in zip(columns, choice[n], strict=True)))
            for n in spans
        ]
        return int(sum(stored[n] for n in spans)), layouts

    needed = smallest_layout(vocabulary, width, max_tiers)
    if target_bytes < needed:
        raise ValueError(
            f"{target_bytes} bytes are too few for a {vocabulary}×{width} table; the smallest takes {needed}"
        )

    def search(kept: int) -> list[Layout]:
        budget = target_bytes - fixed_bytes(vocabulary, width, max_tiers, used=int(ends[kept - 1]))
        _, fitting = plan(1e6, kept)
        low, high = -80.0, 20.0
        for _ in range(30):
            middle = (low + high) / 2
            stored, layouts = plan(2.0**middle, kept)
            if stored > budget:
                low = middle
            else:
                high, fitting = middle, layouts
        return fitting

    kept, fitting = len(columns), search(len(columns))
    # Components that no row stores need no place in the basis: their bytes go to the rows.
    while (used := int(np.searchsorted(ends, max(columns_used(t.bands) for t in fitting))) + 1) < kept:
        kept, fitting = used, search(used)
    return fitting

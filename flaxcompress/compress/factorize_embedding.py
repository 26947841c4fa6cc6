"""The token table in low rank: row-weighted, in tiers by token weight, with quantized factors."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress import linalg, tree
from flaxcompress.compress.quantize import compress_matrix as quantize_matrix
from flaxcompress.compress.rounding import round_banded
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.compress.tiers import (
    TierSetting,
    basis_bytes,
    choose_layout,
    columns_used,
    left_spec,
    row_bytes,
    smallest_layout,
    token_weights,
)
from flaxcompress.compress.uncompressed import check_uncompressed
from flaxcompress.config import ModelConfig
from flaxcompress.evaluate.profile import has_tied_output
from flaxcompress.formats import (
    Banded,
    BandedSpec,
    Bucketed,
    BucketedSpec,
    DenseSpec,
    LowRank,
    LowRankSpec,
    QuantizedSpec,
    Tier,
    materialize,
    rank_for,
)
from flaxcompress.formats.banded import Bands
from flaxcompress.formats.bucketed import MAX_TIERS
from flaxcompress.model import Model, abstract_flat, replace_matrices
from flaxcompress.text import first_ordinary_token

TOKEN = "embedding/token"
_SIZES = ("rank", "keep", "tiers", "target_bytes", "average_bits")


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class FactorizeEmbedding(Step):
    """Approximates the token table by low-rank factors. A head tied to the table stays tied: it reads the same factors.

    Give exactly one of:
      rank: R for all rows, or
      keep: the fraction of the table's parameters that the factors may hold, or
      tiers: rows, rank and bits of each tier, heaviest tokens first, or
      target_bytes, or
      average_bits (bits per value of the dense table): finds up to `max_tiers` tiers of banded coefficients by itself
        (see `tiers.choose_layout`).

    Attributes:
      weighting: how an error in a row counts. "frequency": by the token's weight, from the calibration text and the
        prior; "fisher": so, and in the metric of the sentence vector's gradient; "head": so, and in that of the vectors
        that a head tied to the table multiplies, SVD(diag(√f)·E·C^½); "none": the plain truncated SVD.
      prior: "zipf" (ids ordered by frequency, as in BERT's vocabulary) or "uniform".
      power: tempers token weights; 0.5 serves text of other domains better than 1, measured in the experiments.
      allow_larger: accept a rank at which the factors are larger than the table.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokens", "gradient_moments"})

    rank: int | None = None
    keep: float | None = None
    tiers: tuple[TierSetting, ...] | None = None
    target_bytes: int | None = None
    average_bits: float | None = None
    max_tiers: int = 8
    weighting: Literal["frequency", "none", "fisher", "head"] = "frequency"
    prior: Literal["zipf", "uniform"] = "zipf"
    power: float = 0.5
    allow_larger: bool = False

    def __post_init__(self):
        given = [n for n in _SIZES if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"FactorizeEmbedding: give one of {', '.join(_SIZES)}; got {', '.join(given) or 'none'}")
        if not 1 <= self.max_tiers <= MAX_TIERS:
            raise ValueError(f"FactorizeEmbedding: max_tiers {self.max_tiers} is not in 1 … {MAX_TIERS}")
        if not 0 < self.power <= 2:
            raise ValueError(f"FactorizeEmbedding: power {self.power} must lie in (0, 2]")

    def _budget(self, shape: tuple[int, int]) -> int | None:
        """Bytes of the searched layout, or None when the layout is given."""
        if self.average_bits is not None:
            return int(shape[0] * shape[1] * self.average_bits / 8)
        return self.target_bytes

    def _settings(self, shape: tuple[int, int]) -> list[TierSetting]:
        """The tiers with all rows filled in; for a searched layout, one tier that takes its bytes."""
        vocabulary, width = shape
        if (budget := self._budget(shape)) is not None:
            return [planned_tier(budget, vocabulary, width, self.max_tiers)]
        if self.tiers is None:
            return [TierSetting(rows=vocabulary, rank=rank_for(shape, self.rank, self.keep, self.allow_larger, TOKEN))]
        known = sum(t.rows or 0 for t in self.tiers)
        open_tiers = [t for t in self.tiers if t.rows is None]
        if len(open_tiers) > 1 or known > vocabulary or (not open_tiers and known != vocabulary):
            raise ValueError(
                f"{TOKEN}: tiers of {[t.rows for t in self.tiers]} rows do not fit a table of {vocabulary}; leave the "
                "rows of one tier out to give it the rest"
            )
        settings = [dataclasses.replace(t, rows=t.rows or vocabulary - known) for t in self.tiers]
        for t in settings:
            limit = min(t.rows or 0, width)
            if not 1 <= t.rank <= limit:
                raise ValueError(f"{TOKEN}: a tier's rank {t.rank} is not in 1 … {limit} for its {t.rows}×{width} rows")
        return settings

    def _spec(self, settings: list[TierSetting]) -> dict[str, Any]:
        formats = []
        for t in settings:
            left = left_spec(t.bits) or DenseSpec()
            right = DenseSpec() if t.bits is None else QuantizedSpec(bits=8)
            formats.append(LowRankSpec(rank=t.rank, left=left, right=right))
        if len(settings) == 1:
            return formats[0].to_json()
        tiers = tuple(Tier(rows=t.rows or 0, format=f) for t, f in zip(settings, formats, strict=True))
        return BucketedSpec(tiers=tiers).to_json()

    def plan(self, config: ModelConfig) -> ModelConfig:
        check_uncompressed(abstract_flat(config), [TOKEN], self.name)
        if self.weighting == "head" and (config.decoder is not None or not has_tied_output(config)):
            raise ValueError(
                "FactorizeEmbedding: weighting: head needs a head that is tied to the token table, in a model without "
                f"a decoder; this one's is {config.head!r}"
            )
        return config.with_format(TOKEN, self._spec(self._settings((config.vocabulary, config.table_width))))

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        table = np.asarray(materialize(tree.View(model.params)[TOKEN]))
        metric = None
        weights = np.full(len(table), 1.0 / len(table))
        if self.weighting != "none" or self._budget((1, 1)) is not None or len(self.tiers or ()) > 1:
            counts = context.need(self).token_counts
            start = first_ordinary_token(model.assets)
            weights = token_weights(counts, start=start, prior=self.prior, power=self.power)
        if self.weighting == "fisher":
            metric = context.need(self).token_gradient_moment(model)
        elif self.weighting == "head":
            metric = context.need(self).head_moment(model)
        basis = metric_root(metric, table.shape[1])
        if (budget := self._budget((table.shape[0], table.shape[1]))) is not None:
            node, spectrum = banded_table(table, weights, basis, budget, self.max_tiers, key)
            context.keep_spectrum(TOKEN, spectrum, node.rank)
            return replace_matrices(model, {TOKEN: node})
        settings = self._settings((table.shape[0], table.shape[1]))
        order = np.argsort(-weights, kind="stable")
        tier_of_row = np.zeros(len(table), np.uint8)
        nodes, start = [], 0
        for number, setting in enumerate(settings):
            end = start + (setting.rows or 0)
            tier_of_row[order[start:end]] = number
            rows = np.flatnonzero(tier_of_row == number) if number else np.sort(order[:end])
            row_weights = None if self.weighting == "none" else weights[rows]
            tier_key = jax.random.fold_in(key, number)
            node, spectrum = tier_matrix(table[rows], setting, row_weights, basis, tier_key)
            name = TOKEN if len(settings) == 1 else f"{TOKEN} tier {number}"
            context.keep_spectrum(name, spectrum, setting.rank)
            nodes.append(node)
            start = end
        new = nodes[0] if len(nodes) == 1 else Bucketed.from_tiers(tuple(nodes), tier_of_row)
        return replace_matrices(model, {TOKEN: new})


def planned_tier(target_bytes: int, vocabulary: int, width: int, max_tiers: int) -> TierSetting:
    """One tier that takes at least what a searched layout within `target_bytes` may take, and hardly more.

    Raises ValueError when no layout is that small.
    """
    needed = smallest_layout(vocabulary, width, max_tiers)
    if target_bytes < needed:
        raise ValueError(
            f"{TOKEN}: {target_bytes} bytes are too few for a {vocabulary}×{width} table; the smallest takes {needed}"
        )
    candidates = [
        (vocabulary * row_bytes(rank, bits) + basis_bytes(rank, width, bits), rank, bits)
        for rank in range(1, min(vocabulary, width) + 1)
        for bits in (2, 3, 4, 8)
    ]
    enough = [c for c in candidates if c[0] >= target_bytes]
    _, rank, bits = min(enough) if enough else max(candidates)
    return TierSetting(rows=vocabulary, rank=rank, bits=bits)


def banded_table(
    table: np.ndarray,
    weights: np.ndarray,
    basis: tuple[np.ndarray, np.ndarray],
    target_bytes: int,
    max_tiers: int,
    key: jax.Array,
) -> tuple[LowRank, np.ndarray]:
    """The table as tiers of banded coefficients times one 8-bit basis, within `target_bytes`, and its spectrum.

    Inside a band the components are mixed by a random rotation, so that their energies are alike.
    """
    root, inverse = basis
    width = table.shape[1]
    factors = linalg.row_weighted_svd(table @ root.astype(table.dtype), width, weights)
    left, right = factors.left, factors.right @ inverse  # `left` is changed in place below: it is as large as the table
    layouts = choose_layout(left, weights, target_bytes, max_tiers=max_tiers)
    used = max(columns_used(layout.bands) for layout in layouts)
    columns = [c for c, _ in layouts[0].bands]
    for number, (start, end) in enumerate(itertools.pairwise(np.cumsum([0, *columns]))):
        band_key = jax.random.fold_in(key, number)
        normal = np.asarray(jax.random.normal(band_key, (end - start, end - start)), np.float64)
        rotation = np.linalg.qr(normal)[0]
        size = np.sqrt((weights[:, None] * left[:, start:end] ** 2).sum() / (end - start))
        left[:, start:end] = left[:, start:end] @ (rotation / size).astype(left.dtype)
        right[start:end] = rotation.T @ right[start:end] * size
    sizes = np.linalg.norm(right @ root, axis=1)  # what an error in each coefficient costs
    order = np.argsort(-weights, kind="stable")
    tier_of_row = np.zeros(len(table), np.uint8)
    start, nodes = 0, []
    for number, layout in enumerate(layouts):
        tier_of_row[order[start : start + layout.rows]] = number
        start += layout.rows
    kept = [cut_bands(layout.bands, used) for layout in layouts]
    for number, bands in enumerate(kept):
        rows = left[tier_of_row == number][:, :used]
        spec = BandedSpec(bands=bands)
        levels, scale = round_banded(jnp.asarray(rows, jnp.float32), jnp.asarray(sizes[:used] ** 2, jnp.float32), spec)
        nodes.append(Banded.from_levels(levels, scale, spec))
    inner = nodes[0] if len(nodes) == 1 else Bucketed.from_tiers(tuple(nodes), tier_of_row)
    outer = quantize_matrix(right[:used], QuantizedSpec(bits=8), table=False)
    return LowRank(left=inner, right=outer), factors.spectrum


def cut_bands(bands: Bands, used: int) -> Bands:
    """The bands over the first `used` columns, neighbours of equal bits joined."""
    out: list[tuple[int, int]] = []
    total = 0
    for columns, bits in bands:
        if total >= used:
            break
        if out and out[-1][1] == bits:
            out[-1] = (out[-1][0] + columns, bits)
        else:
            out.append((columns, bits))
        total += columns
    return tuple(out)


def tier_matrix(
    table: np.ndarray,
    setting: TierSetting,
    weights: np.ndarray | None,
    basis: tuple[np.ndarray, np.ndarray],
    key: jax.Array,
) -> tuple[LowRank, np.ndarray]:
    """One tier's factors and its spectrum.

    With bits, the rank is rotated by a random orthogonal matrix first, left·Q·Qᵀ·right: each row's coefficients then
    have about equal variance and one scale per row serves them all (as in QuaRot, Ashkboos et al. 2024).
    """
    root, inverse = basis
    factors = linalg.row_weighted_svd(table.astype(np.float64) @ root, setting.rank, weights)
    left, right = factors.left, factors.right @ inverse
    if setting.bits is None:
        return LowRank(left=jnp.asarray(left, jnp.float32), right=jnp.asarray(right, jnp.float32)), factors.spectrum
    rotation = np.linalg.qr(np.asarray(jax.random.normal(key, (setting.rank, setting.rank)), np.float64))[0]
    spec = left_spec(setting.bits)
    assert spec is not None
    return LowRank(
        left=quantize_matrix(left @ rotation, spec, table=True),
        right=quantize_matrix(rotation.T @ right, QuantizedSpec(bits=8), table=False),
    ), factors.spectrum


def metric_root(metric: np.ndarray | None, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(G^½, G^-½), G scaled to mean eigenvalue 1 and floored at 1 % of it; the identity for None."""
    if metric is None:
        return np.eye(width), np.eye(width)
    values, vectors = np.linalg.eigh(metric)
    values = np.maximum(values / values.mean(), 1e-2)
    return (vectors * np.sqrt(values)) @ vectors.T, (vectors / np.sqrt(values)) @ vectors.T

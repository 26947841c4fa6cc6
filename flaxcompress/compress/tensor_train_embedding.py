"""The token table as a tensor train: ids and columns in mixed radix, one core per digit."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import numpy as np

from flaxcompress import linalg, tree
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.compress.tiers import token_weights
from flaxcompress.compress.uncompressed import check_uncompressed
from flaxcompress.config import ModelConfig
from flaxcompress.formats import TensorTrain, TensorTrainSpec, materialize
from flaxcompress.model import Model, abstract_flat, replace_matrices
from flaxcompress.text import first_ordinary_token

TOKEN = "embedding/token"


def compress_matrix(table: np.ndarray, spec: TensorTrainSpec, weights: np.ndarray | None = None) -> TensorTrain:
    """The tensor train of `spec` that approximates a table [V, D].

    Args:
      weights: [V], of each row's squared error. Rows that share their first digit count by their mean weight, the only
        one that the first core can undo; where ids are ordered by frequency, neighbours weigh about the same.
    """
    if weights is None:
        return spec.compress(table)
    blocks = np.zeros(int(np.prod(spec.rows)))
    blocks[: len(weights)] = weights
    return spec.compress(table, linalg.Metric.of_weights(blocks.reshape(spec.rows[0], -1).mean(1)))


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorTrainEmbedding(Step):
    """Approximates the token table by a tensor train (Hrinchuk et al. 2020, "Tensorized embedding layers").

    By successive SVDs (Oseledets 2011), not trained. A row is looked up as a product of one slice of each core.

    Attributes:
      rank: between all cores, full where that is less, or
      keep: the fraction of the table's parameters that the cores may hold.
      cores: how many; the factors of ids and columns are as equal as can be.
      weighting: "frequency": ids that share their first digit count by their tokens' mean weight, from the calibration
        text and the prior; "none": all alike.
      prior: "zipf" (ids ordered by frequency, as in BERT's vocabulary) or "uniform".
      power: tempers token weights.
      allow_larger: accept ranks at which the cores are larger than the table.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})

    rank: int | None = None
    keep: float | None = None
    cores: int = 3
    weighting: Literal["frequency", "none"] = "frequency"
    prior: Literal["zipf", "uniform"] = "zipf"
    power: float = 0.5
    allow_larger: bool = False

    def __post_init__(self):
        if (self.rank is None) == (self.keep is None):
            raise ValueError(f"TensorTrainEmbedding: give either rank or keep, got rank={self.rank}, keep={self.keep}")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(
                f"TensorTrainEmbedding: keep {self.keep} must lie in (0, 1], the fraction of the table's parameters"
            )
        if (self.rank is not None and self.rank < 1) or self.cores < 2:
            raise ValueError(f"TensorTrainEmbedding: rank {self.rank}, {self.cores} cores; at least rank 1 and 2 cores")
        if not 0 < self.power <= 2:
            raise ValueError(f"TensorTrainEmbedding: power {self.power} must lie in (0, 2]")

    def _spec(self, shape: tuple[int, int]) -> TensorTrainSpec:
        values = shape[0] * shape[1]
        make = lambda rank: TensorTrainSpec.balanced(shape, cores=self.cores, rank=rank)  # noqa: E731
        if self.rank is not None:
            spec = make(self.rank)
        else:
            assert self.keep is not None
            budget = self.keep * values
            spec = make(linalg.largest(lambda rank: make(rank).values() <= budget, values))
        if spec.values() >= values and not self.allow_larger:
            raise ValueError(
                f"{TOKEN}: a tensor train of {spec.values():,} values would enlarge a {shape[0]}×{shape[1]} table; use "
                "less rank, or set allow_larger: true"
            )
        return spec

    def plan(self, config: ModelConfig) -> ModelConfig:
        check_uncompressed(abstract_flat(config), [TOKEN], self.name)
        return config.with_format(TOKEN, self._spec((config.vocabulary, config.table_width)).to_json())

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        table, weights = np.asarray(materialize(tree.View(model.params)[TOKEN])), None
        if self.weighting == "frequency":
            start = first_ordinary_token(model.assets)
            counts = context.need(self).token_counts
            weights = token_weights(counts, start=start, prior=self.prior, power=self.power)
        spec = self._spec((table.shape[0], table.shape[1]))
        return replace_matrices(model, {TOKEN: compress_matrix(table, spec, weights)})

"""Low-rank kernels: truncated SVD in one of several metrics, at ranks that are equal or allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress import linalg, tree
from flaxcompress.compress.layer_step import Changes, LayerStep, check_walked, unfinished, walked
from flaxcompress.compress.loss_gradient import loss_gradient
from flaxcompress.compress.matrix_statistics import check_finite, count_tokens, gather, shrunk, warn_of_few_tokens
from flaxcompress.compress.metrics import GRADIENTS, INPUTS, METRICS, Statistics
from flaxcompress.compress.rank_allocation import Ranks, values_of, water_filling, zero_sum
from flaxcompress.compress.step import Context, register_step
from flaxcompress.compress.uncompressed import check_uncompressed
from flaxcompress.compress.walk import Stage
from flaxcompress.config import ModelConfig, closest
from flaxcompress.formats import LowRank as LowRankFormat
from flaxcompress.formats import LowRankSpec, materialize, rank_for
from flaxcompress.model import Model, abstract_flat, replace_matrices

Allocation = Literal["uniform", "energy", "gradient", "zero_sum"]


def compress_matrix(
    weight: np.ndarray,
    rank: int,
    *,
    metric: str = "activation",
    statistics: Statistics = Statistics(),  # noqa: B008
) -> tuple[LowRankFormat, np.ndarray]:
    """The rank-R format of a kernel [n, m], nearest to it in a metric (one of `METRICS`), and its spectrum."""
    factors = METRICS[metric].factorize(weight, rank, statistics)
    return _format(factors), factors.spectrum


def _format(factors: linalg.Factors) -> LowRankFormat:
    return LowRankFormat(left=jnp.asarray(factors.left, jnp.float32), right=jnp.asarray(factors.right, jnp.float32))


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(LayerStep):
    """Replaces every kernel that `pattern` matches by a product of two factors.

    Attributes:
      pattern: full-match address pattern, e.g. "layers/\\d+/feed_forward/.*/kernel".
      rank: R, or
      keep: the fraction of the matrices' parameters that the factors may hold.
      whitening: the metric in which a kernel's error is least: "none" (plain truncated SVD), "fisher" (rows weighted by
        squared gradients, FWSVD), "asvd" (by the size of their input), "pca" (inputs projected on their principal
        components), "activation" (the output's error on calibration text: SVD-LLM, in its output-PCA form) or
        "two_sided" (the loss's, by second moments of inputs and of gradients).
      allocation: with `keep`, how the parameters that all matrices may hold are divided: "uniform", the same fraction
        to each; "energy", to the components with the largest share of their matrix's own output; "gradient", with the
        largest share in the loss, as far as the mean squared gradient of the matrix's outputs tells; "zero_sum", so
        that the cuts' first-order effects on a language model's loss cancel. All but "uniform" leave a matrix dense
        that would get a rank at which its factors are larger than itself.
      sequential: go through the layers in order, each matrix fitted to the original's output on the inputs that the
        compressed layers before it give. A matrix that several layers share is fitted at its first use.
      sentences: calibration sentences for the second moments of inputs.
      allow_larger: accept ranks at which the factors are larger than the matrix.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_moments", "gradient_moments"})

    pattern: str = dataclasses.field(kw_only=False)
    rank: int | None = None
    keep: float | None = None
    whitening: str = "activation"
    allocation: Allocation = "uniform"
    sequential: bool = False
    sentences: int = 768
    allow_larger: bool = False

    def __post_init__(self):
        if self.whitening not in METRICS:
            raise ValueError(f"LowRank: unknown whitening {self.whitening!r}; {closest(self.whitening, METRICS)}")
        if self.sentences < 1:
            raise ValueError(f"LowRank: sentences must be at least 1, got {self.sentences}")
        if self.allocation != "uniform" and (self.keep is None or self.allow_larger):
            raise ValueError(
                f"LowRank: allocation {self.allocation!r} divides what keep: leaves, without allow_larger; got "
                f"rank={self.rank}, keep={self.keep}, allow_larger={self.allow_larger}"
            )
        if self.sequential and INPUTS not in self._metric.needs:
            reading = ", ".join(name for name, metric in METRICS.items() if INPUTS in metric.needs)
            raise ValueError(
                f"LowRank: sequential follows the inputs, which whitening {self.whitening!r} does not read; use one of "
                f"{reading}"
            )

    @property
    def _metric(self):
        return METRICS[self.whitening]

    def _ranks(self, flat: Mapping[str, Any]) -> dict[str, int]:
        kernels = [a for a in flat if a.endswith("/kernel")]
        found = tree.select(kernels, self.pattern, where="LowRank/pattern")
        return {a: rank_for(flat[a].shape, self.rank, self.keep, self.allow_larger, a) for a in found}

    def plan(self, config: ModelConfig) -> ModelConfig:
        # Allocated ranks are known only from data; they take no more values in all than equal fractions do.
        flat = abstract_flat(config)
        ranks = self._ranks(flat)
        check_uncompressed(flat, ranks, self.name)
        if self.sequential:
            check_walked(config, ranks, "LowRank: sequential")
        for address, rank in ranks.items():
            config = config.with_format(address, LowRankSpec(rank=rank).to_json())
        return config

    def whole(self) -> str:
        if self.allocation != "uniform":
            return f"allocation {self.allocation!r} compares all matrices; use uniform"
        if other := self._metric.needs - {INPUTS}:
            return f"whitening {self.whitening!r} needs {', '.join(sorted(other))}; use none, pca, asvd or activation"
        return ""

    def by_layer(self, config: ModelConfig, weights: Mapping[str, Any], context: Context) -> Iterator[Changes]:
        ranks = self._ranks(abstract_flat(config))
        for group, fitted in self._fitted(config, weights, context, dict(ranks), {}):
            changes = self._noted(fitted, ranks, context)
            del fitted  # the next layer is not waited for with this one in memory
            yield group, changes
            del changes

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        if context.low_memory:
            return super().__call__(model, context, key=key)
        config, flat = model.config, tree.View(model.params)
        ranks: Ranks = dict(self._ranks(flat))
        needs = self._metric.needs | ({GRADIENTS} if self.allocation == "gradient" else frozenset())
        if self.sequential:
            check_walked(config, ranks, "LowRank: sequential")
            needs = needs - {INPUTS} if self.allocation == "uniform" else needs
        statistics = gather(
            model,
            context.need(self) if needs else None,
            {a: flat[a].shape for a in ranks},
            needs,
            sentences=self.sentences,
            where=self.name,
            progress=context.progress,
        )
        if self.allocation != "uniform":
            ranks = self._allocated(model, context, ranks, {a: self._weight(flat, a) for a in ranks}, statistics)
        changes: dict[str, Any] = {}
        for _, fitted in self._fitted(config, flat, context, ranks, statistics):
            changes |= self._noted(fitted, ranks, context)
        return replace_matrices(model, changes)

    def _weight(self, weights: Mapping[str, Any], address: str) -> np.ndarray:
        weight = np.asarray(materialize(weights[address]))
        check_finite(weight, f"LowRank: {address}")
        return weight

    def _noted(
        self, fitted: Mapping[str, linalg.Factors], ranks: Mapping[str, int | None], context: Context
    ) -> dict[str, LowRankFormat]:
        """The formats of fitted factors, whose spectra the report gets."""
        for address, factors in fitted.items():
            rank = ranks[address]
            assert rank is not None
            context.keep_spectrum(address, factors.spectrum, rank)
        return {address: _format(factors) for address, factors in fitted.items()}

    def _fitted(
        self,
        config: ModelConfig,
        weights: Mapping[str, Any],
        context: Context,
        ranks: Ranks,
        statistics: Mapping[str, Statistics],
    ) -> Iterator[tuple[str, dict[str, linalg.Factors]]]:
        """Each group's factors, by the statistics that are given, or those of a walk."""
        if self.sequential or (INPUTS in self._metric.needs and not statistics):
            yield from self._by_walk(config, weights, context, ranks, statistics)
            return
        for group, addresses in unfinished((a for a, rank in ranks.items() if rank is not None), context):
            known = {address: statistics.get(address, Statistics()) for address in addresses}
            yield (
                group,
                {a: self._metric.factorize(self._weight(weights, a), ranks[a] or 0, known[a]) for a in addresses},
            )

    def _allocated(
        self,
        model: Model,
        context: Context,
        uniform: Ranks,
        weights: Mapping[str, np.ndarray],
        statistics: Mapping[str, Statistics],
    ) -> Ranks:
        """Ranks that take no more values in all than the uniform ones."""
        shapes = {address: weight.shape for address, weight in weights.items()}
        budget = sum(values_of(shapes[a], r) for a, r in uniform.items())
        gradient = loss_gradient(model, context.need(self)) if self.allocation == "zero_sum" else {}
        found = {}
        for address, weight in weights.items():
            factors = self._metric.factorize(weight, min(weight.shape), statistics[address])
            if self.allocation == "zero_sum":
                # Without component i the weight changes by -a_i b_iᵀ: its effect is -a_iᵀ(∂L/∂W)b_i.
                found[address] = -np.einsum(
                    "nr,nm,rm->r", factors.left, gradient[address], factors.right, optimize=True
                )
            else:
                found[address] = self._loss_scale(factors, statistics[address]) * factors.spectrum**2
        return (zero_sum if self.allocation == "zero_sum" else water_filling)(found, shapes, budget)

    def _loss_scale(self, factors: linalg.Factors, statistics: Statistics) -> float:
        """What a squared error in the metric costs: the weight of a matrix beside the others."""
        if self.allocation == "energy":
            return 1.0 / max(float((factors.spectrum**2).sum()), np.finfo(np.float64).tiny)
        if GRADIENTS in self._metric.needs:  # its errors are the loss's already
            return 1.0
        assert statistics.gradient_moments is not None
        return float(np.trace(statistics.gradient_moments)) / len(statistics.gradient_moments)

    def _by_walk(
        self,
        config: ModelConfig,
        weights: Mapping[str, Any],
        context: Context,
        ranks: Ranks,
        statistics: Mapping[str, Statistics],
    ) -> Iterator[tuple[str, dict[str, linalg.Factors]]]:
        """Factors by the second moments of a walk, held for a layer at a time.

        With `sequential`, each kernel's nearest product on shifted inputs (`linalg.shifted_target`), stage after stage.
        """
        check_walked(config, ranks, f"LowRank: {'sequential' if self.sequential else f'whitening {self.whitening!r}'}")
        shapes = abstract_flat(config)
        tokens = count_tokens(context.need(self), self.sentences)
        warn_of_few_tokens(tokens, max(shapes[a].shape[0] for a in ranks), self.name)
        follow = {"exchanging": self.sequential, "follow_original": self.sequential}
        walk, groups = walked(self, config, weights, context, sentences=self.sentences, **follow)

        def fit(stage: Stage) -> dict[str, linalg.Factors]:
            moments, found = np.asarray(stage.moments), {}
            for address in (a for a in stage.addresses if ranks.get(a) is not None):
                check_finite(moments, f"LowRank: input_moments of {address}")
                target = self._weight(weights, address)
                if stage.cross is not None:
                    target = linalg.shifted_target(target, moments, np.asarray(stage.cross))
                own = statistics.get(address, Statistics())
                known = dataclasses.replace(own, input_moments=shrunk(moments, tokens))
                found[address] = self._metric.factorize(target, ranks[address] or 0, known)
                if self.sequential:
                    walk.exchanged[address] = _format(found[address])
            return found

        for group, stages in groups:  # nothing of a stage outlives it
            yield group, {address: factors for found in map(fit, stages) for address, factors in found.items()}

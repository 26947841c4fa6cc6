"""Repairing what rounding or pruning lost: the error's nearest matrix of low rank, added to the products."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress import tree
from flaxcompress.compress.matrix_statistics import check_finite, gather
from flaxcompress.compress.metrics import METRICS
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.config import ModelConfig, closest
from flaxcompress.formats import Adapted, AdaptedSpec, DenseSpec, Format, LowRank, LowRankSpec, materialize, spec_of
from flaxcompress.formats.base import check_dtype
from flaxcompress.model import Model, abstract_flat, replace_matrices
from flaxcompress.nn.bases import is_on_basis


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class Repair(Step):
    """Adds to each kernel that a step before rounded or pruned a product of low rank: W ≈ Q + left·right.

    It stands behind the steps that lose something, before those that change layers otherwise or train (`Heal`): the
    error is what is left to the original. The product is the nearest one to W - Q in the metric of `whitening` (LQER,
    Zhang et al. 2024; whitened by the input, QERA, Zhang et al. 2025). It costs rank·(n + m) values, and as many
    multiplications.

    Attributes:
      rank: R.
      pattern: full-match address pattern, among the kernels that are not stored dense.
      whitening: the metric, as `LowRank` has it.
      dtype: how the factors are stored; `Quantize` after this step rounds them.
      sentences: calibration sentences for the second moments of inputs.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_moments", "gradient_moments"})

    rank: int = 16
    pattern: str = r"layers/\d+/.*/kernel"
    whitening: str = "activation"
    dtype: str = "float16"
    sentences: int = 768

    def __post_init__(self):
        if self.whitening not in METRICS:
            raise ValueError(f"Repair: unknown whitening {self.whitening!r}; {closest(self.whitening, METRICS)}")
        if self.rank < 1 or self.sentences < 1:
            raise ValueError(f"Repair: rank and sentences must be at least 1, got {self.rank} and {self.sentences}")
        check_dtype(self.dtype, "Repair: dtype")

    def _addresses(self, flat: Mapping[str, Any]) -> list[str]:
        kernels = [a for a in flat if a.endswith("/kernel")]
        found = [a for a in tree.select(kernels, self.pattern, where="Repair/pattern") if isinstance(flat[a], Format)]
        if not found:
            raise ValueError(
                f"Repair: the kernels that {self.pattern!r} matches are stored dense; put Quantize or Prune before it"
            )
        for address in found:
            if isinstance(flat[address], Adapted) or is_on_basis(flat[address]):
                raise ValueError(
                    f"Repair: {address} is stored as {spec_of(flat[address]).kind}, which is not repaired; leave it out"
                )
            if self.rank > min(flat[address].shape):
                n, m = flat[address].shape
                raise ValueError(f"Repair: rank {self.rank} is not in 1 … {min(n, m)} for {address}, {n}×{m}")
        return found

    def plan(self, config: ModelConfig) -> ModelConfig:
        flat = abstract_flat(config)
        factor = DenseSpec(self.dtype)
        delta = LowRankSpec(rank=self.rank, left=factor, right=factor)
        for address in self._addresses(flat):
            config = config.with_format(
                address, AdaptedSpec(base=spec_of(flat[address]), delta=delta, residual=True).to_json()
            )
        return config

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        _check_else_unchanged(model, context.original)
        flat, originals = tree.View(model.params), tree.View(context.original.params)
        shapes = {address: tuple(flat[address].shape) for address in self._addresses(flat)}
        for address, shape in shapes.items():
            if address not in originals or tuple(originals[address].shape) != shape:
                raise ValueError(
                    f"Repair: the original has no {address} of shape {list(shape)}; repair before that step"
                )
        metric = METRICS[self.whitening]
        known = gather(
            model,
            context.need(self) if metric.needs else None,
            shapes,
            metric.needs,
            sentences=self.sentences,
            where=self.name,
            progress=context.progress,
        )
        changes = {}
        for address in shapes:
            error = np.asarray(materialize(originals[address])) - np.asarray(materialize(flat[address]))
            check_finite(error, f"Repair: {address}")
            factors = metric.factorize(error, self.rank, known[address])
            left, right = (jnp.asarray(f, self.dtype) for f in (factors.left, factors.right))
            changes[address] = Adapted(
                base=flat[address], delta=LowRank(left=left, right=right), scale=1.0, residual=True
            )
        return replace_matrices(model, changes)


def _check_else_unchanged(model: Model, original: Model) -> None:
    """Raises ValueError where layers are others than the original's, or what they hold dense is.

    Kernels may then stand for something else than at the same address of the original.
    """
    where = "Repair: steps before it may only round, prune or cut kernels; put it right behind those"
    if (model.config.layers, model.config.sharing) != (original.config.layers, original.config.sharing):
        raise ValueError(f"{where}: layers were left out or tied")
    was = tree.View(original.params)
    for address, node in tree.View(model.params).items():
        if tree.place(address) is None or isinstance(node, Format):
            continue
        before = was.get(address)
        same = before is not None and not isinstance(before, Format) and before.shape == node.shape
        if not same or not np.array_equal(np.asarray(before).astype(node.dtype), np.asarray(node)):
            raise ValueError(f"{where}: {address} is not as it was")

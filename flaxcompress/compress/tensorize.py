"""Kernels as decomposed tensors: CP, Tucker or a tensor train, whitened by the kernel's inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from flaxcompress import linalg, tree
from flaxcompress.compress.layer_step import Changes, LayerStep, check_walked, unfinished, walked
from flaxcompress.compress.step import Context, register_step
from flaxcompress.compress.uncompressed import check_uncompressed
from flaxcompress.config import ModelConfig
from flaxcompress.formats import CPSpec, Decomposed, DecomposedSpec, TensorTrainSpec, TuckerSpec, materialize
from flaxcompress.formats.tensor_train import balanced_factors
from flaxcompress.model import Model, abstract_flat, replace_matrices
from flaxcompress.progress import progress_bar

_SENTENCES = 768  # that inputs are measured on

Kind = Literal["cp", "tucker", "tensor_train"]


def compress_matrix(weight: np.ndarray, spec: DecomposedSpec, *, moments: np.ndarray | None = None) -> Decomposed:
    """The format of `spec` that approximates a kernel [n, m].

    Args:
      moments: C = E[xᵀx], [n, n]. The factors then come from C^½·W, reshaped, so that what is made small is the
        output's error E‖x(W - Ŵ)‖², and C^-½ goes into the first factor: only possible where that spans all n inputs.

    Raises ValueError for moments and a spec whose rows are cut.
    """
    if moments is None:
        return spec.compress(weight)
    if spec.rows[0] != len(weight):
        raise ValueError(
            f"Tensorize: rows {list(spec.rows)} cut the {len(weight)} inputs, so that whitening cannot be undone in "
            "one factor; use input_modes: 1, or whitened: false"
        )
    return spec.compress(weight, linalg.Metric.of_moment(moments))


def spec_of_rank(kind: Kind, rows: tuple[int, ...], columns: tuple[int, ...], rank: int) -> DecomposedSpec:
    """The spec whose ranks are all `rank`, or full where that is less."""
    if kind == "cp":
        return CPSpec(rows=rows, columns=columns, rank=rank)
    return (TuckerSpec if kind == "tucker" else TensorTrainSpec)(rows=rows, columns=columns, ranks=rank)  # pyright: ignore[reportArgumentType]


def spec_within(kind: Kind, rows: tuple[int, ...], columns: tuple[int, ...], values: float) -> DecomposedSpec:
    """The spec of the highest ranks that holds at most so many values (one of rank 1 where none does).

    Where the inputs are one mode, Tucker's rank shrinks in it alone: that is where trained kernels are redundant
    (experiments/tensor_kernels.py), since their outputs have no order. Otherwise, all shrink in proportion.
    """
    if kind == "tucker":
        whole = TuckerSpec(rows=rows, columns=columns, ranks=max(rows + columns))  # pyright: ignore[reportArgumentType]
        full = whole.full_ranks()
        first = len(rows) == 1 and dataclasses.replace(whole, ranks=(1, *full[1:])).values() <= values
        steps = full[0] if first else max(full)

        def make(step: int) -> DecomposedSpec:
            cut = (step, *full[1:]) if first else tuple(max(1, f * step // steps) for f in full)
            return dataclasses.replace(whole, ranks=cut if first else whole.useful(cut))
    else:
        steps = linalg.full_cp_rank(rows + columns) if kind == "cp" else max(rows) * max(columns) * max(rows + columns)

        def make(step: int) -> DecomposedSpec:
            return spec_of_rank(kind, rows, columns, step)

    return make(linalg.largest(lambda step: make(step).values() <= values, steps))


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensorize(LayerStep):
    """Replaces every kernel [n, m] that `pattern` matches by factors of the tensor that it is when reshaped.

    The inputs are written with `input_modes` digits and the outputs with `output_modes`, in factors as equal as can be:
    a 384×1536 kernel as 384×32×48. A tensor train whose inputs and outputs have equally many digits, two or more, pairs
    them in its cores (Novikov et al. 2015, "Tensorizing neural networks"). Products go through the factors where that
    takes fewer operations, else through the matrix multiplied back; `inspect` says which.

    Attributes:
      pattern: full-match address pattern, e.g. "layers/\\d+/feed_forward/.*/kernel".
      kind: "cp" (alternating least squares), "tucker" (orthogonal iteration) or "tensor_train" (successive SVDs).
      rank: of all modes, full where that is less, or
      keep: the fraction of the matrix's parameters that the factors may hold.
      whitened: minimise the output's error on calibration text, which needs input_modes 1; false: the matrix's error.
      input_modes, output_modes: how many digits.
      allow_larger: accept ranks at which the factors are larger than the matrix.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_moments"})

    pattern: str = dataclasses.field(kw_only=False)
    kind: Kind = "tucker"
    rank: int | None = None
    keep: float | None = None
    whitened: bool = True
    input_modes: int = 1
    output_modes: int = 2
    allow_larger: bool = False

    def __post_init__(self):
        if (self.rank is None) == (self.keep is None):
            raise ValueError(f"Tensorize: give either rank or keep, got rank={self.rank}, keep={self.keep}")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"Tensorize: keep {self.keep} must lie in (0, 1], the fraction of the matrix's parameters")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"Tensorize: rank {self.rank} must be at least 1")
        if self.input_modes < 1 or self.output_modes < 1 or self.input_modes + self.output_modes < 3:
            raise ValueError(
                f"Tensorize: {self.input_modes} input and {self.output_modes} output modes; at least 1 of each and 3 "
                "in all (a matrix as it is has LowRank)"
            )
        if self.whitened and self.input_modes > 1:
            raise ValueError(
                f"Tensorize: whitening is undone in the one factor that spans all inputs; with {self.input_modes} "
                "input modes set whitened: false"
            )

    def _spec(self, address: str, shape: tuple[int, int]) -> DecomposedSpec:
        rows = balanced_factors(shape[0], self.input_modes, exact=True)
        columns = balanced_factors(shape[1], self.output_modes, exact=True)
        if self.kind == "tensor_train":
            if len(rows) == len(columns):
                columns = columns[::-1]
            else:  # the inputs' cores, then the outputs'
                rows, columns = rows + (1,) * len(columns), (1,) * len(rows) + columns
        values = shape[0] * shape[1]
        if self.keep is not None:
            spec = spec_within(self.kind, rows, columns, self.keep * values)
        else:
            assert self.rank is not None
            spec = spec_of_rank(self.kind, rows, columns, self.rank)
        if spec.values() >= values and not self.allow_larger:
            raise ValueError(
                f"{address}: a {self.kind} of {spec.values():,} values would enlarge a {shape[0]}×{shape[1]} matrix; "
                "use less rank, drop it from the pattern, or set allow_larger: true"
            )
        return spec

    def _specs(self, flat: Mapping[str, Any]) -> dict[str, DecomposedSpec]:
        kernels = [a for a in flat if a.endswith("/kernel")]
        found = tree.select(kernels, self.pattern, where="Tensorize/pattern")
        return {a: self._spec(a, flat[a].shape) for a in found}

    def plan(self, config: ModelConfig) -> ModelConfig:
        flat = abstract_flat(config)
        specs = self._specs(flat)
        check_uncompressed(flat, specs, self.name)
        for address, spec in specs.items():
            config = config.with_format(address, spec.to_json())
        return config

    def by_layer(self, config: ModelConfig, weights: Mapping[str, Any], context: Context) -> Iterator[Changes]:
        specs = self._specs(abstract_flat(config))
        if not self.whitened:
            for group, addresses in unfinished(specs, context):
                yield group, {a: compress_matrix(_weight(weights, a), specs[a]) for a in addresses}
            return
        check_walked(config, specs, "Tensorize: whitened")
        _, groups = walked(self, config, weights, context, sentences=_SENTENCES, exchanging=False)
        for group, stages in groups:
            changes = {}
            for stage in stages:
                for address in (a for a in stage.addresses if a in specs):
                    moments = np.asarray(stage.moments)
                    changes[address] = compress_matrix(_weight(weights, address), specs[address], moments=moments)
            yield group, changes

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        if context.low_memory:
            return super().__call__(model, context, key=key)
        flat = tree.View(model.params)
        specs, moments = self._specs(flat), {}
        if self.whitened:
            moments = context.need(self).input_moments(model, sentences=_SENTENCES, progress=context.progress)
            without = [a for a in specs if a.removesuffix("/kernel") not in moments]
            if without:
                raise ValueError(
                    f"Tensorize: no activations are recorded for {', '.join(without[:3])}; use whitened: false for it"
                )
        changes = {}
        with progress_bar("tensors", len(specs), show=context.progress) as advance:
            for address, spec in specs.items():
                moment = moments.get(address.removesuffix("/kernel"))
                changes[address] = compress_matrix(_weight(flat, address), spec, moments=moment)
                advance(note=address)
        return replace_matrices(model, changes)


def _weight(weights: Mapping[str, Any], address: str) -> np.ndarray:
    return np.asarray(materialize(weights[address]))

"""Unstructured and N:M pruning by magnitude, Wanda, SparseGPT or Fisher, of a share or within a budget of saliency."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from flaxcompress import tree
from flaxcompress.compress.layer_step import Changes, LayerStep, gathered, unfinished, walked
from flaxcompress.compress.matrix_statistics import check_finite
from flaxcompress.compress.prune_scores import (
    kept_in_matrix,
    kept_in_rows,
    kept_of_groups,
    kept_together,
    kept_within,
)
from flaxcompress.compress.sparse_gpt import kept_in_blocks, sparse_gpt
from flaxcompress.compress.step import Context, register_step
from flaxcompress.compress.walk import walked_kernels
from flaxcompress.config import ModelConfig
from flaxcompress.formats import (
    DenseSpec,
    Format,
    LowRank,
    MaskedRows,
    MaskedSpec,
    SemiStructuredSpec,
    SparseSpec,
    map_parts,
    materialize,
    nbytes,
    spec_of,
)
from flaxcompress.formats.sparse import BLOCK
from flaxcompress.model import Model, abstract_flat, replace_matrices
from flaxcompress.nn.bases import is_on_basis

By = Literal["magnitude", "wanda", "sparsegpt", "fisher"]
Scope = Literal["row", "matrix", "global"]
_TABLES = r"embedding/(token|position|segment)"
_READS_INPUTS = ("wanda", "sparsegpt")


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(LayerStep):
    """Sets the least important weights to zero, and stores the others alone.

    The masks then stay: healing and training change only what is kept. Of a low-rank kernel both factors are pruned.

    Attributes:
      sparsity: the share of the weights that go, between 0 and 1; alone.
      n_of_m: "2:4" keeps 2 of every 4 neighbouring inputs of an output (of a table: columns); alone.
      budget: remove the largest set of weights with Σ αᵢwᵢ² at most this, α = 1 (by magnitude) or the Fisher
        information, in all matrices together; alone.
      pattern: full-match address pattern; the default takes every kernel in the layers.
      by: "magnitude"; "wanda" multiplies it by the norm of the weight's input (Sun et al. 2024); "sparsegpt" lets the
        weights that stay make up for those that go (Frantar & Alistarh 2023); "fisher" is the expected squared change
        of the model's answer, F·w². The second and third go through the layers, on inputs that the pruned layers
        before give. Tables, and kernels outside of the layers, have no inputs: their magnitude is what counts.
      scope: among which weights the lowest scores go: of an output's ("row"), of a matrix, or of all. Left out: "row"
        for Wanda, as its authors do; the matrix for others. SparseGPT chooses among blocks of 128 inputs.
      sentences: calibration sentences for inputs.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokens", "input_moments"})

    sparsity: float | None = None
    n_of_m: str | None = None
    budget: float | None = None
    pattern: str = r".*layers/\d+/.*/kernel"
    by: By = "wanda"
    scope: Scope | None = None
    sentences: int = 768

    def __post_init__(self):
        given = [name for name in ("sparsity", "n_of_m", "budget") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"Prune: give one of sparsity, n_of_m and budget, got {' and '.join(given) or 'none'}")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(f"Prune: sparsity must lie between 0 and 1, the share that goes; got {self.sparsity}")
        if self.sentences < 1:
            raise ValueError(f"Prune: sentences must be at least 1, got {self.sentences}")
        if self.n_of_m is not None:
            self._semi_structured()
        if self.budget is not None and (self.by not in ("magnitude", "fisher") or not self.budget > 0):
            raise ValueError(
                f"Prune: a budget is a positive sum of saliencies, by: magnitude or fisher; got {self.budget} by "
                f"{self.by}"
            )
        if self.scope is not None and (self.by == "sparsegpt" or self.sparsity is None):
            other = "by: sparsegpt" if self.by == "sparsegpt" else f"{given[0]}"
            raise ValueError(f"Prune: scope {self.scope!r} does not go with {other}, which has its own")
        if self.scope == "global" and self.by == "wanda":
            raise ValueError("Prune: wanda goes layer by layer; scope: row or matrix, or by: magnitude or fisher")

    def _semi_structured(self) -> SemiStructuredSpec:
        found = re.fullmatch(r"(\d+):(\d+)", str(self.n_of_m))
        if found is None:
            raise ValueError(f"Prune: n_of_m is written like 2:4, got {self.n_of_m!r}")
        try:
            return SemiStructuredSpec(n=int(found[1]), m=int(found[2]))
        except ValueError as error:
            raise ValueError(f"Prune: n_of_m {self.n_of_m}: {error}") from None

    @property
    def _together(self) -> bool:
        """Whether weights of different matrices are compared."""
        return self.budget is not None or self.scope == "global"

    # ── what is planned ──

    def _addresses(self, flat: Mapping[str, Any]) -> list[str]:
        matrices = [a for a in flat if a.endswith("/kernel") or re.fullmatch(_TABLES, a)]
        return tree.select(matrices, self.pattern, where="Prune/pattern")

    def _spec(
        self, shape: tuple[int, int], values: DenseSpec, address: str, *, table: bool, inputs: bool
    ) -> MaskedSpec:
        """The format of one matrix; where weights of several are compared, one that holds all of it.

        Args:
          inputs: whether what the matrix reads is known.
        """
        rows, columns = shape if table else shape[::-1]
        if self.n_of_m is not None:
            spec = dataclasses.replace(self._semi_structured(), values=values)
            if columns % spec.m:
                raise ValueError(f"Prune: {address}: {spec.m} does not divide its rows of {columns} weights")
            return spec
        if self.sparsity is None or self._together:
            kept = rows * columns
        elif self.by == "sparsegpt" and inputs:
            kept = sum(kept_in_blocks(rows, columns, self.sparsity))
        elif self._by_row(inputs):
            kept = rows * (columns - round(self.sparsity * columns))
        else:
            kept = rows * columns - round(self.sparsity * rows * columns)
        if kept == 0:
            raise ValueError(
                f"Prune: {address}: sparsity {self.sparsity} leaves nothing of {shape[0]}×{shape[1]} weights"
            )
        return SparseSpec(kept=kept, values=values)

    def _by_row(self, inputs: bool) -> bool:
        return self.scope == "row" or (self.scope is None and self.by == "wanda" and inputs)

    def plan(self, config: ModelConfig) -> ModelConfig:
        flat, inputs = abstract_flat(config), walked_kernels(config)
        for address in self._addresses(flat):
            if is_on_basis(flat[address]):
                raise ValueError(f"Prune: {address} stands on a basis that layers share; prune before ShareBasis")
            if self.by == "fisher" and isinstance(flat[address], Format):
                raise ValueError(f"Prune: {address} is no dense matrix, as by: fisher needs; use magnitude or wanda")
            if isinstance(flat[address], MaskedRows):
                raise ValueError(f"Prune: {address} is pruned already; start from the original model, or leave it out")

            def pruned(part: Any, table: bool, address: str = address) -> Any:
                values = _values_of(part, address)
                spec = self._spec(tuple(part.shape), values, address, table=table, inputs=address in inputs)
                init = jax.nn.initializers.zeros
                return jax.eval_shape(lambda key: spec.init(key, part.shape, init, table=table), jax.random.key(0))

            node = map_parts(flat[address], pruned, table=_is_table(address))
            config = config.with_format(address, spec_of(node).to_json())
        return config

    def bound(self, config: ModelConfig) -> int | None:
        if self.scope != "global":
            return None
        assert self.sparsity is not None
        planned, going = abstract_flat(self.plan(config)), 0
        for part, _, _ in self._parts(abstract_flat(config)):
            size = np.dtype(part.dtype).itemsize
            going += int(self.sparsity * math.prod(part.shape)) * size - BLOCK * size  # of the last block
        return sum(map(nbytes, planned.values())) - going

    # ── what is done ──

    def whole(self) -> str:
        if self._together:
            return "weights of all matrices are compared; use sparsity with scope: matrix"
        if self.by == "fisher":
            return "by: fisher needs the whole model's gradients; use magnitude, wanda or sparsegpt"
        return ""

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        view = tree.View(model.params)
        fisher = {}
        if self.by == "fisher":
            fisher = context.need(self).fisher(model, progress=context.progress)
        if self._together:
            return replace_matrices(model, self._compared(view, fisher))
        return replace_matrices(model, gathered(self._by_layer(model.config, view, context, fisher)))

    def by_layer(self, config: ModelConfig, weights: Mapping[str, Any], context: Context) -> Iterator[Changes]:
        yield from self._by_layer(config, weights, context, {})

    def _by_layer(
        self, config: ModelConfig, weights: Mapping[str, Any], context: Context, fisher: Mapping[str, Any]
    ) -> Iterator[Changes]:
        chosen = self._addresses(abstract_flat(config))
        in_turn = walked_kernels(config) & set(chosen) if self.by in _READS_INPUTS else set()
        alone = dict(unfinished([a for a in chosen if a not in in_turn], context))

        def pruned(group: str) -> dict[str, Any]:
            return {a: self._matrix(weights[a], a, None, fisher.get(a)) for a in alone.pop(group, [])}

        for group in [group for group in alone if tree.place(alone[group][0]) is None]:
            yield group, pruned(group)
        if in_turn:
            walk, groups = walked(self, config, weights, context, sentences=self.sentences)
            for group, stages in groups:
                changes = pruned(group)
                for stage in stages:
                    for address in (a for a in stage.addresses if a in in_turn):
                        check_finite(stage.moments, f"Prune: inputs of {address}")
                        changes[address] = self._matrix(weights[address], address, stage.moments, None)
                        walk.exchanged[address] = changes[address]
                yield group, changes
                del changes  # not held while the walk goes on
        for group in list(alone):
            yield group, pruned(group)

    def _matrix(self, node: Any, address: str, moments: Any, fisher: Any) -> Any:
        """One matrix, or the factors of a product, pruned."""
        if isinstance(node, LowRank) and moments is not None:
            left = self._pruned(node.left, False, address, moments, None)
            inner = np.asarray(materialize(left))
            return LowRank(left=left, right=self._pruned(node.right, False, address, inner.T @ moments @ inner, None))
        return map_parts(
            node, lambda part, table: self._pruned(part, table, address, moments, fisher), table=_is_table(address)
        )

    def _pruned(self, part: Any, table: bool, address: str, moments: Any, fisher: Any) -> MaskedRows:
        rows, inputs = _rows(part, table, address), moments is not None
        spec = self._spec(tuple(part.shape), _values_of(part, address), address, table=table, inputs=inputs)
        pair = (spec.n, spec.m) if isinstance(spec, SemiStructuredSpec) else None
        if self.by == "sparsegpt" and inputs:
            made, kept = sparse_gpt(rows, moments, sparsity=self.sparsity or 0.0, n_of_m=pair)
            return spec.pack(np.asarray(made), np.asarray(kept), transposed=not table)
        scores = np.abs(rows)
        if inputs:
            scores = scores * np.sqrt(np.diagonal(np.asarray(moments)))
        elif fisher is not None:
            scores = (fisher if table else fisher.T) * rows**2
        if pair is not None:
            kept = kept_of_groups(scores, *pair)
        else:
            assert self.sparsity is not None
            kept = (kept_in_rows if self._by_row(inputs) else kept_in_matrix)(scores, self.sparsity)
        return spec.pack(rows, kept, transposed=not table)

    def _parts(self, flat: Mapping[str, Any]) -> list[tuple[Any, bool, str]]:
        """(matrix, whether it is a table, address) of what is pruned, the factors of products one by one."""
        found: list[tuple[Any, bool, str]] = []
        for address in self._addresses(flat):

            def listed(part: Any, table: bool, address: str = address) -> Any:
                found.append((part, table, address))
                return part

            map_parts(flat[address], listed, table=_is_table(address))
        return found

    def _compared(self, view: tree.View, fisher: Mapping[str, Any]) -> dict[str, Any]:
        """All matrices, the weights of all compared with each other."""
        parts = self._parts(view)
        rows = {str(i): _rows(part, table, address) for i, (part, table, address) in enumerate(parts)}
        alpha = {str(i): _turned(fisher[a], table) for i, (_, table, a) in enumerate(parts) if a in fisher}
        saliency = {name: alpha.get(name, 1.0) * part**2 for name, part in rows.items()}
        if self.budget is not None:
            kept = kept_within(saliency, self.budget)
        else:
            assert self.sparsity is not None
            kept = kept_together(saliency, self.sparsity)
        made = []
        for name, (part, table, address) in zip(rows, parts, strict=True):
            count = int(kept[name].sum())
            if count == 0:
                less = "a smaller budget" if self.budget is not None else "a lower sparsity, or scope: matrix"
                raise ValueError(f"Prune: nothing would be left of {address}; ask for {less}")
            spec = SparseSpec(kept=count, values=_values_of(part, address))
            made.append(spec.pack(rows[name], kept[name], transposed=not table))
        of_part = iter(made)
        return {
            address: map_parts(view[address], lambda part, table: next(of_part), table=_is_table(address))
            for address in self._addresses(view)
        }


def _is_table(address: str) -> bool:
    return not address.endswith("/kernel")


def _turned(matrix: Any, table: bool) -> np.ndarray:
    """A matrix as rows: those of a table, or the outputs of a kernel."""
    return np.asarray(matrix) if table else np.asarray(matrix).T


def _rows(part: Any, table: bool, address: str) -> np.ndarray:
    rows = np.asarray(materialize(part))
    check_finite(rows, f"Prune: {address}")
    return _turned(rows, table)


def _values_of(part: Any, address: str) -> DenseSpec:
    """How the kept values of a matrix are stored: as it is. Raises ValueError for what is not dense."""
    spec = spec_of(part)
    if not isinstance(spec, DenseSpec):
        raise ValueError(
            f"Prune: {address} is stored as {spec.kind} already; prune before other steps but low rank, or leave this "
            "matrix out"
        )
    return spec

"""One budget: bits, ranks and the token table's bytes, priced alike and chosen together."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np

from flaxcompress import storage, tree
from flaxcompress.compress.answers import Answers
from flaxcompress.compress.drop_layers import DropLayers
from flaxcompress.compress.factorize_embedding import TOKEN, FactorizeEmbedding
from flaxcompress.compress.guess import guess_prices
from flaxcompress.compress.kernel_offers import Menu, undominated
from flaxcompress.compress.low_rank import LowRank
from flaxcompress.compress.quantize import Quantize
from flaxcompress.compress.solve import (
    ACTIONS,
    Prices,
    Solution,
    menu_of,
    price,
    solve,
    steps_of,
    with_small_tables,
    with_structure,
)
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.compress.structures import Structure, structures
from flaxcompress.compress.target import Target, parse_target
from flaxcompress.compress.uncompressed import check_uncompressed
from flaxcompress.compress.walk import walked_kernels
from flaxcompress.config import ModelConfig, closest
from flaxcompress.folder import tensors_of
from flaxcompress.formats import nbytes, to_tensors
from flaxcompress.model import Model, abstract_flat, replace_matrices

log = logging.getLogger("flaxcompress")

_MORE = 6  # runs beyond the corrections, where a target has not been met, or a size not come near
_WEIGHED = ("bits", "rank", "table")
_NEAR = 0.985  # of the size asked for: below it there is room for a better choice
_SETTLED = 0.05  # of the table's bytes, or of all kernels: a change below it is not worth another run


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocate(Step):
    """Brings a model down to a target by the cheapest actions: what loses least for each byte, or operation, saved.

    Every action on every matrix is priced by the loss that it is predicted to cost: Kronecker-factored second moments
    of inputs and gradients, scaled by what rounding each kernel alone really costs. The choice is a Lagrangian's. It is
    then run, its real loss measured, the predictions of kernels and of the table corrected by it, and the choice made
    again where that changes it.

    Attributes:
      target: "8x" or "10MB": at most so many bytes, all of the file counted; "2x-faster": so many times fewer
        operations in the layers; "1%": the smallest model whose measured loss, before healing, is at most that.
      actions: "bits" of kernels; "rank" of kernels; "table", tiers of the token table; "drop", whole layers left out;
        "tie", neighbouring layers that share their weights. A target of speed takes "rank" and "drop" alone.
      corrections: how often the choice may be made again; more often while a size is not met, or not come near.
      weights: what losses of each kind, "bits", "rank" and "table", count where bytes or speed are the target; 1 where
        it is not said. What healing leaves of each depends on how long it is (see `Recipe.with_target`).
      sentences: calibration sentences for what is measured.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokens", "input_moments", "gradient_moments"})

    target: str
    actions: tuple[Literal["bits", "rank", "table", "drop", "tie"], ...] = ACTIONS
    corrections: int = 2
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sentences: int = 96

    def __post_init__(self):
        if not self.actions or len(set(self.actions)) != len(self.actions):
            raise ValueError(f"Allocate: actions must name some of {', '.join(ACTIONS)}, got {list(self.actions)}")
        if self.corrections < 0 or self.sentences < 1:
            raise ValueError(
                f"Allocate: corrections must be 0 or more and sentences at least 1, got {self.corrections} and "
                f"{self.sentences}"
            )
        for kind, weight in self.weights.items():
            if kind not in _WEIGHED:
                raise ValueError(f"Allocate: weights: unknown kind {kind!r}; {closest(str(kind), _WEIGHED)}")
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not 0 < weight < math.inf:
                raise ValueError(f"Allocate: weights of {kind} must be a positive number, got {weight!r}")
        parse_target(self.target, 2**62)  # its spelling

    def resolve(self, model: Model) -> Allocate:
        """With a factor turned into bytes of the model as it was."""
        target = parse_target(self.target, model.nbytes)
        return dataclasses.replace(self, target=f"{int(target.value)}B") if target.kind == "bytes" else self

    def plan(self, config: ModelConfig) -> ModelConfig:
        """A layout that fits the target, chosen by sizes alone; data may choose another."""
        target = self._target(config)
        if target.kind == "loss" or (target.kind == "bytes" and _bytes_of(config) <= target.value):
            return config
        kernels = _kernels(config)
        check_uncompressed(kernels, kernels, self.name)
        menu, flops = menu_of(self.actions, target), 2 * sum(math.prod(n.shape) for n in kernels.values())
        most = config.layers // 2 if "drop" in self.actions and config.decoder is None else 0
        for count in range(most + 1):  # the last ones, as good as any without data
            small = (
                DropLayers(layers=tuple(range(config.layers - count, config.layers))).plan(config) if count else config
            )
            try:
                solution = _solve(guess_prices(small, self.actions, menu), target, small, flops)
            except ValueError:
                if count == most:
                    raise
                continue
            break
        for step in steps_of(solution, menu):
            small = step.plan(small)
        return small

    def bound(self, config: ModelConfig) -> int | None:
        """The target, where it is a size: no choice is larger."""
        target = self._target(config)
        return int(target.value) if target.kind == "bytes" else None

    def _target(self, config: ModelConfig) -> Target:
        """A factor is of the model that it is applied to, unless `resolve` knew an earlier one."""
        absolute = not self.target.strip().lower().endswith("x")
        return parse_target(self.target, 2**62 if absolute else _bytes_of(config))

    def prices(self, model: Model, context: Context) -> Prices:
        """What each action is predicted to cost. Raises ValueError for kernels that are not dense."""
        kernels = _kernels(model.config)
        check_uncompressed(kernels, kernels, self.name)
        menu = menu_of(self.actions, parse_target(self.target, 2**62))
        found = price(model, context.need(self), self.actions, menu, progress=context.progress)
        return dataclasses.replace(found, weights=self.weights)

    def predict(self, model: Model, context: Context, *, key: jax.Array) -> tuple[Structure, Solution]:
        """The first choice and its predicted loss, without running it; a structure's is measured.

        Raises ValueError for a target that cannot be reached, and for kernels that are not dense.
        """
        target = parse_target(self.target, context.original.nbytes)
        prices = self.prices(model, context)
        structure = self._structure(model, prices, target, self._answers(model, context), context, key)
        priced = with_structure(prices, structure, model.config.layers)
        found = _solve(priced, _beyond(target, structure), model.config, _flops(context), structure)
        return structure, dataclasses.replace(found, loss=found.loss + structure.loss)

    def _answers(self, model: Model, context: Context) -> Answers:
        batches = context.need(self).batches(self.sentences, size=32, pad=model.config.pad_token, seed=2)
        return Answers(context.original, batches)

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        target = parse_target(self.target, context.original.nbytes)
        answers, prices = self._answers(model, context), self.prices(model, context)
        structure = self._structure(model, prices, target, answers, context, key)
        for number, step in enumerate(structure.steps(model.config.layers)):
            model = step(model, context, key=jax.random.fold_in(key, 100 + number))
        if structure.dropped or structure.tied:
            prices = self.prices(model, context)
        allowed, best, earlier = _beyond(target, structure), None, list(context.spectra)
        solution = _solve(prices, allowed, model.config, _flops(context))
        for number in range(self.corrections + _MORE):
            small, table_loss, loss, spectra = _run(model, solution, prices.menu, context, answers, key)
            log.info("Allocate: predicted loss %.4g, measured %.4g (%s)", solution.loss, loss, answers.unit)
            size = storage.file_size(tensors_of(small))
            met = {"bytes": size <= target.value, "loss": loss <= target.value, "speed": True}[target.kind]
            counted = loss + _extra(prices, solution, max(0.0, table_loss - structure.loss))
            if met and (best is None or (size < best.size if target.kind == "loss" else counted < best.counted)):
                best = _Best(small, solution, size, counted, spectra)
            near = best is not None and (target.kind != "bytes" or best.size >= _NEAR * target.value)
            if near and number >= self.corrections:
                break
            prices = _corrected(prices, solution, table_loss, loss, structure.loss)
            if target.kind == "bytes":  # what names took less, or more, than they might have
                allowed = Target("bytes", allowed.value + target.value - size)
            after = _solve(prices, allowed, model.config, _flops(context))
            if met and (_alike(solution, after) if near else solution.chosen == after.chosen):
                break
            solution = after
        if best is None:
            raise ValueError(
                f"Allocate: target {self.target} was not met in {self.corrections + _MORE} tries; ask for a little less"
            )
        context.spectra[:] = [*earlier, *best.spectra]
        context.choices[:] = [*_structure_rows(structure), *best.solution.to_json()]
        return best.model

    def _structure(
        self,
        model: Model,
        prices: Prices,
        target: Target,
        answers: Answers,
        context: Context,
        key: jax.Array,
    ) -> Structure:
        """The layers to leave out and to tie: those with which the whole is predicted to lose least."""
        best, least = Structure(), np.inf
        with contextlib.suppress(ValueError):  # what all layers cannot reach, fewer may
            least = _solve(prices, target, model.config, _flops(context)).loss
        if not {"drop", "tie"}.intersection(self.actions):
            return best
        actions = [a for a in self.actions if target.kind != "speed" or a != "tie"]
        found = structures(model, answers, context, actions, key=key, progress=context.progress)
        for structure in found:
            if structure.loss >= least:
                continue  # whatever else is done to it
            with contextlib.suppress(ValueError):
                priced = with_structure(prices, structure, model.config.layers)
                found = _solve(priced, _beyond(target, structure), model.config, _flops(context), structure)
                if structure.loss + found.loss < least:
                    best, least = structure, structure.loss + found.loss
        return best


def _extra(prices: Prices, solution: Solution, table_loss: float) -> float:
    """What the weights add to a measured loss: the table's own by what it loses alone, kernels' by predictions."""
    found = 0.0
    for address, offer in solution.chosen.items():
        found += (prices.weight(address, offer) - 1.0) * (table_loss if address == TOKEN else offer.loss)
    return found


def _kernels(config: ModelConfig) -> dict[str, Any]:
    flat = abstract_flat(config)
    return {address: flat[address] for address in sorted(walked_kernels(config))}


class _Best(NamedTuple):
    """The best of the runs that met the target; `counted` is its loss, weighted."""

    model: Model
    solution: Solution
    size: int
    counted: float
    spectra: list[dict[str, Any]]


def _beyond(target: Target, structure: Structure) -> Target:
    """What a structure leaves of a target. Raises ValueError where it leaves nothing."""
    if target.kind != "loss":
        return target
    if structure.loss >= target.value:
        raise ValueError(f"Allocate: {structure.label}: loses {structure.loss:.3g}, more than the target")
    return Target("loss", target.value - structure.loss)


def _flops(context: Context) -> int:
    """Operations per token of the original's kernels in layers, once for each layer that uses them."""
    config = context.original.config
    flat = abstract_flat(config)
    total = 0
    for address in walked_kernels(config):
        at = tree.place(address)
        assert at is not None
        n, m = flat[address].shape
        total += 2 * n * m * getattr(config.sharing, at.part).count(at.number)
    return total


def _bytes_of(config: ModelConfig) -> int:
    return sum(nbytes(node) for node in abstract_flat(config).values())


def _solve(
    prices: Prices,
    target: Target,
    config: ModelConfig,
    flops: int,
    structure: Structure = Structure(),  # noqa: B008
) -> Solution:
    """The choice for a model whose other matrices stay as they are, or go with the layers that do.

    Args:
      flops: of the original's layers, per token.
    """
    return solve(prices, target, rest=_rest(prices, config, structure), flops=flops)


def _rest(prices: Prices, config: ModelConfig, structure: Structure) -> int:
    """The bytes of what no choice changes, the file's header included."""
    changed = {*prices.kernels, TOKEN} if prices.table is not None else set(prices.kernels)
    others = {
        a: n
        for a, n in abstract_flat(with_small_tables(config)).items()
        if a not in changed and not _goes(tree.place(a), structure, config.layers)
    }
    return sum(nbytes(node) for node in others.values()) + header_bytes(others)


def _goes(at: tree.Place | None, structure: Structure, layers: int) -> bool:
    """Whether what stands there is not stored in a structure: norms are those of every layer that stays."""
    if at is None or at.stack:
        return False
    return at.number in structure.dropped if at.part == "norms" else at.number not in structure.stored(layers)


def _structure_rows(structure: Structure) -> list[dict[str, Any]]:
    """For the report: layers that went, and that share."""
    gone = [{"address": f"layers/{n}", "choice": "left out", "kind": "drop", "bytes": 0} for n in structure.dropped]
    tied = [
        {"address": f"layers/{n + 1}", "choice": f"tied to layer {n}", "kind": "tie", "bytes": 0}
        for n in structure.tied
    ]
    rows = [*gone, *tied]
    return [{**row, "loss": structure.loss / len(rows)} for row in rows]


def range_of_sizes(prices: Prices, config: ModelConfig) -> tuple[int, int]:
    """The smallest and the largest file, in bytes, that a choice makes."""
    rest = _rest(prices, config, Structure())
    sizes = [[offer.bytes for offer in undominated(offers)] for offers in prices.offers().values()]
    return rest + sum(map(min, sizes)), rest + sum(map(max, sizes))


def allocated_sizes(prices: Prices, sizes: Sequence[int], config: ModelConfig) -> list[tuple[int, Solution]]:
    """The solution for each size that can be reached."""
    found = []
    for size in sizes:
        with contextlib.suppress(ValueError):
            found.append((size, _solve(prices, Target("bytes", size), config, 0)))
    return found


def header_bytes(flat: Mapping[str, Any]) -> int:
    """At most the bytes of a file's header: names, shapes and checksums, and room for the table's tiers."""
    names = [name for address, node in flat.items() for name in to_tensors(node, address)]
    return sum(2 * len(name) + 110 for name in names) + 5000


def _run(
    model: Model, solution: Solution, menu: Menu, context: Context, answers: Answers, key: jax.Array
) -> tuple[Model, float, float, list[dict[str, Any]]]:
    """The compressed model, the loss with its table alone, its loss, and the spectra that were cut."""
    table_loss, scratch = 0.0, dataclasses.replace(context, spectra=[], healing=[])
    small = model
    for number, step in enumerate(steps_of(solution, menu)):
        step_key = jax.random.fold_in(key, number)
        if isinstance(step, Quantize):
            small = step(small, scratch, key=step_key)
            continue
        alone = step(model, scratch, key=step_key)  # on the model whose statistics are known
        chosen = [TOKEN] if isinstance(step, FactorizeEmbedding) else _ranked(solution, step)
        if chosen == [TOKEN]:
            table_loss = answers.loss(alone)
        view = tree.View(alone.params)
        small = replace_matrices(small, {address: view[address] for address in chosen})
    return small, table_loss, answers.loss(small), scratch.spectra


def _ranked(solution: Solution, step: Step) -> list[str]:
    """The kernels that a step of one rank cuts."""
    assert isinstance(step, LowRank)
    return [address for address, offer in solution.chosen.items() if offer.rank == step.rank]


def _corrected(prices: Prices, solution: Solution, table_loss: float, loss: float, structure_loss: float) -> Prices:
    """The prices, scaled so that the solution's are what was measured beyond what the structure loses."""
    table_loss, loss = table_loss - structure_loss, loss - structure_loss
    table = sum(o.loss for a, o in solution.chosen.items() if a == TOKEN)
    kernels = solution.loss - table
    scales: dict[str, Any] = dict(prices.scales)
    if table > 0 and table_loss > 0:
        scales["table"] *= table_loss / table
    if kernels > 0 and loss > table_loss:
        scales["kernels"] *= (loss - table_loss) / kernels
    return dataclasses.replace(prices, scales=scales)


def _alike(a: Solution, b: Solution) -> bool:
    """Whether two solutions differ too little for another run."""
    table = abs((a.table_bytes or 0) - (b.table_bytes or 0)) <= _SETTLED * max(a.table_bytes or 1, 1)
    others = [
        address for address, offer in a.chosen.items() if address != TOKEN and b.chosen[address].label != offer.label
    ]
    return table and len(others) <= _SETTLED * len(a.chosen)

"""One budget: bits, ranks and the token table's bytes, priced alike and chosen together."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from flaxcompress import storage, tree
from flaxcompress.compress.answers import Answers
from flaxcompress.compress.drop_layers import DropLayers
from flaxcompress.compress.factorize_embedding import TOKEN, FactorizeEmbedding
from flaxcompress.compress.guess import guess_prices
from flaxcompress.compress.kernel_offers import Menu
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
from flaxcompress.compress.statistics import Batch
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.compress.structures import Structure, structures
from flaxcompress.compress.target import Target, parse_target
from flaxcompress.config import ModelConfig
from flaxcompress.folder import tensors_of
from flaxcompress.formats import nbytes, to_tensors
from flaxcompress.model import Model, abstract_flat, replace_matrices

log = logging.getLogger("flaxcompress")

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
      corrections: how often the choice may be made again.
      sentences: calibration sentences for what is measured.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokens", "input_moments", "gradient_moments"})

    target: str
    actions: tuple[Literal["bits", "rank", "table", "drop", "tie"], ...] = ACTIONS
    corrections: int = 2
    sentences: int = 96

    def __post_init__(self):
        if not self.actions or len(set(self.actions)) != len(self.actions):
            raise ValueError(f"Allocate: actions must name some of {', '.join(ACTIONS)}, got {list(self.actions)}")
        if self.corrections < 0 or self.sentences < 1:
            raise ValueError(
                f"Allocate: corrections must be 0 or more and sentences at least 1, got {self.corrections} and "
                f"{self.sentences}"
            )
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
        menu = menu_of(self.actions, target)
        most = config.layers // 2 if "drop" in self.actions and config.decoder is None else 0
        for count in range(most + 1):  # the last ones, as good as any without data
            small = (
                DropLayers(layers=tuple(range(config.layers - count, config.layers))).plan(config) if count else config
            )
            try:
                solution = _solve(guess_prices(small, self.actions, menu), target, small)
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
        """What each action is predicted to cost."""
        menu = menu_of(self.actions, parse_target(self.target, 2**62))
        return price(model, context.need(self), self.actions, menu, progress=context.progress)

    def predict(self, model: Model, context: Context) -> Solution:
        """The first choice, without running it. Raises ValueError for a target that cannot be reached."""
        return _solve(self.prices(model, context), parse_target(self.target, context.original.nbytes), model.config)

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        target = parse_target(self.target, context.original.nbytes)
        calibration = context.need(self)
        batches = calibration.batches(self.sentences, size=32, pad=model.config.pad_token, seed=2)
        answers = Answers(context.original, batches)
        prices = self.prices(model, context)
        structure = self._structure(model, prices, target, answers, batches, context, key)
        for number, step in enumerate(structure.steps(model.config.layers)):
            model = step(model, context, key=jax.random.fold_in(key, 100 + number))
        if structure.dropped or structure.tied:
            prices = dataclasses.replace(self.prices(model, context), scales=prices.scales)
        allowed, solution = target, _solve(prices, target, model.config)
        for number in range(self.corrections + 1):
            small, table_loss, loss = _run(model, solution, prices.menu, context, answers, key)
            log.info("Allocate: predicted loss %.4g, measured %.4g (%s)", solution.loss, loss, answers.unit)
            if number == self.corrections:
                break
            prices = _corrected(prices, solution, table_loss, loss, structure.loss)
            size = storage.file_size(tensors_of(small))
            if target.kind == "bytes":  # what names took less than they might have
                allowed = Target("bytes", allowed.value + target.value - size)
            after = _solve(prices, allowed, model.config)
            if _alike(solution, after) and not (target.kind == "bytes" and size > target.value):
                break
            solution = after
        context.choices[:] = [*_structure_rows(structure), *solution.to_json()]
        return small

    def _structure(
        self,
        model: Model,
        prices: Prices,
        target: Target,
        answers: Answers,
        batches: list[Batch],
        context: Context,
        key: jax.Array,
    ) -> Structure:
        """The layers to leave out and to tie: those with which the whole is predicted to lose least."""
        best, least = Structure(), np.inf
        with contextlib.suppress(ValueError):  # what all layers cannot reach, fewer may
            least = _solve(prices, target, model.config).loss
        if not {"drop", "tie"}.intersection(self.actions):
            return best
        actions = [a for a in self.actions if target.kind != "speed" or a != "tie"]
        found = structures(model, batches, answers, context, actions, key=key, progress=context.progress)
        for structure in found:
            if structure.loss >= least:
                continue  # whatever else is done to it
            allowed = target
            if target.kind == "loss":
                if structure.loss >= target.value:
                    continue
                allowed = Target("loss", target.value - structure.loss)
            with contextlib.suppress(ValueError):
                priced = with_structure(prices, structure, model.config.layers)
                loss = structure.loss + _solve(priced, allowed, model.config, structure).loss
                if loss < least:
                    best, least = structure, loss
        return best


def _bytes_of(config: ModelConfig) -> int:
    return sum(nbytes(node) for node in abstract_flat(config).values())


def _solve(prices: Prices, target: Target, config: ModelConfig, structure: Structure = Structure()) -> Solution:  # noqa: B008
    """The choice for a model whose other matrices stay as they are, or go with the layers that do."""
    flat = abstract_flat(config)
    changed = {*prices.kernels, TOKEN} if prices.table is not None else set(prices.kernels)
    others = {
        a: n
        for a, n in abstract_flat(with_small_tables(config)).items()
        if a not in changed and not _goes(tree.place(a), structure, config.layers)
    }
    rest = sum(nbytes(node) for node in others.values()) + header_bytes(others)
    kernels = [a for a in flat if a.startswith("layers/") and a.endswith("/kernel")]
    flops = sum(2 * flat[address].shape[0] * flat[address].shape[1] for address in kernels)
    return solve(prices, target, rest=rest, flops=flops)


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


def allocated_sizes(prices: Prices, sizes: Sequence[int], config: ModelConfig) -> list[tuple[int, Solution]]:
    """The solution for each size that can be reached."""
    found = []
    for size in sizes:
        with contextlib.suppress(ValueError):
            found.append((size, _solve(prices, Target("bytes", size), config)))
    return found


def header_bytes(flat: Mapping[str, Any]) -> int:
    """At most the bytes of a file's header: names, shapes and checksums, and room for the table's tiers."""
    names = [name for address, node in flat.items() for name in to_tensors(node, address)]
    return sum(2 * len(name) + 110 for name in names) + 5000


def _run(
    model: Model, solution: Solution, menu: Menu, context: Context, answers: Answers, key: jax.Array
) -> tuple[Model, float, float]:
    """The compressed model, the loss with its table alone, and its loss."""
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
    context.spectra[:] = scratch.spectra
    return small, table_loss, answers.loss(small)


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

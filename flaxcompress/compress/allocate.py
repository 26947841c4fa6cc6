"""One budget: bits, ranks and the token table's bytes, priced alike and chosen together."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax

from flaxcompress import storage, tree
from flaxcompress.compress.answers import Answers
from flaxcompress.compress.factorize_embedding import TOKEN, FactorizeEmbedding
from flaxcompress.compress.guess import guess_prices
from flaxcompress.compress.kernel_offers import Menu
from flaxcompress.compress.solve import ACTIONS, Prices, Solution, menu_of, price, solve, steps_of, with_small_tables
from flaxcompress.compress.step import Context, Step, register_step
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
      actions: "bits" of kernels, "rank" of kernels, "table": tiers of the token table. A target of speed takes "rank"
        alone.
      corrections: how often the choice may be made again.
      sentences: calibration sentences for what is measured.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokens", "input_moments", "gradient_moments"})

    target: str
    actions: tuple[Literal["bits", "rank", "table"], ...] = ACTIONS
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
        solution = _solve(guess_prices(config, self.actions, menu), target, config)
        for step in steps_of(solution, menu):
            config = step.plan(config)
        return config

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
        allowed, solution = target, _solve(prices, target, model.config)
        for number in range(self.corrections + 1):
            small, table_loss, loss = _run(model, solution, prices.menu, context, answers, key)
            log.info("Allocate: predicted loss %.4g, measured %.4g (%s)", solution.loss, loss, answers.unit)
            if number == self.corrections:
                break
            prices = _corrected(prices, solution, table_loss, loss)
            size = storage.file_size(tensors_of(small))
            if target.kind == "bytes":  # what names took less than they might have
                allowed = Target("bytes", allowed.value + target.value - size)
            after = _solve(prices, allowed, model.config)
            if _alike(solution, after) and not (target.kind == "bytes" and size > target.value):
                break
            solution = after
        context.choices[:] = solution.to_json()
        return small


def _bytes_of(config: ModelConfig) -> int:
    return sum(nbytes(node) for node in abstract_flat(config).values())


def _solve(prices: Prices, target: Target, config: ModelConfig) -> Solution:
    """The choice for a model whose other matrices stay as they are."""
    flat = abstract_flat(config)
    changed = {*prices.kernels, TOKEN} if prices.table is not None else set(prices.kernels)
    others = {a: n for a, n in abstract_flat(with_small_tables(config)).items() if a not in changed}
    rest = sum(nbytes(node) for node in others.values()) + header_bytes(others)
    flops = sum(2 * flat[address].shape[0] * flat[address].shape[1] for address in prices.kernels)
    return solve(prices, target, rest=rest, flops=flops)


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
        if isinstance(step, FactorizeEmbedding):  # on the model whose statistics are known
            alone = step(model, scratch, key=step_key)
            table_loss = answers.loss(alone)
            small = replace_matrices(small, {TOKEN: tree.View(alone.params)[TOKEN]})
        else:
            small = step(small, scratch, key=step_key)
    context.spectra[:] = scratch.spectra
    return small, table_loss, answers.loss(small)


def _corrected(prices: Prices, solution: Solution, table_loss: float, loss: float) -> Prices:
    """The prices, scaled so that the solution's are what was measured."""
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

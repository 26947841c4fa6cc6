"""The offers of a whole model, and the choice among them that meets a target at the least predicted loss."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from flaxcompress import tree
from flaxcompress.compress.answers import Answers
from flaxcompress.compress.calibrate import Calibration
from flaxcompress.compress.choices import choose, total_of, within_loss
from flaxcompress.compress.factorize_embedding import TOKEN, FactorizeEmbedding
from flaxcompress.compress.kernel_offers import Menu, Offer, Priced, offers_of, undominated
from flaxcompress.compress.low_rank import LowRank
from flaxcompress.compress.quantize import BitsFor, Quantize
from flaxcompress.compress.sensitivity import kernel_sensitivities
from flaxcompress.compress.step import Step
from flaxcompress.compress.structures import Structure
from flaxcompress.compress.table_offers import MAX_TIERS, TableCurve, table_curve
from flaxcompress.compress.target import Target
from flaxcompress.compress.tiers import token_weights
from flaxcompress.compress.walk import walked_kernels
from flaxcompress.config import ModelConfig
from flaxcompress.formats import materialize
from flaxcompress.model import Model, abstract_flat
from flaxcompress.text import first_ordinary_token

ACTIONS = ("bits", "rank", "table", "drop", "tie")
_ANCHOR = 3  # bits at which every kernel is measured, to scale its predictions
_OTHERS_IN_8 = r"embedding/(position|segment)"


@dataclasses.dataclass(frozen=True)
class Prices:
    """What may be done to a model, and what it is predicted to cost.

    Attributes:
      kernels: {address: offers, from the cheapest}.
      table: of the token table, where it may change.
      menu: what kernels were offered.
      unit: of losses.
      scales: {"kernels", "table"}: what predictions are multiplied by, after a check against real losses.
      weights: what losses of each kind of action count in a choice; 1 where there is none.
    """

    kernels: Mapping[str, list[Offer]]
    table: TableCurve | None
    menu: Menu
    unit: str
    scales: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"kernels": 1.0, "table": 1.0})
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def weight(self, address: str, offer: Offer) -> float:
        """What an offer's loss counts; the token table's are of the kind "table", however it is stored."""
        return self.weights.get("table" if address == TOKEN else offer.kind, 1.0)

    def offers(self) -> dict[str, list[Offer]]:
        """All offers, the losses scaled."""
        found = {a: [_scaled(o, self.scales["kernels"]) for o in offers] for a, offers in self.kernels.items()}
        if self.table is not None:
            found[TOKEN] = [_scaled(o, self.scales["table"]) for o in self.table.offers()]
        return found


@dataclasses.dataclass(frozen=True)
class Solution:
    """One choice for each matrix.

    Attributes:
      chosen: {address: offer}.
      table_bytes: what the token table may take, where it is cut into tiers.
      loss: predicted, in all.
      unit: what the loss is (see `Answers`).
    """

    chosen: Mapping[str, Offer]
    table_bytes: int | None
    loss: float
    unit: str

    def kinds(self) -> dict[str, int]:
        """{kind of action: how many matrices}."""
        found: dict[str, int] = {}
        for offer in self.chosen.values():
            found[offer.kind] = found.get(offer.kind, 0) + 1
        return found

    def table(self) -> Any:
        """A rich table: how many matrices become what, their bytes and their predicted loss."""
        from rich.table import Table

        table = Table("stored as", "matrices", "MB", f"predicted loss ({self.unit})", title="choices")
        rows: dict[str, list[Offer]] = {}
        for offer in self.chosen.values():
            rows.setdefault("the token table, in tiers" if offer.kind == "table" else offer.label, []).append(offer)
        for label, offers in sorted(rows.items()):
            size, loss = sum(o.bytes for o in offers), sum(o.loss for o in offers)
            table.add_row(label, str(len(offers)), f"{size / 1e6:.2f}", f"{loss:.4f}")
        table.add_section()
        table.add_row("all, before healing", str(len(self.chosen)), "", f"{self.loss:.4f}")
        return table

    def to_json(self) -> list[dict[str, Any]]:
        """[{"address", "choice", "kind", "bytes", "loss"}]."""
        rows = []
        for address, offer in self.chosen.items():
            label = f"{offer.bytes / 1e6:.2f} MB in tiers" if offer.kind == "table" else offer.label
            rows.append(
                {"address": address, "choice": label, "kind": offer.kind, "bytes": offer.bytes, "loss": offer.loss}
            )
        return rows


def with_structure(prices: Prices, structure: Structure, layers: int) -> Prices:
    """The prices of a model so structured, as the whole one's tell: a tied kernel loses what both would."""
    kernels = {}
    for address, offers in prices.kernels.items():
        at = tree.place(address)
        assert at is not None
        if at.number not in structure.stored(layers):
            continue
        if at.number in structure.tied:
            other = {o.label: o.loss for o in prices.kernels[at._replace(number=at.number + 1).address]}
            offers = [dataclasses.replace(o, loss=o.loss + other[o.label]) for o in offers]
        kernels[address] = offers
    return dataclasses.replace(prices, kernels=kernels)


def _scaled(offer: Offer, scale: float) -> Offer:
    return offer if scale == 1.0 else dataclasses.replace(offer, loss=offer.loss * scale)


def menu_of(actions: tuple[str, ...], target: Target) -> Menu:
    """What kernels are offered when only some actions are allowed."""
    if target.kind == "speed":  # rounding saves no operations
        return Menu(bits=(None,), ranks=(0.1, 0.2, 0.3, 0.45, 0.6, 0.8), factor_bits=(None,))
    menu = Menu() if "bits" in actions else Menu(bits=(None,), factor_bits=(None,))
    return menu if "rank" in actions else dataclasses.replace(menu, ranks=())


def price(
    model: Model, calibration: Calibration, actions: tuple[str, ...], menu: Menu, *, progress: bool = False
) -> Prices:
    """Prices every action on every kernel in layers, and the token table's bytes.

    Losses are Kronecker-factored (see `kernel_offers.Priced`), and of each kernel scaled by what rounding it alone to
    3 bits really costs.
    """
    view = tree.View(model.params)
    addresses = [a for a in tree.select(view, r"layers/\d+/.*/kernel") if a in walked_kernels(model.config)]
    inputs = calibration.input_moments(model, progress=progress)
    gradients = calibration.gradient_moments(model, progress=progress)
    tokens = 1.0 if model.config.head == "causal_lm" else calibration.tokens_per_sentence()
    anchor = menu.spec(_ANCHOR, menu.factor_group)
    measured = kernel_sensitivities(model, calibration, {_ANCHOR: anchor}, addresses, progress=progress)
    kernels = {}
    for address in addresses:
        weight = np.asarray(materialize(view[address]))
        name = address.removesuffix("/kernel")
        plain = Priced(inputs[name], gradients[name], tokens)
        predicted = plain.loss(_rounded_alone(weight, anchor, inputs[name]) - weight)
        scale = tokens * measured[address][_ANCHOR] / predicted if predicted > 0 else tokens
        kernels[address] = offers_of(weight, dataclasses.replace(plain, scale=scale), menu)
    table = None
    if "table" in actions and TOKEN in view:
        start = first_ordinary_token(model.assets)
        weights = token_weights(calibration.token_counts, start=start)
        metric = calibration.token_gradient_moment(model)
        table = table_curve(np.asarray(materialize(view[TOKEN])), weights, metric, tokens)
    return Prices(kernels, table, menu, Answers(model, []).unit)


def _rounded_alone(weight: np.ndarray, spec: Any, moments: np.ndarray) -> np.ndarray:
    """As `kernel_sensitivities` rounds."""
    from flaxcompress.compress.quantize import compress_matrix

    return np.asarray(materialize(compress_matrix(weight, spec, table=False, rounding="mse", moments=moments)))


def solve(prices: Prices, target: Target, *, rest: int = 0, flops: int = 0) -> Solution:
    """The choice of least predicted loss that meets the target.

    Args:
      rest: bytes of what no action changes, the file's header included.
      flops: of the layers per token, before.

    Raises ValueError where no choice meets it, naming the smallest that is.
    """
    offers = prices.offers()
    cost = "flops" if target.kind == "speed" else "bytes"
    weigh = prices.weight if target.kind != "loss" else lambda address, offer: 1.0
    offers = {
        address: undominated(found, cost, lambda offer, a=address: weigh(a, offer) * offer.loss)
        for address, found in offers.items()
        if cost == "bytes" or address != TOKEN
    }
    costs = by_label_number(offers, cost)
    losses = {a: {i: weigh(a, offer) * offer.loss for i, offer in enumerate(found)} for a, found in offers.items()}
    if target.kind == "loss":
        chosen = within_loss(losses, costs, target.value)
    else:
        budget = int(flops / target.value) if target.kind == "speed" else int(target.value) - rest
        smallest = total_of(costs, {a: 0 for a in costs})
        if smallest > budget:
            raise ValueError(unreachable(target, int(smallest), rest, flops))
        chosen = choose(losses, costs, budget)
    found = {address: offers[address][number] for address, number in chosen.items()}
    size = None
    if TOKEN in found and found[TOKEN].kind == "table":
        size = found[TOKEN].bytes
        if target.kind == "bytes":  # what is left goes to the table: it takes any number of bytes
            size = int(target.value) - rest - sum(o.bytes for a, o in found.items() if a != TOKEN)
            assert prices.table is not None
            size = min(size, int(prices.table.bytes[-1]))
            loss = prices.table.loss(size) * prices.scales["table"]
            found[TOKEN] = dataclasses.replace(found[TOKEN], bytes=size, loss=loss)
    return Solution(found, size, sum(o.loss for o in found.values()), prices.unit)


def by_label_number(offers: Mapping[str, list[Offer]], value: str) -> dict[str, dict[int, Any]]:
    """{address: {number of the offer: bytes, flops or loss}}."""
    return {address: {i: getattr(o, value) for i, o in enumerate(found)} for address, found in offers.items()}


def unreachable(target: Target, smallest: int, rest: int, flops: int) -> str:
    """Says what the smallest reachable is."""
    if target.kind == "speed":
        return (
            f"target of {target.value:g}x-faster cannot be reached: with these actions the layers take at least "
            f"{smallest / max(flops, 1):.0%} of their operations, {flops / max(smallest, 1):.2f}x-faster"
        )
    return (
        f"target of {target.value / 1e6:.2f} MB cannot be reached; the smallest that these actions reach is "
        f"{(smallest + rest) / 1e6:.2f} MB"
    )


def with_small_tables(config: ModelConfig) -> ModelConfig:
    """The config with the tables of positions and segments in 8 bits, as `steps_of` stores them."""
    found = [a for a in abstract_flat(config) if re.fullmatch(_OTHERS_IN_8, a)]
    return Quantize(bits=8, pattern="|".join(found), rounding="mse").plan(config) if found else config


def steps_of(solution: Solution, menu: Menu, sentences: int = 768) -> list[Step]:
    """The steps that store a model as a solution says."""
    steps: list[Step] = []
    ranks: dict[int, list[str]] = {}
    for address, offer in solution.chosen.items():
        if offer.rank is not None:
            ranks.setdefault(offer.rank, []).append(re.escape(address))
    for rank, patterns in sorted(ranks.items()):
        steps.append(LowRank("|".join(patterns), rank=rank, whitening="two_sided"))
    if solution.table_bytes is not None:
        steps.append(FactorizeEmbedding(target_bytes=solution.table_bytes, max_tiers=MAX_TIERS, weighting="fisher"))
    exact = tuple(
        BitsFor(pattern=re.escape(a), bits=offer.bits, group=offer.group)
        for a, offer in solution.chosen.items()
        if offer.bits is not None
    )
    if exact:
        pattern = "|".join(o.pattern for o in exact)
        steps.append(
            Quantize(
                pattern=rf"{pattern}|{_OTHERS_IN_8}",
                overrides=exact,
                scale_dtype=menu.scale_dtype,  # pyright: ignore[reportArgumentType]
                sentences=sentences,
            )
        )
    return steps

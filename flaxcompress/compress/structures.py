"""Layers left out, and neighbours tied: what each such structure loses, measured, and what it stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from flaxcompress import tree
from flaxcompress.compress.answers import Answers
from flaxcompress.compress.drop_layers import DropLayers
from flaxcompress.compress.share import Share
from flaxcompress.compress.step import Context, Step
from flaxcompress.compress.walk import LayerWalk
from flaxcompress.model import Model
from flaxcompress.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class Structure:
    """Some layers left out, and some pairs of neighbours that share their weights.

    Attributes:
      dropped: the layers, counted from 0.
      tied: the first layer of each pair.
      loss: measured.
    """

    dropped: tuple[int, ...] = ()
    tied: tuple[int, ...] = ()
    loss: float = 0.0

    @property
    def label(self) -> str:
        """For people."""
        parts = [f"layer {layer} left out" for layer in self.dropped]
        return ", ".join([*parts, *(f"layers {layer} and {layer + 1} tied" for layer in self.tied)]) or "all layers"

    def stored(self, layers: int) -> list[int]:
        """The layers whose kernels are stored."""
        return [n for n in range(layers) if n not in self.dropped and n - 1 not in self.tied]

    def steps(self, layers: int) -> list[Step]:
        """What makes a model of `layers` layers so."""
        steps: list[Step] = [DropLayers(layers=self.dropped)] if self.dropped else []
        if self.tied:
            kept = [n for n in range(layers) if n not in self.dropped]
            steps.append(Share(map=tie_map(kept, self.tied), initializer="weighted"))
        return steps


def tie_map(kept: Sequence[int], tied: Sequence[int]) -> tuple[int, ...]:
    """Each kept layer's weight set, the second of each tied pair using the first one's."""
    found: list[int] = []
    for layer in kept:
        found.append(found[-1] if layer - 1 in tied else found[-1] + 1 if found else 0)
    return tuple(found)


def structures(
    model: Model,
    answers: Answers,
    context: Context,
    actions: Sequence[str],
    *,
    key: jax.Array,
    progress: bool = False,
) -> Iterator[Structure]:
    """Structures from one change to half of the layers: each single one, then the least harmful together.

    A model that shares already, or is not its own layers one by one, has none.
    """
    config = model.config
    layers = config.layers
    own = tuple(range(layers))
    if config.decoder is not None or layers < 2 or any(getattr(config.sharing, p) != own for p in config.sharing.parts):
        return
    walk = LayerWalk(config, tree.View(model.params), answers.batches)
    tie = "tie" in actions and config.deltas is None and not isinstance(config.feed_forward_width, tuple)
    first = 0 if config.first_norm else 1
    singles = [Structure(dropped=(layer,)) for layer in range(first, layers) if "drop" in actions]
    singles += [Structure(tied=(layer,)) for layer in range(layers - 1) if tie]
    ranked: list[Structure] = []
    with progress_bar("structures", len(singles), show=progress) as advance:
        for single in singles:
            changes = {}
            for layer in single.tied:
                changes |= _tied(model, layer, context, key)
            loss = answers.loss_of_states(walk.outcome(None, changes, without=single.dropped))
            ranked.append(dataclasses.replace(single, loss=loss))
            yield ranked[-1]
            advance()
    together = Structure()
    for single in sorted(ranked, key=lambda s: s.loss):
        dropped, tied = {*together.dropped, *single.dropped}, {*together.tied, *single.tied}
        touched = [*dropped, *tied, *(layer + 1 for layer in tied)]
        if len(touched) > len(set(touched)) or len(dropped) + len(tied) > layers // 2:
            continue
        together = Structure(tuple(sorted(dropped)), tuple(sorted(tied)))
        if len(dropped) + len(tied) > 1:
            changes = {}
            for layer in together.tied:
                changes |= _tied(model, layer, context, key)
            loss = answers.loss_of_states(walk.outcome(None, changes, without=together.dropped))
            together = dataclasses.replace(together, loss=loss)
            yield together


def _tied(model: Model, layer: int, context: Context, key: jax.Array) -> dict[str, Any]:
    """{address: what stands there} of two neighbours that share weights."""
    layers = model.config.layers
    each = tie_map(range(layers), (layer,))
    shared = tree.View(Share(map=each, initializer="weighted")(model, context, key=key).params)
    found = {}
    for address in tree.View(model.params):
        at = tree.place(address)
        if at is not None and at.number in (layer, layer + 1) and at.part in ("attention", "feed_forward"):
            found[address] = shared[at._replace(number=each[at.number]).address]
    return found

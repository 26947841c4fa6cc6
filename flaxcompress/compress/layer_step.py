"""Steps that need one layer's weights at a time: the same code runs on a model in memory and on its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from flaxcompress import tree
from flaxcompress.compress.step import Context, Step
from flaxcompress.compress.walk import LayerWalk, Stage, walked_kernels
from flaxcompress.config import ModelConfig
from flaxcompress.model import Model, replace_matrices

Changes = tuple[str, dict[str, Any]]  # a group of `tree.by_layer`, and {address: its new matrix}


class LayerStep(Step):
    """A step that changes matrices where they are, layer after layer, and never looks at a later layer's.

    `by_layer` is the whole method. It may leave out groups that it does not change, and has to
    leave out those in `context.finished`.
    """

    def by_layer(self, config: ModelConfig, weights: Mapping[str, Any], context: Context) -> Iterator[Changes]:
        """Each group of `tree.by_layer` in order, with its new matrices; `weights` are read as they are needed."""
        raise NotImplementedError(f"{self.name}.by_layer")

    def whole(self) -> str:
        """Which of the settings needs the whole model in memory, and what to set instead; "" for none."""
        return ""

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        return replace_matrices(model, gathered(self.by_layer(model.config, tree.View(model.params), context)))


def gathered(changes: Iterable[Changes]) -> dict[str, Any]:
    """All changes together."""
    return {address: node for _, group in changes for address, node in group.items()}


def unfinished(addresses: Iterable[str], context: Context) -> Iterator[tuple[str, list[str]]]:
    """The groups of these addresses that no earlier run has finished."""
    for group, members in tree.by_layer(addresses).items():
        if not any(address in context.finished for address in members):
            yield group, members


def walked(
    step: Step,
    config: ModelConfig,
    weights: Mapping[str, Any],
    context: Context,
    *,
    sentences: int,
    exchanging: bool = True,
    follow_original: bool = False,
) -> tuple[LayerWalk, Iterator[tuple[str, Iterator[Stage]]]]:
    """A walk over calibration text, and its stages by group, those of finished layers left out.

    Args:
      exchanging: what the step makes of a layer is used in it from there on, by an earlier run, too.
    """
    batches = context.need(step).batches(sentences, size=32, pad=config.pad_token)
    made = context.finished if exchanging else {}
    walk = LayerWalk(config, weights, batches, follow_original=follow_original, made=made, passed=context.finished)
    layers = walk.by_layer(label="layers", progress=context.progress)
    return walk, ((f"layers/{number}", stages) for number, stages in layers)


def check_walked(config: ModelConfig, addresses: Iterable[str], where: str) -> None:
    """Raises ValueError for kernels that a walk through the layers does not pass."""
    known = walked_kernels(config)
    if outside := [a for a in addresses if a not in known]:
        raise ValueError(
            f"{where} goes through the layers, and {', '.join(outside[:3])} stand outside; compress them by a step of "
            "their own"
        )

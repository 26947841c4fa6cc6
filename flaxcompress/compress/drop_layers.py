"""Leaving out whole layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

import jax
import numpy as np

from flaxcompress import tree
from flaxcompress.compress.renumber import rules_follow
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.config import ModelConfig, Sharing
from flaxcompress.formats import nbytes
from flaxcompress.model import Model, abstract_flat


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class DropLayers(Step):
    """Leaves out layers; what others share with them stays.

    Attributes:
      count: how many: those of least block influence, 1 - cos(h_l, h_{l+1}) on calibration text (ShortGPT, Men et al.
        2024), measured once, before any is left out. Or
      keep: the fraction of layers that stays, to the nearest number and at least one, chosen likewise. Or
      layers: which go, counted from 0.
      choice: without `layers`, which go: those of least "influence", or what leaves the others at "even" distances, the
        first and the last among them (as students are begun from their teachers, Sanh et al. 2019).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"influence"})

    count: int | None = None
    keep: float | None = None
    layers: tuple[int, ...] | None = None
    choice: Literal["influence", "even"] = "influence"

    def __post_init__(self):
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        if [self.count, self.keep, self.layers].count(None) != 2:
            raise ValueError(
                f"DropLayers: give one of count, keep and layers, got count={self.count}, keep={self.keep}, "
                f"layers={self.layers}"
            )
        if self.layers is not None and self.choice != "influence":
            raise ValueError(f"DropLayers: choice {self.choice!r} chooses layers, and layers={self.layers} are given")
        if self.keep is not None and not 0 < self.keep < 1:
            raise ValueError(f"DropLayers: keep {self.keep} must lie in (0, 1), the fraction of layers that stays")
        if self.layers == () or (self.count is not None and self.count < 1):
            raise ValueError(f"DropLayers: nothing to leave out, got count={self.count}, layers={self.layers}")

    def plan(self, config: ModelConfig) -> ModelConfig:
        """The structure without the given layers; of a count, without those that free the least bytes."""
        gone = self._known(config)
        return without_layers(config, self._lightest(config) if gone is None else gone)[0]

    def _known(self, config: ModelConfig) -> Sequence[int] | None:
        """What goes, where that takes no data."""
        if self.layers is not None or self.choice == "influence":
            return self.layers
        self._candidates(config)  # its checks
        kept = np.linspace(0, config.layers - 1, config.layers - self._count(config)).round().astype(int)
        return [layer for layer in range(config.layers) if layer not in kept]

    def _lightest(self, config: ModelConfig) -> list[int]:
        """Layers whose weight sets weigh little and are used by others: one by one, so that the plan is no less."""
        stored: dict[tuple[str, int], int] = {}
        for address, node in abstract_flat(config).items():
            if (at := tree.place(address)) is not None and not at.stack:
                stored[at.part, at.number] = stored.get((at.part, at.number), 0) + nbytes(node)
        kept, gone, candidates = list(range(config.layers)), [], self._candidates(config)
        for _ in range(self._count(config)):
            freed = {layer: 0 for layer in kept if layer in candidates}
            for part in config.sharing.parts:
                each = getattr(config.sharing, part)
                uses = [each[layer] for layer in kept]
                for layer in freed:
                    freed[layer] += stored[part, each[layer]] if uses.count(each[layer]) == 1 else 0
            gone.append(min(freed, key=lambda layer: (freed[layer], -layer)))
            kept.remove(gone[-1])
        return gone

    def _count(self, config: ModelConfig) -> int:
        """How many go."""
        if self.keep is None:
            return self.count or 0
        count = config.layers - max(1, round(self.keep * config.layers))
        if count < 1:
            raise ValueError(f"DropLayers: keep {self.keep} leaves nothing out of {config.layers} layers")
        return count

    def _candidates(self, config: ModelConfig) -> range:
        """The layers that may go: not the first one where it alone has no norm."""
        found = range(0 if config.first_norm else 1, config.layers)
        if (count := self._count(config)) > min(len(found), config.layers - 1):
            raise ValueError(f"DropLayers: count {count} leaves nothing of {config.layers} layers")
        return found

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        gone = self._known(model.config)
        if gone is None:
            influence = context.need(self).influence(model)
            found = np.asarray(self._candidates(model.config))
            gone = found[np.argsort(influence[found], kind="stable")[: self._count(model.config)]].tolist()
        config, moved = without_layers(model.config, gone)
        # A layer's output stands for what the layers after it that are left out gave as well.
        context.layers[:] = _stand_for(context.layers, gone)
        flat = tree.View(model.params)
        changes = {address: flat[before] for address, before in moved.items() if address != before}
        left = [a for a in flat if (at := tree.place(a)) and not at.stack and a not in moved]
        return model.replace(params=tree.replace(model.params, changes, drop=left), config=config)  # pyright: ignore[reportAttributeAccessIssue]


def _stand_for(layers: Sequence[int], gone: Collection[int]) -> list[int]:
    """For each layer that stays the last of the original's layers before the next one that stays."""
    kept = [layer for layer in range(len(layers)) if layer not in gone]
    ends = [after - 1 for after in kept[1:]] + [len(layers) - 1]
    return [layers[end] for end in ends]


def without_layers(config: ModelConfig, gone: Collection[int]) -> tuple[ModelConfig, dict[str, str]]:
    """The structure without some layers, its weight sets numbered anew, and {address: where the matrix stood before}.

    Raises ValueError for layers that are not there, for all of them, for a first layer that alone has no norm before
    its attention, and for a model with a decoder.
    """
    if config.decoder is not None:
        raise ValueError("DropLayers: a model with a decoder has two stacks of layers; its layers cannot be left out")
    if unknown := [layer for layer in gone if not 0 <= layer < config.layers]:
        raise ValueError(f"DropLayers: there is no layer {unknown[0]}; the model has layers 0 … {config.layers - 1}")
    kept = [layer for layer in range(config.layers) if layer not in gone]
    if not kept or len(set(gone)) != len(gone):
        what = "leaves nothing" if not kept else "names one twice"
        raise ValueError(f"DropLayers: layers {list(gone)} of {config.layers} {what}; leave some, and name each once")
    if not config.first_norm and config.sharing.norms[kept[0]] != 0:
        raise ValueError("DropLayers: layer 0 has no norm before its attention, unlike the others; it must stay")
    maps, numbers = {}, {}
    for part in config.sharing.parts:
        used = [getattr(config.sharing, part)[layer] for layer in kept]
        numbers[part] = {before: number for number, before in enumerate(dict.fromkeys(used))}
        maps[part] = tuple(numbers[part][before] for before in used)
    local = tuple(config.local[layer] for layer in kept)
    small = config.replace(
        layers=len(kept),
        sharing=Sharing(**maps),
        feed_forward_width=tuple(config.feed_forward_width_of(before) for before in numbers["feed_forward"]),
        local=local,
        window=config.window if any(local) else 0,
    )
    moved = {}
    for address in abstract_flat(config):
        if (at := tree.place(address)) is not None and at.number in numbers[at.part]:
            moved[at._replace(number=numbers[at.part][at.number]).address] = address
    return rules_follow(small, config, moved), moved

"""Narrower feed-forward networks: the channels that make the others best, and the down map fitted to them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from jaxtyping import Float

from flaxcompress import linalg
from flaxcompress.compress.matrix_statistics import INPUTS, gather
from flaxcompress.compress.narrow import check_plain, dense_rules, matrices, narrower, with_matrices
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.compress.uncompressed import check_uncompressed
from flaxcompress.config import ModelConfig
from flaxcompress.model import Model, abstract_flat

Selection = Literal["forward", "leverage"]


def compress_matrix(
    down: Float[np.ndarray, "F D"],
    second_moment: Float[np.ndarray, "F F"],
    width: int,
    *,
    ridge: float = 1e-2,
    selection: Selection = "forward",
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "k D"]]:
    """The channels that stay, and the down map that reads them (see `linalg.nystrom_columns`)."""
    reader = down if selection == "forward" else None
    kept, made = linalg.nystrom_columns(second_moment, width, ridge=ridge, reader=reader)
    return kept, made @ down


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class NystromFeedForward(Step):
    """Keeps some channels of every feed-forward network and fits the down map to them (as MoDeGPT, Lin et al. 2024).

    Attributes:
      width: how many channels stay, in every network, or
      keep: the fraction of each network's channels.
      ridge: λ of the choice and of the fit, as a share of the channels' mean second moment.
      selection: "forward" chooses channels one by one, each as the one that takes most off the output's error; by
        "leverage", those that the others explain least (MoDeGPT's choice). Both are explained at
        `linalg.nystrom_columns`.
      sentences: calibration sentences.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_moments"})

    width: int | None = None
    keep: float | None = None
    ridge: float = 1e-2
    selection: Selection = "forward"
    sentences: int = 768

    def __post_init__(self):
        if not self.ridge > 0:
            raise ValueError(f"NystromFeedForward: ridge must be positive, got {self.ridge}")

    def _widths(self, config: ModelConfig) -> tuple[int, ...]:
        check_plain(config, self.name)
        full = [config.feed_forward_width_of(number) for number in range(config.sharing.sets("feed_forward"))]
        return tuple(narrower(self.width, self.keep, one, self.name) for one in full)

    def plan(self, config: ModelConfig) -> ModelConfig:
        widths, present = self._widths(config), abstract_flat(config)
        inner = [a for a in present if a.startswith("layers/") and "/feed_forward/" in a]
        check_uncompressed(present, inner, self.name)
        return dense_rules(config, inner).replace(feed_forward_width=widths)

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        widths = self._widths(model.config)
        prefixes = [f"layers/{number}/feed_forward/" for number in range(len(widths))]
        shapes = {
            f"{p}down/kernel": (model.config.feed_forward_width_of(number), model.config.width)
            for number, p in enumerate(prefixes)
        }
        settings: Any = {"sentences": self.sentences, "where": self.name, "progress": context.progress}
        known = gather(model, context.need(self), shapes, {INPUTS}, **settings)
        changes: dict[str, np.ndarray] = {}
        for prefix, width in zip(prefixes, widths, strict=True):
            held = matrices(model, prefix, self.name)
            moment = known[f"{prefix}down/kernel"].input_moments
            assert moment is not None
            kept, down = compress_matrix(held["down/kernel"], moment, width, ridge=self.ridge, selection=self.selection)
            changes[f"{prefix}down/kernel"] = down
            for path in (p for p in held if p.split("/")[0] in ("up", "gate")):
                changes[prefix + path] = held[path][..., kept]
        return with_matrices(model, self.plan(model.config), changes)

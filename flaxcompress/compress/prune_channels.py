"""Narrower feed-forward networks: some channels left out, and the down map fitted to the others."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from flaxcompress.compress.narrow import check_plain, dense_rules, matrices, narrower, with_matrices
from flaxcompress.compress.step import Context, register_step
from flaxcompress.compress.structured import StructuredPruning, cut_to
from flaxcompress.compress.uncompressed import check_uncompressed
from flaxcompress.config import ModelConfig
from flaxcompress.model import Model, abstract_flat


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneChannels(StructuredPruning):
    """Leaves out channels of every feed-forward network, and fits the down map to the others.

    Chosen by error or leverage, this is MoDeGPT's cut of feed-forwards (Lin et al. 2024).

    Attributes:
      width: how many channels stay, in every network, or
      keep: the fraction of each network's channels.
      by, repair, ridge, sentences: see `StructuredPruning`.
    """

    width: int | None = None
    keep: float | None = None

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
        readers = {
            f"layers/{number}/feed_forward/down/kernel": (
                model.config.feed_forward_width_of(number),
                model.config.width,
            )
            for number in range(len(widths))
        }
        known = self.statistics(model, context, readers)
        kept, fitted = {}, {}
        for number, (address, width) in enumerate(zip(readers, widths, strict=True)):
            prefix = f"layers/{number}/feed_forward/"
            down = matrices(model, prefix, self.name)["down/kernel"]
            kept[prefix] = self.chosen([down], [known[address]], width)
            fitted[address] = self.refitted(down, known[address], kept[prefix])

        def channels(address: str, axis: str | None) -> np.ndarray:
            del axis  # no other dimension gets shorter
            return next(ids for prefix, ids in kept.items() if address.startswith(prefix))

        small = cut_to(model, self.plan(model.config), channels)
        return with_matrices(small, small.config, fitted)

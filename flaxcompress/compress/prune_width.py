"""A narrower model: some entries of every token's vector left out, from the tables to the head."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import numpy as np

from flaxcompress import tree
from flaxcompress.compress.matrix_statistics import INPUTS, gather
from flaxcompress.compress.narrow import narrower
from flaxcompress.compress.selection import largest
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.compress.structured import cut_to
from flaxcompress.compress.uncompressed import check_uncompressed
from flaxcompress.config import ModelConfig
from flaxcompress.model import Model, abstract_flat


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneWidth(Step):
    """Leaves out entries of the residual stream: the same ones of all tables, norms and maps that write or read it.

    Heads keep their number and width, feed-forwards theirs; tables of a width of their own (ALBERT's) keep it. A norm
    now goes over fewer entries, so that healing is needed, by terms that do not compare vectors of different widths:
    `Heal(cosine=0, hidden=0, relations=1)`.

    Attributes:
      width: D, how many entries stay, or
      keep: the fraction of them.
      multiple: what the width is a multiple of.
      by: what stays: by "activation", the entries of largest mean square where layers read them, summed over layers
        as shares (Minitron, Muralidharan et al. 2024); by "gradient", of largest expected squared change of the
        model's answer, ΣF·w² over all that is sliced; by "magnitude", of largest Σw², which needs no text.
      sentences: calibration sentences.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_moments"})

    width: int | None = None
    keep: float | None = None
    multiple: int = 1
    by: Literal["activation", "gradient", "magnitude"] = "activation"
    sentences: int = 768

    def __post_init__(self):
        for name in ("multiple", "sentences"):
            if getattr(self, name) < 1:
                raise ValueError(f"PruneWidth: {name} must be at least 1, got {getattr(self, name)}")

    def plan(self, config: ModelConfig) -> ModelConfig:
        width = narrower(self.width, self.keep, config.width, self.name, self.multiple)
        present = abstract_flat(config)
        check_uncompressed(present, present, self.name)

        def cut(part: ModelConfig, **more: ModelConfig) -> ModelConfig:
            return part.replace(width=width, head_width=part.head_dim, **more)

        return cut(config) if config.decoder is None else cut(config, decoder=cut(config.decoder))

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        planned = self.plan(model.config)
        scores = self._of_activations(model, context) if self.by == "activation" else self._of_weights(model, context)
        kept = largest(scores, planned.width)
        return cut_to(model, planned, lambda address, axis: kept)

    def _of_activations(self, model: Model, context: Context) -> np.ndarray:
        config = model.config
        readers = {
            address: tuple(node.shape)
            for address, node in abstract_flat(config).items()
            if (at := tree.place(address)) is not None
            and not at.stack
            and (at.part, at.path) in (("attention", "query/kernel"), ("feed_forward", "up/kernel"))
        }
        if not readers:
            raise ValueError("PruneWidth: this kind of attention and feed-forward has no queries; use by: magnitude")
        known = gather(
            model,
            context.need(self),
            readers,
            {INPUTS},
            sentences=self.sentences,
            where=self.name,
            progress=context.progress,
        )
        squares = [np.diagonal(np.asarray(one.input_moments)).astype(np.float64) for one in known.values()]
        return np.sum([one / max(one.sum(), np.finfo(np.float64).tiny) for one in squares], axis=0)

    def _of_weights(self, model: Model, context: Context) -> np.ndarray:
        fisher = context.need(self).fisher(model, progress=context.progress) if self.by == "gradient" else {}
        view, total = tree.View(model.params), np.zeros(model.config.width)
        for address, planned in abstract_flat(self.plan(model.config)).items():
            node = np.asarray(view[address], np.float64)
            squares = np.square(node) * np.asarray(fisher.get(address, 1.0), np.float64)
            for axis, (before, after) in enumerate(zip(node.shape, planned.shape, strict=True)):
                if before != after:
                    total += squares.sum(tuple(a for a in range(node.ndim) if a != axis))
        return total

"""Masked language modelling, with the order of sentences."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flaxcompress.data.masking import masked_count
from flaxcompress.data.tasks import masked_lm_batches
from flaxcompress.train.objectives import MaskedLM
from flaxcompress.train.tasks.base import Task, integers, token_shapes
from flaxcompress.train.tasks.data import TextData


class _Data(TextData):
    def _batches(self, assets, model, *, validation, **options):
        names = ("mask_rate", "ngram", "whole_word", "sentence_order", "pack")
        options |= {name: getattr(self.task, name) for name in names}
        return masked_lm_batches(self._corpus(validation), assets, **self._rows(model), **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLMTask(Task):
    """Masked tokens, and whether two stretches of text are in order (see `data.masked_lm_batches`).

    Attributes:
      order_weight: of the sentences' order in the loss.
    """

    name: ClassVar[str] = "masked_lm"

    mask_rate: float = 0.15
    ngram: int = 3
    whole_word: bool = True
    sentence_order: bool = False
    order_weight: float = 1.0
    pack: bool = False

    @property
    def head(self):
        return "pretraining" if self.sentence_order else "masked_lm"

    def data(self, files, training):
        return _Data(self, files, training)

    def objective(self, z_loss):
        return MaskedLM(order=self.order_weight, z_loss=z_loss)

    def shapes(self, rows, length, model):
        few = integers(rows, masked_count(length, self.mask_rate))
        more = {"segment_ids": integers(rows, length), "label_positions": few, "labels": few}
        more |= {"order_labels": integers(rows)} if self.sentence_order else {}
        return token_shapes(rows, length, packed=self.pack, **more)

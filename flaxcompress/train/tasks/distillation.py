"""What a teacher computes on text."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from flaxcompress.data.labelled import Labelled
from flaxcompress.data.tasks import causal_lm_batches, classification_batches
from flaxcompress.folder import load
from flaxcompress.train.objectives import Distill
from flaxcompress.train.tasks.base import Task, integers, token_shapes
from flaxcompress.train.tasks.data import TextData

_SETTINGS = ("cosine", "hidden", "logits", "logit_error", "temperature", "layers")


class _Data(TextData):
    def _batches(self, assets, model, *, validation, **options):
        corpus, options = self._corpus(validation), {**self._rows(model), **options}
        if model.causal:
            return causal_lm_batches(corpus, assets, pack=True, **options)
        texts = list(corpus.documents())
        return classification_batches(Labelled(texts, np.zeros(len(texts), np.int32), ()), assets, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillTask(Task):
    """What a teacher computes on text.

    Attributes:
      teacher: a folder, a hub id, or minilm.
      cosine, hidden, logits, logit_error, temperature, layers: the loss's terms, see `Distill`. The classic
        ½·(KL + λ·MSE) of logits is cosine: 0, hidden: 0, logits: 0.5, logit_error: λ/2.
    """

    name: ClassVar[str] = "distill"
    has_z_loss: ClassVar[bool] = False

    teacher: str
    cosine: float = 1.0
    hidden: float = 1.0
    logits: float = 1.0
    logit_error: float = 0.0
    temperature: float = 1.0
    layers: tuple[int, ...] = ()

    @property
    def head(self):
        return "none"

    def data(self, files, training):
        return _Data(self, files, training)

    def objective(self, z_loss):
        weights = {name: getattr(self, name) for name in _SETTINGS}
        return Distill(teacher=load(self.teacher), **weights)

    def shapes(self, rows, length, model):
        if model.causal:
            return token_shapes(rows, length, packed=True, labels=integers(rows, length))
        return token_shapes(rows, length, segment_ids=integers(rows, length), labels=integers(rows))

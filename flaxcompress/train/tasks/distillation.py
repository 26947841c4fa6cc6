"""What a teacher computes on text."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from flaxcompress.data.labelled import Labelled
from flaxcompress.data.tasks import causal_lm_batches, classification_batches
from flaxcompress.folder import load
from flaxcompress.train.objectives import Distill
from flaxcompress.train.objectives.terms import Settings, check_settings, values_of
from flaxcompress.train.tasks.base import Task, integers, token_shapes
from flaxcompress.train.tasks.data import TextData


class _Data(TextData):
    def _batches(self, assets, model, *, validation, **options):
        corpus, options = self._corpus(validation), {**self._rows(model), **options}
        if model.causal:
            return causal_lm_batches(corpus, assets, pack=True, **options)
        if self.task.hard:
            raise ValueError("task/hard: texts have no labels but a causal model's next tokens; leave it out")
        texts = list(corpus.documents())
        return classification_batches(Labelled(texts, np.zeros(len(texts), np.int32), ()), assets, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillTask(Settings, Task):
    """What a teacher computes on text.

    Attributes:
      teacher: a folder, a hub id, or minilm.

    The others are those of the loss's terms (`objectives/terms/`). The classic ½·(KL + λ·MSE) of logits is cosine: 0,
    hidden: 0, logits: 0.5, logit_error: λ/2. Labels for `hard` are a causal model's next tokens.
    """

    name: ClassVar[str] = "distill"
    has_z_loss: ClassVar[bool] = False

    teacher: str

    def __post_init__(self):
        check_settings(self, f"task/{self.name}")

    @property
    def head(self):
        return "none"

    def data(self, files, training):
        return _Data(self, files, training)

    def objective(self, z_loss):
        return Distill(teacher=load(self.teacher), **values_of(self))

    def shapes(self, rows, length, model):
        if model.causal:
            return token_shapes(rows, length, packed=True, labels=integers(rows, length))
        return token_shapes(rows, length, segment_ids=integers(rows, length), labels=integers(rows))

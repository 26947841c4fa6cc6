"""Runs of tokens that were taken out of a text."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flaxcompress.data.tasks import span_corruption_batches
from flaxcompress.train.objectives import NextToken
from flaxcompress.train.tasks.data import TextData
from flaxcompress.train.tasks.seq2seq import Seq2SeqTask


class _Data(TextData):
    def _batches(self, assets, model, *, validation, **options):
        task = self.task
        options |= {"density": task.density, "mean_span": task.mean_span}
        return span_corruption_batches(self._corpus(validation), assets, **self._rows(model), **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruptionTask(Seq2SeqTask):
    """Runs of tokens that were taken out of a text, told by a decoder (see `data.span_corruption_batches`)."""

    name: ClassVar[str] = "span_corruption"
    sentinels: ClassVar[int] = 100  # as T5 has

    density: float = 0.15
    mean_span: float = 3.0

    def data(self, files, training):
        return _Data(self, files, training)

    def objective(self, z_loss):
        return NextToken(z_loss=z_loss)

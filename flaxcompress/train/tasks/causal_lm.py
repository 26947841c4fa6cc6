"""Causal language modelling."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flaxcompress.data.tasks import causal_lm_batches
from flaxcompress.train.objectives import NextToken
from flaxcompress.train.tasks.base import Task, integers, token_shapes
from flaxcompress.train.tasks.data import TextData


class _Data(TextData):
    def _batches(self, assets, model, *, validation, **options):
        task = self.task
        return causal_lm_batches(self._corpus(validation), assets, pack=task.pack, **self._rows(model), **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLMTask(Task):
    """The next token (see `data.causal_lm_batches`)."""

    name: ClassVar[str] = "causal_lm"
    structure: ClassVar[str] = "decoder"

    pack: bool = True

    @property
    def head(self):
        return "causal_lm"

    def data(self, files, training):
        return _Data(self, files, training)

    def objective(self, z_loss):
        return NextToken(z_loss=z_loss)

    def shapes(self, rows, length, model):
        return token_shapes(rows, length, packed=self.pack, labels=integers(rows, length))

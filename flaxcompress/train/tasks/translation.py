"""A second text from a first one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from flaxcompress.data.parallel import read_parallel
from flaxcompress.data.tasks import translation_batches
from flaxcompress.train.objectives import NextToken
from flaxcompress.train.tasks.data import TaskData
from flaxcompress.train.tasks.seq2seq import Seq2SeqTask


class _Data(TaskData):
    def texts(self) -> Iterator[str]:
        pairs = read_parallel(*self._sides(validation=False), max_bad_lines=self.files.max_bad_lines)
        for pair in self._portion(validation=False).of(pairs):
            yield from pair

    def _sides(self, validation: bool) -> tuple[list[str], list[str]]:
        files, targets = self._files(validation), self._targets(validation)
        if targets:
            return files, targets
        source, target = self.files.columns
        return [f"{file}:{source}" for file in files], [f"{file}:{target}" for file in files]

    def _batches(self, assets, model, *, validation, **options):
        options |= {"max_bad_lines": self.files.max_bad_lines, "portion": self._portion(validation)}
        return translation_batches(*self._sides(validation), assets, **self._rows(model), **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslationTask(Seq2SeqTask):
    """A second text from a first one (see `data.translation_batches`).

    Attributes:
      label_smoothing: the share of the target spread over the vocabulary.
    """

    name: ClassVar[str] = "translation"
    columns: ClassVar[tuple[int, ...]] = (2,)
    targets: ClassVar[str] = "needed"

    label_smoothing: float = 0.1

    def data(self, files, training):
        return _Data(self, files, training)

    def objective(self, z_loss):
        return NextToken(label_smoothing=self.label_smoothing, z_loss=z_loss)

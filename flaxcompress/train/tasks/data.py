"""From settings to batches: what tasks have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flaxcompress.config import ModelConfig
from flaxcompress.data.batches import PlannedBatches
from flaxcompress.data.documents import Corpus
from flaxcompress.data.portion import Portion
from flaxcompress.text import Assets
from flaxcompress.train.settings import DataSettings, TrainingSettings


@dataclasses.dataclass(frozen=True)
class TaskData:
    """The data of a run, read when asked for."""

    task: Any
    files: DataSettings
    training: TrainingSettings

    @property
    def classes(self) -> int | None:
        """C, of data with labels that are classes; None for all others."""
        return None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, where the data name them."""
        return ()

    def described(self, assets: Assets, model: ModelConfig) -> Assets:
        """The assets with what only the data say of a model: the names of its classes."""
        if len(self.names) != model.classes or all(name.isdecimal() for name in self.names):
            return assets
        return dataclasses.replace(assets, classes=self.names)

    def texts(self) -> Iterator[str]:
        """The training text, for a tokenizer to learn from."""
        raise NotImplementedError(f"{type(self).__name__}.texts")

    def train(self, assets: Assets, model: ModelConfig) -> PlannedBatches:
        """Endless batches, shuffled."""
        return self._batches(assets, model, validation=False, threads=self.files.threads)

    def validation(self, assets: Assets, model: ModelConfig) -> PlannedBatches:
        """One pass over the validation data, always the same."""
        return self._batches(assets, model, validation=True, epochs=1, shuffle=False, threads=self.files.threads)

    def _batches(self, assets: Assets, model: ModelConfig, *, validation: bool, **options: Any) -> PlannedBatches:
        raise NotImplementedError(f"{type(self).__name__}._batches")

    def _files(self, validation: bool) -> list[str]:
        data = self.files
        return list(data.validation if validation and data.validation else data.train)

    def _targets(self, validation: bool) -> list[str]:
        data = self.files
        return list(data.validation_targets if validation and data.validation else data.train_targets)

    def _portion(self, validation: bool) -> Portion:
        return Portion(self.files.hold_out, held_out=validation)

    @property
    def _sizes(self) -> dict[str, Any]:
        training = self.training
        return {"batch_size": training.batch_size, "seed": training.seed}

    def _rows(self, model: ModelConfig) -> dict[str, Any]:
        """What all functions that make batches of texts take."""
        training = self.training
        lengths = {"length": training.length, "buckets": training.buckets}
        return {"vocabulary": model.vocabulary, "pad": model.pad_token, **lengths, **self._sizes}


class TextData(TaskData):
    """Documents."""

    def texts(self) -> Iterator[str]:
        yield from self._corpus(validation=False).documents()

    def _corpus(self, validation: bool) -> Corpus:
        data = self.files
        return Corpus(
            self._files(validation),
            column=data.columns[0] if data.columns else None,
            separator=data.separator,
            max_bad_lines=data.max_bad_lines,
            cache=None if data.cache is None else Path(data.cache),
            portion=self._portion(validation),
        )

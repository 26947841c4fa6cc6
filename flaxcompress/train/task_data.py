"""From settings to batches: what each task reads, and how its batches are made."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flaxcompress.config import ModelConfig
from flaxcompress.data.batches import PlannedBatches
from flaxcompress.data.documents import Corpus
from flaxcompress.data.images import Images, read_images
from flaxcompress.data.labelled import Labelled, read_labelled
from flaxcompress.data.parallel import read_parallel
from flaxcompress.data.portion import Portion
from flaxcompress.data.tasks import (
    causal_lm_batches,
    classification_batches,
    image_batches,
    masked_lm_batches,
    span_corruption_batches,
    translation_batches,
)
from flaxcompress.text import Assets
from flaxcompress.train.config import DataSettings, TrainConfig
from flaxcompress.train.tasks import (
    CausalLMTask,
    ClassificationTask,
    DistillTask,
    ImagesTask,
    MaskedLMTask,
    SpanCorruptionTask,
    TranslationTask,
)


@dataclasses.dataclass(frozen=True)
class TaskData:
    """The data of a run, read when asked for."""

    config: TrainConfig

    @property
    def classes(self) -> int | None:
        """C, of data with labels that are classes; None for all others."""
        return None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, where the data name them."""
        return ()

    def texts(self) -> Iterator[str]:
        """The training text, for a tokenizer to learn from."""
        raise NotImplementedError(f"{type(self).__name__}.texts")

    def train(self, assets: Assets, model: ModelConfig) -> PlannedBatches:
        """Endless batches, shuffled."""
        return self._batches(assets, model, validation=False, threads=self.config.data.threads)

    def validation(self, assets: Assets, model: ModelConfig) -> PlannedBatches:
        """One pass over the validation data, always the same."""
        return self._batches(assets, model, validation=True, epochs=1, shuffle=False, threads=self.config.data.threads)

    def _batches(self, assets: Assets, model: ModelConfig, *, validation: bool, **options: Any) -> PlannedBatches:
        raise NotImplementedError(f"{type(self).__name__}._batches")

    def _files(self, validation: bool) -> list[str]:
        data = self.config.data
        return list(data.validation if validation and data.validation else data.train)

    def _targets(self, validation: bool) -> list[str]:
        data = self.config.data
        return list(data.validation_targets if validation and data.validation else data.train_targets)

    def _portion(self, validation: bool) -> Portion:
        return Portion(self.config.data.hold_out, held_out=validation)

    @property
    def _sizes(self) -> dict[str, Any]:
        training = self.config.training
        return {"batch_size": training.batch_size, "seed": training.seed}

    @property
    def _lengths(self) -> dict[str, Any]:
        training = self.config.training
        return {"length": training.length, "buckets": training.buckets}


class TextData(TaskData):
    """Documents, for language models and for distillation."""

    def texts(self) -> Iterator[str]:
        yield from self._corpus(validation=False).documents()

    def _corpus(self, validation: bool) -> Corpus:
        data = self.config.data
        return Corpus(
            self._files(validation),
            column=data.columns[0] if data.columns else None,
            separator=data.separator,
            max_bad_lines=data.max_bad_lines,
            cache=None if data.cache is None else Path(data.cache),
            portion=self._portion(validation),
        )

    def _batches(self, assets, model, *, validation, **options):
        corpus, task = self._corpus(validation), self.config.task
        options |= {"pad": model.pad_token, **self._lengths, **self._sizes}
        options["vocabulary"] = model.vocabulary
        if isinstance(task, MaskedLMTask):
            names = ("mask_rate", "ngram", "whole_word", "sentence_order", "pack")
            return masked_lm_batches(corpus, assets, **{n: getattr(task, n) for n in names}, **options)
        if isinstance(task, SpanCorruptionTask):
            return span_corruption_batches(corpus, assets, density=task.density, mean_span=task.mean_span, **options)
        if isinstance(task, DistillTask) and not model.causal:
            texts = list(corpus.documents())
            unlabelled = Labelled(texts, np.zeros(len(texts), np.int32), ())
            return classification_batches(unlabelled, assets, **options)
        return causal_lm_batches(corpus, assets, pack=getattr(task, "pack", True), **options)


class PairData(TaskData):
    """Texts and their translations."""

    def texts(self) -> Iterator[str]:
        pairs = read_parallel(*self._sides(validation=False), max_bad_lines=self.config.data.max_bad_lines)
        for pair in self._portion(validation=False).of(pairs):
            yield from pair

    def _sides(self, validation: bool) -> tuple[list[str], list[str]]:
        files, targets = self._files(validation), self._targets(validation)
        if targets:
            return files, targets
        source, target = self.config.data.columns
        return [f"{file}:{source}" for file in files], [f"{file}:{target}" for file in files]

    def _batches(self, assets, model, *, validation, **options):
        return translation_batches(
            *self._sides(validation),
            assets,
            max_bad_lines=self.config.data.max_bad_lines,
            portion=self._portion(validation),
            vocabulary=model.vocabulary,
            pad=model.pad_token,
            **self._lengths,
            **self._sizes,
            **options,
        )


class LabelledData(TaskData):
    """Texts with classes or numbers."""

    @property
    def classes(self) -> int | None:
        task = self.config.task
        return 1 if isinstance(task, ClassificationTask) and task.regression else len(self._read(False).names)

    @property
    def names(self) -> tuple[str, ...]:
        return self._read(False).names

    def texts(self) -> Iterator[str]:
        for text in self._read(False).texts:
            yield from (text,) if isinstance(text, str) else text

    def _read(self, validation: bool) -> Labelled:
        task, portion = self.config.task, self._portion(validation)
        assert isinstance(task, ClassificationTask)
        if not portion.count:
            return _read_labelled(self.config.data, task.regression, validation)
        found = _read_labelled(self.config.data, task.regression, False)
        rows = np.fromiter(portion.of(range(len(found.labels))), np.int64)
        return Labelled([found.texts[i] for i in rows], found.labels[rows], found.names)  # pyright: ignore[reportArgumentType]

    def _batches(self, assets, model, *, validation, **options):
        return classification_batches(
            self._read(validation),
            assets,
            vocabulary=model.vocabulary,
            classes=None if model.classes == 1 else model.classes,
            pad=model.pad_token,
            **self._lengths,
            **self._sizes,
            **options,
        )


@functools.lru_cache(maxsize=2)
def _read_labelled(data: DataSettings, regression: bool, validation: bool) -> Labelled:
    options: dict[str, Any] = {"regression": regression, "max_bad_lines": data.max_bad_lines}
    if data.columns:
        *texts, label = data.columns
        options |= {"label": label, "text": texts[0], "pair": texts[1] if len(texts) > 1 else None}
    if validation and not regression:
        options["names"] = _read_labelled(data, regression, False).names
    return read_labelled(list(data.validation if validation else data.train), **options)


class ImageData(TaskData):
    """Images with classes."""

    @property
    def classes(self) -> int | None:
        return int(self._whole(False).labels.max()) + 1

    def texts(self) -> Iterator[str]:
        raise ValueError("tokenizer: images have no text; leave it out")

    def _read(self, validation: bool) -> Images:
        found, portion = self._whole(validation), self._portion(validation)
        rows = np.fromiter(portion.of(range(len(found.labels))), np.int64) if portion.count else slice(None)
        return Images(found.images[rows], found.labels[rows])

    def _whole(self, validation: bool) -> Images:
        return _read_images(tuple(self._files(validation)), tuple(self._targets(validation)))

    def _batches(self, assets, model, *, validation, **options):
        task = self.config.task
        assert isinstance(task, ImagesTask)
        varied = {} if validation else {"flip": task.flip, "shift": task.shift}
        return image_batches(
            self._read(validation),
            mean=task.mean,
            std=task.std,
            classes=model.classes,
            **varied,
            **self._sizes,
            **options,
        )


@functools.lru_cache(maxsize=2)
def _read_images(files: tuple[str, ...], targets: tuple[str, ...]) -> Images:
    parts = [read_images(file, labels) for file, labels in zip(files, targets or [None] * len(files), strict=True)]
    return Images(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


_KINDS: dict[type, type[TaskData]] = {
    MaskedLMTask: TextData,
    CausalLMTask: TextData,
    SpanCorruptionTask: TextData,
    DistillTask: TextData,
    TranslationTask: PairData,
    ClassificationTask: LabelledData,
    ImagesTask: ImageData,
}


def task_data(config: TrainConfig) -> TaskData:
    """The data that a run's task reads."""
    return _KINDS[type(config.task)](config)

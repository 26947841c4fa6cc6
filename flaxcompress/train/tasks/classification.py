"""A class, or a number, for each text or pair of texts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress.data.labelled import Labelled, read_labelled
from flaxcompress.data.tasks import classification_batches
from flaxcompress.train.objectives import Classification
from flaxcompress.train.settings import DataSettings
from flaxcompress.train.tasks.base import Task, integers, token_shapes
from flaxcompress.train.tasks.data import TaskData


class LabelledData(TaskData):
    """Texts with classes or numbers."""

    @property
    def classes(self) -> int | None:
        return 1 if self._regression else len(self._read(False).names)

    @property
    def names(self) -> tuple[str, ...]:
        return self._read(False).names

    def texts(self) -> Iterator[str]:
        for text in self._read(False).texts:
            yield from (text,) if isinstance(text, str) else text

    @property
    def _regression(self) -> bool:
        return self.task.regression

    def _read(self, validation: bool) -> Labelled:
        portion = self._portion(validation)
        if not portion.count:
            return _read_labelled(self.files, self._regression, validation)
        found = _read_labelled(self.files, self._regression, False)
        rows = np.fromiter(portion.of(range(len(found.labels))), np.int64)
        return Labelled([found.texts[i] for i in rows], found.labels[rows], found.names)  # pyright: ignore[reportArgumentType]

    def _batches(self, assets, model, *, validation, **options):
        options["classes"] = None if model.classes == 1 else model.classes
        return classification_batches(self._read(validation), assets, **self._rows(model), **options)


@functools.lru_cache(maxsize=2)
def _read_labelled(data: DataSettings, regression: bool, validation: bool) -> Labelled:
    options: dict[str, Any] = {"regression": regression, "max_bad_lines": data.max_bad_lines}
    if data.columns:
        *texts, label = data.columns
        options |= {"label": label, "text": texts[0], "pair": texts[1] if len(texts) > 1 else None}
    if validation and not regression:
        options["names"] = _read_labelled(data, regression, False).names
    return read_labelled(list(data.validation if validation else data.train), **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationTask(Task):
    """A class, or a number, for each text or pair of texts (see `data.read_labelled`).

    Attributes:
      label_smoothing: the share of the target spread over all classes.
      regression: labels are numbers.
      class_weights: what an example of each class counts, in the order of the classes.
    """

    name: ClassVar[str] = "classification"
    columns: ClassVar[tuple[int, ...]] = (2, 3)
    has_z_loss: ClassVar[bool] = False

    label_smoothing: float = 0.0
    regression: bool = False
    class_weights: tuple[float, ...] = ()

    def __post_init__(self):
        if self.regression and (self.class_weights or self.label_smoothing):
            raise ValueError("task: numbers have no classes; leave class_weights and label_smoothing out")

    @property
    def head(self):
        return "sequence_classification"

    def data(self, files, training):
        return LabelledData(self, files, training)

    def objective(self, z_loss):
        return Classification(label_smoothing=self.label_smoothing, class_weights=self.class_weights)

    def shapes(self, rows, length, model):
        labels = jax.ShapeDtypeStruct((rows,), jnp.float32 if self.regression else jnp.int32)
        return token_shapes(rows, length, segment_ids=integers(rows, length), labels=labels)

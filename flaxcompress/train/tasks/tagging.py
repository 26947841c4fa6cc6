"""A class for each word of a sentence."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import ClassVar

from flaxcompress.data.conll import Tagged, read_conll
from flaxcompress.data.tasks import tagging_batches
from flaxcompress.train.objectives import Classification
from flaxcompress.train.tasks.base import Task, integers, token_shapes
from flaxcompress.train.tasks.data import TaskData

_OUTSIDE = "O"


class _Data(TaskData):
    @property
    def classes(self) -> int | None:
        return len(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """O first, then the others in order."""
        found = {tag for tags in _read(tuple(self._files(False))).tags for tag in tags}
        return tuple(sorted(found, key=lambda tag: (tag != _OUTSIDE, tag)))

    def texts(self) -> Iterator[str]:
        yield from map(" ".join, self._sentences(False).words)

    def _sentences(self, validation: bool) -> Tagged:
        found, portion = _read(tuple(self._files(validation))), self._portion(validation)
        if not portion.count:
            return found
        rows = list(portion.of(range(len(found.words))))
        return Tagged(*([side[i] for i in rows] for side in found))

    def _batches(self, assets, model, *, validation, **options):
        options |= {"names": self.names, "classes": model.classes}
        return tagging_batches(self._sentences(validation), assets, **self._rows(model), **options)


@functools.lru_cache(maxsize=2)
def _read(files: tuple[str, ...]) -> Tagged:
    parts = [read_conll(file) for file in files]
    return Tagged(*(list(itertools.chain.from_iterable(side)) for side in zip(*parts, strict=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaggingTask(Task):
    """A tag for each word: entities (O, B-kind, I-kind), parts of speech; files as `read_conll` reads them.

    Attributes:
      label_smoothing: the share of the target spread over all tags.
      class_weights: what a word with each tag counts; O comes first, the others in the order of their names.
    """

    name: ClassVar[str] = "tokens"
    columns: ClassVar[tuple[int, ...]] = ()
    has_z_loss: ClassVar[bool] = False

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()

    @property
    def head(self):
        return "token_classification"

    def data(self, files, training):
        return _Data(self, files, training)

    def objective(self, z_loss):
        return Classification(label_smoothing=self.label_smoothing, class_weights=self.class_weights)

    def shapes(self, rows, length, model):
        return token_shapes(rows, length, labels=integers(rows, length))

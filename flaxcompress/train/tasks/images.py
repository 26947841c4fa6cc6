"""A class for each image."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress.data.images import Images, read_images, with_pixel_scale
from flaxcompress.data.tasks import image_batches
from flaxcompress.train.objectives import Classification
from flaxcompress.train.tasks.base import Task, integers
from flaxcompress.train.tasks.data import TaskData


class _Data(TaskData):
    @property
    def classes(self) -> int | None:
        return int(self._whole(False).labels.max()) + 1

    def described(self, assets, model):
        """The assets with the scale of pixels."""
        if model.patches is None:
            return assets
        return with_pixel_scale(assets, model.patches, self.task.mean, self.task.std)

    def texts(self) -> Iterator[str]:
        raise ValueError("tokenizer: images have no text; leave it out")

    def _read(self, validation: bool) -> Images:
        found, portion = self._whole(validation), self._portion(validation)
        rows = np.fromiter(portion.of(range(len(found.labels))), np.int64) if portion.count else slice(None)
        return Images(found.images[rows], found.labels[rows])

    def _whole(self, validation: bool) -> Images:
        return _read_images(tuple(self._files(validation)), tuple(self._targets(validation)))

    def _batches(self, assets, model, *, validation, **options):
        task = self.task
        options |= {"mean": task.mean, "std": task.std, "classes": model.classes}
        options |= {} if validation else {"flip": task.flip, "shift": task.shift}
        return image_batches(self._read(validation), **self._sizes, **options)


@functools.lru_cache(maxsize=2)
def _read_images(files: tuple[str, ...], targets: tuple[str, ...]) -> Images:
    parts = [read_images(file, labels) for file, labels in zip(files, targets or [None] * len(files), strict=True)]
    return Images(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesTask(Task):
    """A class for each image (see `data.image_batches`).

    Attributes:
      label_smoothing: the share of the target spread over all classes.
      mean, std: of the pixels between 0 and 1.
      flip, shift: how images are varied while training.
    """

    name: ClassVar[str] = "images"
    columns: ClassVar[tuple[int, ...]] = ()
    targets: ClassVar[str] = "allowed"
    structure: ClassVar[str] = "images"
    has_z_loss: ClassVar[bool] = False

    label_smoothing: float = 0.0
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5
    flip: bool = False
    shift: int = 0

    @property
    def head(self):
        return "sequence_classification"

    def data(self, files, training):
        return _Data(self, files, training)

    def objective(self, z_loss):
        return Classification(label_smoothing=self.label_smoothing)

    def shapes(self, rows, length, model):
        patches = model.patches
        assert patches is not None
        pixels = (rows, patches.channels, patches.height, patches.width)
        return {"pixel_values": jax.ShapeDtypeStruct(pixels, jnp.float32), "labels": integers(rows)}

"""Batches for the classification of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Unpack

import numpy as np
from jaxtyping import Float, UInt8

from flaxcompress.data.batches import IGNORED, Batch, BatchOptions, PlannedBatches, Row, planned_batches
from flaxcompress.data.images import Images, check_images


def image_batches(
    images: Images,
    *,
    batch_size: int,
    seed: int = 0,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    flip: bool = False,
    shift: int = 0,
    classes: int | None = None,
    **options: Unpack[BatchOptions],
) -> PlannedBatches:
    """Batches for image classification: pixel_values [B, channels, height, width] and labels [B].

    Args:
      images: what `read_images` returns.
      batch_size: rows of the global batch.
      mean, std: of the pixels between 0 and 1, for all channels or each; by default the result lies between -1 and 1.
      flip: half of the images are mirrored, left to right.
      shift: images are moved by up to so many pixels, up or down and left or right; black comes in. Both are drawn
        anew for every epoch.
      classes: the model's, to check the labels against.

    Raises ValueError for images and labels that do not fit each other, and for labels beyond the classes.
    """
    pixels, labels = check_images(Images(*map(np.asarray, images)), "image_batches")
    if classes is not None and labels.max() >= classes:
        raise ValueError(f"image_batches: labels go up to {labels.max()}, but the model has {classes} classes")
    if shift < 0 or shift >= min(pixels.shape[1:3]):
        raise ValueError(f"image_batches: shift must be 0 to {min(pixels.shape[1:3]) - 1}, got {shift}")
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    scale = [np.broadcast_to(np.asarray(value, np.float32), pixels.shape[-1:]) for value in (mean, std)]
    if (scale[1] <= 0).any():
        raise ValueError(f"image_batches: std must be above 0, got {std}")
    make = _Make(pixels, labels.astype(np.int32), *scale, flip=flip, shift=shift)
    return planned_batches(np.zeros(len(pixels), np.int64), make, batch_size=batch_size, seed=seed, **options)


def moved(image: UInt8[np.ndarray, "height width c"], down: int, right: int) -> UInt8[np.ndarray, "height width c"]:
    """An image moved by some pixels, black where nothing is."""
    out = np.zeros_like(image)
    height, width = image.shape[:2]
    rows, columns = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
    out[rows, columns] = image[max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)]
    return out


@dataclasses.dataclass(frozen=True)
class _Make:
    """Rows -> batch; see `Make`."""

    pixels: np.ndarray
    labels: np.ndarray
    mean: Float[np.ndarray, " c"]
    std: Float[np.ndarray, " c"]
    flip: bool
    shift: int

    def __call__(self, rows: list[Row], bucket: int) -> Batch:
        chosen = np.zeros((len(rows), *self.pixels.shape[1:]), np.uint8)
        labels = np.full(len(rows), IGNORED, np.int32)
        for i, row in enumerate(rows):
            if (example := row.example) is not None:
                chosen[i], labels[i] = self._changed(self.pixels[example], row, example), self.labels[example]
        values = (chosen.astype(np.float32) / 255.0 - self.mean) / self.std
        return {"pixel_values": np.ascontiguousarray(values.transpose(0, 3, 1, 2)), "labels": labels}

    def _changed(self, image: np.ndarray, row: Row, example: int) -> np.ndarray:
        if not (self.flip or self.shift):
            return image
        rng = row.rng(example)
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        down, right = rng.integers(-self.shift, self.shift + 1, size=2).tolist()
        return moved(image, down, right)

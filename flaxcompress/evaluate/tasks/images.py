"""The task "images": a class for each image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxcompress.data.images import Images, PixelScale, check_images, pixel_scale, read_images
from flaxcompress.evaluate.tasks.labels import class_names
from flaxcompress.evaluate.tasks.scores import compared
from flaxcompress.evaluate.tasks.task import Result, last_of, need_count, need_data, need_head
from flaxcompress.model import Model
from flaxcompress.progress import progress_bar

_TASK = "images"
Scale = float | Sequence[float] | None


def images(
    model: Model,
    *,
    data: Any = None,
    reference: Model | None = None,
    progress: bool = False,
    targets: Any = None,
    mean: Scale = None,
    std: Scale = None,
    hold_out: int = 0,
    batch_size: int = 64,
) -> Result:
    """data, n, accuracy, macro_f1, matthews where there are two classes, and f1_by_class; with a reference, agreement.

    Args:
      data: an npz file with images and labels, or an IDX file of images, or `Images`.
      targets: the IDX file of their labels.
      mean, std: of the pixels between 0 and 1, for all channels or each; by default as the model's folder says in
        preprocessor_config.json.
      hold_out: only the last so many images, as training's data/hold_out leaves them.

    Raises ValueError for a model that is no classifier of images, for images of another size than its own, for labels
    beyond its classes, and where nothing says how pixels are scaled.
    """
    need_data(
        data, _TASK, "an npz file with images and labels, or an IDX file of images and --targets for their labels"
    )
    need_count(_TASK, "batch_size", batch_size)
    models = [model] if reference is None else [model, reference]
    for one, who in zip(models, ("the model", "the reference"), strict=False):
        need_head(one, _TASK, "sequence_classification", who=who)
        if one.config.patches is None:
            raise ValueError(f"{_TASK}: {who} reads text, not images; evaluate it on the task 'classification'")
    if len({one.config.classes for one in models}) > 1:
        raise ValueError(
            f"{_TASK}: the model has {model.config.classes} classes, the reference {models[1].config.classes}"
        )
    given = isinstance(data, Images)
    if given and targets is not None:
        raise ValueError(f"{_TASK}: images in memory have their labels; leave out targets")
    found = check_images(data, "given images") if given else read_images(data, targets)
    rows = last_of(range(len(found.labels)), hold_out, _TASK)
    pixels, labels = np.asarray(found.images)[rows], np.asarray(found.labels)[rows]
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    name = "given images" if given else Path(data).name
    chosen = []
    for one in models:
        _check(one, name, pixels, labels)
        scale = _scale(one, mean, std)
        chosen.append(_classes(one, pixels, scale, batch_size=batch_size, progress=progress))
    names = class_names(model, _TASK, ()) or tuple(map(str, range(model.config.classes)))
    head: Result = {"data": name, "n": len(labels)}
    originals = chosen[1] if len(chosen) > 1 else None
    return head | compared(labels, chosen[0], originals, names, classes=model.config.classes)


def _check(model: Model, name: str, pixels: np.ndarray, labels: np.ndarray) -> None:
    patches, classes = model.config.patches, model.config.classes
    assert patches is not None
    height, width, channels = pixels.shape[1:]
    if (height, width, channels) != (patches.height, patches.width, patches.channels):
        raise ValueError(
            f"{_TASK}: {name} holds images of {height}×{width} with {channels} channels, but the model was made for "
            f"{patches.height}×{patches.width} with {patches.channels}; resize them first"
        )
    if labels.max() >= classes:
        raise ValueError(
            f"{_TASK}: {name} has labels up to {labels.max()}, but the model has classes 0 to {classes - 1}"
        )


def _scale(model: Model, mean: Scale, std: Scale) -> PixelScale:
    if (mean is None) != (std is None):
        raise ValueError(f"{_TASK}: give both mean and std, or neither")
    if mean is None or std is None:
        stated = pixel_scale(model.assets)
        if stated is None:
            raise ValueError(
                f"{_TASK}: the model's folder does not say how pixels are scaled (preprocessor_config.json); give the "
                "mean and std that it was trained with: --mean 0.5 --std 0.5"
            )
        return stated
    scale = PixelScale(*(tuple(float(v) for v in np.atleast_1d(np.asarray(x))) for x in (mean, std)))
    assert model.config.patches is not None
    if any(len(values) not in (1, model.config.patches.channels) for values in scale) or min(scale.std) <= 0:
        raise ValueError(
            f"{_TASK}: mean and std need one value, or one for each of {model.config.patches.channels} channels, std "
            f"above 0; got {list(scale.mean)} and {list(scale.std)}"
        )
    return scale


def _classes(model: Model, pixels: np.ndarray, scale: PixelScale, *, batch_size: int, progress: bool) -> np.ndarray:
    out = np.zeros(len(pixels), np.int64)
    mean, std = (np.asarray(values, np.float32) for values in scale)
    with progress_bar(_TASK, len(pixels), show=progress) as advance:
        for start in range(0, len(pixels), batch_size):
            part = pixels[start : start + batch_size]
            values = np.zeros((batch_size, *part.shape[1:]), np.float32)
            values[: len(part)] = (part.astype(np.float32) / 255.0 - mean) / std
            logits = np.asarray(model(pixel_values=np.ascontiguousarray(values.transpose(0, 3, 1, 2))).logits)
            out[start : start + len(part)] = logits[: len(part)].argmax(-1)
            advance(len(part))
    return out

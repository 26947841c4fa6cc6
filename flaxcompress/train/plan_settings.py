"""What a plan takes from a training run's settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import jax

from flaxcompress.config import ModelConfig
from flaxcompress.config.yaml_file import read_yaml, with_changes, with_variables
from flaxcompress.data.train_tokenizer import vocabulary_size
from flaxcompress.folder import resolve
from flaxcompress.heads import COUNTED
from flaxcompress.text import read_assets
from flaxcompress.train.config import TrainConfig
from flaxcompress.train.structure import structure
from flaxcompress.train.task_model import load_model

_UNREAD = "(not given)"


def read_plan_settings(path: str | Path, changes: Iterable[str] = ()) -> TrainConfig:
    """The settings of a run (see `TrainConfig.load`), in which data, out and training/steps may be missing."""
    given = with_changes(read_yaml(path), changes)
    settings = {"data": {"train": _UNREAD}, "out": _UNREAD}
    for name, value in given.items():  # variables that are not set here may stand in what a plan does not read
        with contextlib.suppress(*((ValueError,) if name in settings else ())):
            settings |= with_variables({name: value})
    if isinstance(training := given.get("training"), dict):
        settings["training"] = {"steps": 1, **training}
    return TrainConfig.from_dict(settings, where=str(path))


def planned_structure(settings: TrainConfig) -> ModelConfig:
    """The structure of the model that a run trains.

    Raises:
      ValueError: settings that leave the vocabulary or the number of classes open.
      FileNotFoundError: no such model, tokenizer or data.
    """
    model, data = settings.model, settings.task_data
    has_classes = settings.task.head in COUNTED
    if has_classes and model.classes is None and settings.data.train == (_UNREAD,):
        raise ValueError("model/classes: a plan without data needs them; give their number")
    if model.load is not None:
        return load_model(settings, data, key=jax.random.key(0)).config
    classes = data.classes if model.classes is None and has_classes else model.classes
    return structure(settings, vocabulary=_vocabulary(settings), classes=classes)


def _vocabulary(settings: TrainConfig) -> int | None:
    """The tokenizer's, where the structure does not say."""
    tokenizer, given = settings.tokenizer, settings.model.config or {}
    known = settings.model.architecture is not None or "model_type" in given or "vocabulary" in given
    if known or settings.task.structure == "images":
        return None
    if tokenizer is None:
        raise ValueError("tokenizer: give it, or model/config/vocabulary: its size is the model's vocabulary")
    if tokenizer.load is None:
        return tokenizer.vocabulary
    return vocabulary_size(read_assets(resolve(tokenizer.load), positions=settings.training.length, source=""))

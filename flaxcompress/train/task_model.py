"""From settings to the tokenizer and the model that a run starts with."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax

from flaxcompress import storage
from flaxcompress.data.frame import special_id
from flaxcompress.data.train_tokenizer import train_tokenizer, vocabulary_size
from flaxcompress.folder import load, resolve
from flaxcompress.heads import COUNTED
from flaxcompress.model import Model
from flaxcompress.text import Assets, generation_config_file, read_assets
from flaxcompress.train.cluster import same_everywhere
from flaxcompress.train.config import TrainConfig
from flaxcompress.train.settings import ModelSettings
from flaxcompress.train.structure import check_length, structure
from flaxcompress.train.tasks import TaskData

_MASKED = ("masked_lm", "pretraining")


def make_model(config: TrainConfig, data: TaskData, folder: Path, *, key: jax.Array) -> Model:
    """The model at the start of a run.

    Args:
      folder: where a trained tokenizer is kept, so that a resumed run has the same one.

    Raises:
      ValueError: settings that contradict each other, or the tokenizer; what `load` and `ModelConfig` raise.
      FileNotFoundError: no such model or tokenizer.
    """
    settings = config.model
    if settings.load is not None:
        model = load_model(config, data, key=key)
    else:
        assets = _tokenizer(config, data, folder)
        sizes: dict[str, Any] = {"vocabulary": None}
        if assets is not None:
            sizes = {"vocabulary": vocabulary_size(assets), "pad": special_id(assets, "pad") or 0}
        model = Model.init(structure(config, **sizes, classes=_classes(settings, data)), key=key, assets=assets)
    _check(config, model)
    return model.replace(assets=data.described(model.assets, model.config))  # pyright: ignore[reportAttributeAccessIssue]


def load_model(config: TrainConfig, data: TaskData, *, key: jax.Array) -> Model:
    """The model that the settings name, with a head for the task and what is tuned; `key` draws what it has not."""
    model, tuning = _with_head(config, data, key=key), config.model.tuning
    return model if tuning is None else tuning(model, key=jax.random.fold_in(key, 1))


def _with_head(config: TrainConfig, data: TaskData, *, key: jax.Array) -> Model:
    settings, wanted = config.model, config.task.head
    assert settings.load is not None
    if settings.head is not None:
        return load(settings.load, head=settings.head, classes=_classes(settings, data), key=key)
    model = load(settings.load)
    fits = wanted == "none" or model.config.head == wanted or (wanted == "masked_lm" and model.config.head in _MASKED)
    classes = _classes(settings, data)
    if fits and (wanted not in COUNTED or classes in (None, model.config.classes)):
        return model
    return load(settings.load, head=wanted, classes=classes, key=key)


def _classes(settings: ModelSettings, data: TaskData) -> int | None:
    return settings.classes if settings.classes is not None else data.classes


def _tokenizer(config: TrainConfig, data: TaskData, folder: Path) -> Assets | None:
    """The tokenizer's files; None for images."""
    settings = config.tokenizer
    if config.task.structure == "images":
        if settings is not None:
            raise ValueError("tokenizer: images have no text; leave it out")
        return None
    if settings is None:
        raise ValueError("tokenizer: a model that is drawn anew needs one; give load (a folder) or kind and vocabulary")
    length = config.training.length
    if settings.load is not None:
        assets = read_assets(resolve(settings.load), positions=length, source="")
        if not assets.has_tokenizer:
            raise ValueError(f"tokenizer/load: {settings.load} holds no tokenizer's files")
        return dataclasses.replace(assets, pooling=None, max_length=length)
    with tempfile.TemporaryDirectory() as work:
        storage.write_files(Path(work), same_everywhere(lambda: _learned(config, data, folder / "tokenizer")))
        return read_assets(Path(work), positions=length, source="")


def _learned(config: TrainConfig, data: TaskData, kept: Path) -> dict[str, str]:
    """The files of the tokenizer that is kept there; learned first, where there is none yet."""
    if not kept.is_dir():
        settings, task = config.tokenizer, config.task
        assert settings is not None and settings.kind is not None and settings.vocabulary is not None
        made = train_tokenizer(
            data.texts(),
            settings.kind,
            vocabulary=settings.vocabulary,
            model=task.structure,
            lowercase=settings.lowercase,
            sentinels=task.sentinels,
            max_length=config.training.length,
        )
        ids = generation_config_file(made, special_id(made, "pad") or 0, decoder=task.structure == "seq2seq")
        with storage.new_folder(kept) as new:
            storage.write_files(new, {**dict(made.files), **ids})
    return {path.name: path.read_text("utf-8") for path in sorted(kept.iterdir())}


def _check(config: TrainConfig, model: Model) -> None:
    check_length(config, model.config)
    if model.config.patches is not None:
        return
    if not model.assets.has_tokenizer:
        raise ValueError(f"model: {config.model.load} holds no tokenizer; texts cannot be read for it")
    size, known = vocabulary_size(model.assets), model.config.vocabulary
    if size > known:
        raise ValueError(
            f"model: the tokenizer has {size} tokens, but the model's vocabulary {known} entries: they do not belong "
            "together"
        )

"""From settings to the tokenizer and the model that a run starts with."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from flaxcompress import storage
from flaxcompress.config import ModelConfig, Patches
from flaxcompress.config.part import part_reader
from flaxcompress.data.frame import special_id
from flaxcompress.data.train_tokenizer import train_tokenizer, vocabulary_size
from flaxcompress.folder import load, resolve
from flaxcompress.model import Model
from flaxcompress.text import Assets, generation_config_file, read_assets
from flaxcompress.train.architectures import architecture
from flaxcompress.train.cluster import same_everywhere
from flaxcompress.train.config import ModelSettings, TrainConfig
from flaxcompress.train.task_data import TaskData
from flaxcompress.train.tasks import CausalLMTask, ImagesTask, SpanCorruptionTask, TranslationTask

_SENTINELS = 100  # as T5 has
_MASKED = ("masked_lm", "pretraining")
_Read = TypeVar("_Read")


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
        model = _loaded(config, data, key)
    else:
        assets = _tokenizer(config, data, folder)
        model = Model.init(_structure(config, data, assets), key=key, assets=assets)
    _check(config, model)
    return model


def _loaded(config: TrainConfig, data: TaskData, key: jax.Array) -> Model:
    settings, wanted = config.model, config.task.head
    assert settings.load is not None
    if settings.head is not None:
        return load(settings.load, head=settings.head, classes=_classes(settings, data), key=key)
    model = load(settings.load)
    fits = wanted == "none" or model.config.head == wanted or (wanted == "masked_lm" and model.config.head in _MASKED)
    classes = _classes(settings, data)
    if fits and (wanted != "sequence_classification" or classes in (None, model.config.classes)):
        return model
    return load(settings.load, head=wanted, classes=classes, key=key)


def _classes(settings: ModelSettings, data: TaskData) -> int | None:
    return settings.classes if settings.classes is not None else data.classes


def _tokenizer(config: TrainConfig, data: TaskData, folder: Path) -> Assets | None:
    """The tokenizer's files; None for images."""
    settings = config.tokenizer
    if isinstance(config.task, ImagesTask):
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
        seq2seq = isinstance(task, (TranslationTask, SpanCorruptionTask))
        made = train_tokenizer(
            data.texts(),
            settings.kind,
            vocabulary=settings.vocabulary,
            model="seq2seq" if seq2seq else "decoder" if isinstance(task, CausalLMTask) else "encoder",
            lowercase=settings.lowercase,
            sentinels=_SENTINELS if isinstance(task, SpanCorruptionTask) else 0,
            max_length=config.training.length,
        )
        ids = generation_config_file(made, special_id(made, "pad") or 0, decoder=seq2seq)
        with storage.new_folder(kept) as new:
            storage.write_files(new, {**dict(made.files), **ids})
    return {path.name: path.read_text("utf-8") for path in sorted(kept.iterdir())}


def _structure(config: TrainConfig, data: TaskData, assets: Assets | None) -> ModelConfig:
    settings, task = config.model, config.task
    head = settings.head or task.head
    given = dict(settings.config or {})
    fields: dict[str, Any] = {"head": head}
    if assets is not None:
        fields |= {"vocabulary": vocabulary_size(assets), "pad_token": special_id(assets, "pad") or 0}
    if (classes := _classes(settings, data)) is not None:
        fields["classes"] = classes
    if head == "pretraining":
        fields["classes"] = 2
    if settings.architecture is not None:
        base = architecture(settings.architecture, head=head, classes=fields.get("classes"))
        kept = {"vocabulary": base.vocabulary} if fields.get("vocabulary", 0) <= base.vocabulary else {}
        return _within_model(lambda: ModelConfig.from_json({**base.to_json(), **fields, **kept, **given}))
    fields["positions"] = config.training.length
    if isinstance(task, ImagesTask):
        if not isinstance(given.get("patches"), Mapping):
            raise ValueError("model/config: a model of images needs patches: {height, width, size, channels}")
        patches = _within_model(lambda: part_reader(Patches)(given["patches"], "config/patches"))
        fields |= {"vocabulary": 0, "segments": 0, "positions": 1 + patches.count}
    if isinstance(task, CausalLMTask):
        fields |= {"causal": True, "pooler": False, "segments": 0}
    if isinstance(given.get("decoder"), Mapping):
        fields |= {"pooler": False, "segments": 0}
        given["decoder"] = _decoder(given, config.training.length)
    return _within_model(lambda: ModelConfig.from_json({**fields, **given}))


def _decoder(given: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The fields of a decoder that follow from the encoder's."""
    decoder = dict(given["decoder"])
    sharing = decoder.get("sharing", "own")
    if isinstance(sharing, str) or (isinstance(sharing, Mapping) and "name" in sharing):
        named = {"name": sharing} if isinstance(sharing, str) else dict(sharing)
        decoder["sharing"] = {"cross_attention": True, **named}
    fixed = {"vocabulary": 0, "causal": True, "head": "none", "pooler": False, "segments": 0, "positions": length}
    same = ("width", "heads", "feed_forward_width", "norm", "norm_place", "final_norm", "activation", "dropout")
    return {**fixed, **{name: given[name] for name in same if name in given}, **decoder}


def _within_model(read: Callable[[], _Read]) -> _Read:
    """What `read` gives; its mistakes say that they are the model's."""
    try:
        return read()
    except (ValueError, TypeError) as error:
        raise ValueError(f"model/{error}") from None


def _check(config: TrainConfig, model: Model) -> None:
    structure, length = model.config, config.training.length
    if structure.patches is not None:
        return
    if length > structure.positions:
        raise ValueError(f"training/length: {length} tokens, but the model has {structure.positions} positions")
    if not model.assets.has_tokenizer:
        raise ValueError(f"model: {config.model.load} holds no tokenizer; texts cannot be read for it")
    if (size := vocabulary_size(model.assets)) > structure.vocabulary:
        raise ValueError(
            f"model: the tokenizer has {size} tokens, but the model's vocabulary {structure.vocabulary} entries: they "
            "do not belong together"
        )

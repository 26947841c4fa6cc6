"""From settings to the structure of a model that is drawn anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flaxcompress import tree
from flaxcompress.config import ModelConfig, Patches, closest
from flaxcompress.config.format_rule import read_rules
from flaxcompress.config.part import part_reader
from flaxcompress.families import FAMILIES
from flaxcompress.formats import LowRankSpec, rank_for
from flaxcompress.model import abstract_flat
from flaxcompress.train.architectures import architecture, read_architecture
from flaxcompress.train.config import TrainConfig

_Read = TypeVar("_Read")


def structure(config: TrainConfig, *, vocabulary: int | None, pad: int = 0, classes: int | None = None) -> ModelConfig:
    """The structure that the settings describe; what they leave open follows from the task and the tokenizer.

    Args:
      vocabulary: entries of the tokenizer; None for images, and where a published architecture's own is meant.
      pad: the id of its padding.
      classes: C that the data has, where the settings do not say.

    Raises ValueError for settings that no model has.
    """
    settings, task = config.model, config.task
    head = settings.head or task.head
    given = dict(settings.config or {})
    rules = given.pop("formats", ())
    fields: dict[str, Any] = {"head": head}
    if vocabulary is not None:
        fields |= {"vocabulary": vocabulary, "pad_token": pad}
    if (number := settings.classes if settings.classes is not None else classes) is not None:
        fields["classes"] = number
    if head == "pretraining":
        fields["classes"] = 2
    if settings.architecture is not None or "model_type" in given:
        found = _published(settings.architecture, given, fields)
    else:
        found = _within_model(lambda: ModelConfig.from_json(_described(config, given, fields)))
    return _within_model(lambda: _with_formats(found, rules))


def check_length(settings: TrainConfig, config: ModelConfig) -> None:
    """Raises ValueError where rows are longer than the model has positions."""
    length = settings.training.length
    if config.patches is None and length > config.positions:
        raise ValueError(f"training/length: {length} tokens, but the model has {config.positions} positions")


def _published(name: str | None, given: dict[str, Any], fields: dict[str, Any]) -> ModelConfig:
    """A structure by its name, or by its Hugging Face config."""
    head, classes = fields["head"], fields.get("classes")
    if name is not None:
        base = architecture(name, head=head, classes=classes)
    else:
        if given["model_type"] not in FAMILIES:
            hint = closest(str(given["model_type"]), FAMILIES)
            raise ValueError(f"model/config: unknown model_type {given['model_type']!r}; {hint}")
        base, given = read_architecture(given, head=head, classes=classes), {}
    kept = {"vocabulary": base.vocabulary} if fields.get("vocabulary", 0) <= base.vocabulary else {}
    return _within_model(lambda: ModelConfig.from_json({**base.to_json(), **fields, **kept, **given}))


def _described(config: TrainConfig, given: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """All fields of a structure whose own ones are `given`."""
    task, length = config.task, config.training.length
    fields = {**fields, "positions": length}
    if task.structure == "images":
        if not isinstance(given.get("patches"), Mapping):
            raise ValueError("config: a model of images needs patches: {height, width, size, channels}")
        fields |= {
            "vocabulary": 0,
            "segments": 0,
            "positions": 1 + part_reader(Patches)(given["patches"], "config/patches").count,
        }
    if task.structure == "decoder":
        fields |= {"causal": True, "pooler": False, "segments": 0}
    if isinstance(given.get("decoder"), Mapping):
        fields |= {"pooler": False, "segments": 0}
        given["decoder"] = _decoder(given, length)
    return {**fields, **given}


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


def _with_formats(config: ModelConfig, rules: Any) -> ModelConfig:
    """The structure with rules for formats, in which a low_rank one may have keep, a share of the values, for rank."""
    for rule in reversed(read_rules(rules, "config/formats")):
        if set(rule.spec) == {"kind", "keep"} and rule.spec["kind"] == "low_rank":
            matrices = {a: w for a, w in abstract_flat(config).items() if len(w.shape) == 2}
            for address in tree.select(matrices, rule.pattern, where="config/formats"):
                rank = rank_for(matrices[address].shape, None, rule.spec["keep"], False, address)
                config = config.with_format(address, LowRankSpec(rank=rank).to_json())
        else:
            config = config.with_rule(rule.pattern, dict(rule.spec))
    return config


def _within_model(read: Callable[[], _Read]) -> _Read:
    """What `read` gives; its mistakes say that they are the model's."""
    try:
        return read()
    except (ValueError, TypeError) as error:
        raise ValueError(f"model/{error}") from None

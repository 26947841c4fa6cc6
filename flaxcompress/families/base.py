"""What a family file provides: a Hugging Face config and tensor names, translated both ways."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxcompress.config import Classifier, ModelConfig
from flaxcompress.text import Assets

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu", "tanh": "tanh"}


class Stored(NamedTuple):
    """Where a weight lies in a checkpoint.

    Attributes:
      name: the tensor's name, without prefix.
      transposed: stored [m, n], as torch.nn.Linear does.
      part: (i, n): the i-th of n equal stretches, along the outputs, of a tensor that holds several weights.
      folded: (shape in the checkpoint, shape of the matrix that it is read as), where they differ.
    """

    name: str
    transposed: bool = False
    part: tuple[int, int] | None = None
    folded: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """The weight as we hold it, kernels [n, m]."""
        array = tensor if self.folded is None else tensor.reshape(self.folded[1])
        array = array.T if self.transposed else array
        if self.part is None:
            return array
        index, count = self.part
        return np.split(array, count, axis=-1)[index]

    def shape(self, own: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape, from that of the weight as we hold it."""
        if self.folded is not None:
            return self.folded[0]
        count = 1 if self.part is None else self.part[1]
        shape = (*own[:-1], own[-1] * count)
        return shape[::-1] if self.transposed else shape


class Names(dict[str, Stored]):
    """{address: where it is stored}, filled a module at a time."""

    def table(self, address: str, name: str) -> None:
        """An embedding table."""
        self[address] = Stored(f"{name}.weight")

    def vector(self, address: str, name: str) -> None:
        """A tensor that no module wraps."""
        self[address] = Stored(name)

    def linear(
        self,
        address: str,
        name: str,
        *,
        bias: bool = True,
        transposed: bool = True,
        part: tuple[int, int] | None = None,
    ) -> None:
        """A torch.nn.Linear, which stores its kernel transposed, or a part of one that computes several at once."""
        self[f"{address}/kernel"] = Stored(f"{name}.weight", transposed, part)
        if bias:
            self[f"{address}/bias"] = Stored(f"{name}.bias", False, part)

    def classifier(self, config: ModelConfig, output: str = "", *, transform: str = "", norm: str = "") -> None:
        """The head of a classifier, where the config has one; `output` is "classifier" or "qa_outputs" if not given."""
        if config.head not in _CLASSIFIERS:
            return
        if config.classifier.transform:
            self.linear("head/transform", transform, bias=config.head_bias)
        if config.classifier.norm:
            self.norm("head/norm", norm, bias=config.norm_bias)
        self.linear("head/output", output or _CLASSIFIERS[config.head][1], bias=config.classifier.bias)

    def norm(self, address: str, name: str, *, bias: bool = True) -> None:
        """A norm."""
        self[f"{address}/scale"] = Stored(f"{name}.weight")
        if bias:
            self[f"{address}/bias"] = Stored(f"{name}.bias")


def write_tensors(names: Names, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{tensor name: array} of a checkpoint from {address: array}, parts of one tensor put together."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    whole: dict[str, Stored] = {}
    for address, stored in names.items():
        whole[stored.name] = stored
        parts.setdefault(stored.name, {})[stored.part[0] if stored.part else 0] = arrays[address]
    out = {}
    for name, pieces in parts.items():
        array = np.concatenate([pieces[i] for i in sorted(pieces)], axis=-1) if len(pieces) > 1 else pieces[0]
        array = array.T if whole[name].transposed else array
        folded = whole[name].folded
        out[name] = array if folded is None else array.reshape(folded[0])
    return out


class Checkpoint(NamedTuple):
    """A kind of checkpoint that is no Hugging Face folder.

    Attributes:
      find: a path -> the checkpoint's file, or None where there is none of this kind. Raises ValueError for several.
      read: that file -> (config, {address: float32 array}, assets). Raises ValueError for a damaged one.
    """

    find: Callable[[Path], Path | None]
    read: Callable[[Path], tuple[ModelConfig, dict[str, np.ndarray], Assets]]


@dataclasses.dataclass(frozen=True)
class Family:
    """One Hugging Face model type.

    Attributes:
      model_type: config.json's `model_type`.
      read_config: Hugging Face config -> ModelConfig; raises ValueError for what the family does not support.
      write_config: ModelConfig -> a stock Hugging Face config.
      names: ModelConfig -> {address: where it is stored}, one entry per layer; per weight set where `shares`.
      heads: our heads, and the transformers' classes that have them.
      base: the attribute under which transformers' classes with a head keep the encoder; None for `model_type`, "" for
        none.
      bases: the same for heads whose classes have another.
      own_head: the kernel of a language-modelling head that is not tied just where a checkpoint holds one that differs
        from the token table, whatever the config says; None where the config decides.
      shares: whether the stock format stores shared weight sets once.
      renames: (regular expression, replacement) pairs that bring old spellings to the current one.
      ignored: tensors that carry nothing (full match): buffers, and copies of tied weights.
      head_prefixes: tensors of heads that the caller may not need; left out with one line that says so.
    """

    model_type: str
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    names: Callable[[ModelConfig], Names]
    heads: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    base: str | None = None
    bases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    own_head: str | None = None
    shares: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    head_prefixes: tuple[str, ...] = ()

    def prefix(self, head: str) -> str:
        """What a tensor name of the encoder begins with beside a head."""
        base = self.bases.get(head, self.model_type if self.base is None else self.base)
        return f"{base}." if base else ""

    def canonical(self, name: str) -> str:
        """A checkpoint's tensor name in the family's current spelling, without a prefix."""
        for prefix in ("module.", "model.", *dict.fromkeys(map(self.prefix, ("none", *self.bases)))):
            name = name.removeprefix(prefix)
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


def required(hf: Mapping[str, Any], family: str, names: Iterable[str]) -> None:
    """Raises ValueError naming the keys that a config lacks."""
    if missing := [name for name in names if name not in hf]:
        raise ValueError(f"config.json: a {family} config needs {', '.join(missing)}")


def refuse(hf: Mapping[str, Any], key: str, only: Any) -> None:
    """Raises ValueError for a setting that is supported with one value only."""
    if (value := hf.get(key, only)) != only:
        raise ValueError(f"config.json: {key} {value!r} is not supported, only {only!r}")


def activation(hf: Mapping[str, Any], key: str, default: str = "gelu") -> str:
    """Our name of the activation that a config names. Raises ValueError for one that does not exist here."""
    name = hf.get(key, default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"config.json: {key} {name!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def head_of(hf: Mapping[str, Any], heads: Mapping[str, tuple[str, ...]]) -> str:
    """The head that config.json's architecture has; `heads` maps heads to architectures."""
    architectures = hf.get("architectures") or []
    return next((head for head, known in heads.items() if any(a in known for a in architectures)), "none")


_CLASSIFIERS = {
    "sequence_classification": ("SequenceClassification", "classifier"),
    "token_classification": ("TokenClassification", "classifier"),
    "span": ("QuestionAnswering", "qa_outputs"),
}


def classifier_heads(classes: str, *heads: str) -> dict[str, tuple[str, ...]]:
    """{head: transformers' architectures} of heads that are one linear map, for classes that begin with `classes`."""
    return {head: (f"{classes}For{_CLASSIFIERS[head][0]}",) for head in heads}


def last_token(hf: Mapping[str, Any], head: str) -> Classifier:
    """The classifier of a decoder: the last token of a sequence, and no bias; of tokens, a map with one.

    transformers looks for the last token that is not padding by its id, where the config has that of padding.
    """
    if head != "sequence_classification":
        return Classifier()
    padded = hf.get("pad_token_id") is not None
    return Classifier(pooling="last_unpadded" if padded else "last", bias=False)


def class_count(hf: Mapping[str, Any], head: str) -> int:
    """C of a classifier's head, from id2label; 0 for other heads."""
    if head not in (*_CLASSIFIERS, "pretraining"):
        return 0
    return len(hf["id2label"]) if hf.get("id2label") else int(hf.get("num_labels", 2))


def write_classes(config: ModelConfig) -> dict[str, Any]:
    """id2label and label2id of a classifier."""
    names = [f"LABEL_{i}" for i in range(config.classes)]
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}


def write_padding(config: ModelConfig) -> dict[str, Any]:
    """pad_token_id of a decoder; null where it has none, which 0 stands for unless a classifier reads it."""
    read = config.classifier.pooling == "last_unpadded"
    return {"pad_token_id": config.pad_token if read else config.pad_token or None}


def architecture_of(config: ModelConfig, heads: Mapping[str, tuple[str, ...]], plain: str) -> str:
    """The name of transformers' class for the config's head; `plain` for none."""
    return heads[config.head][0] if config.head in heads else plain


def tied(hf: Mapping[str, Any], head: str) -> None:
    """Raises ValueError for a masked-LM head with a table of its own."""
    if head in ("masked_lm", "pretraining") and not hf.get("tie_word_embeddings", True):
        raise ValueError(
            "config.json: tie_word_embeddings is false, but only a head tied to the token table is supported; "
            'load it without: head="none"'
        )


def absolute_positions(hf: Mapping[str, Any]) -> None:
    """Raises ValueError for other than learned, absolute positions."""
    positions = hf.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise ValueError(f"config.json: position_embedding_type {positions!r} is not supported, only 'absolute'")

"""Published architectures that a run from scratch can name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxcompress.config import ModelConfig, closest
from flaxcompress.families import FAMILIES

_ALBERT = {"vocab_size": 30000, "embedding_size": 128, "max_position_embeddings": 512, "type_vocab_size": 2}


def _albert(layers: int, width: int, heads: int) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return {"model_type": "albert", **_ALBERT, **sizes, "intermediate_size": 4 * width}


# Hugging Face configs. ALBERT: Lan et al. 2020, table 1; version 2, without dropout, as published afterwards.
ARCHITECTURES: dict[str, Mapping[str, Any]] = {
    "albert-base": _albert(12, 768, 12),
    "albert-large": _albert(24, 1024, 16),
    "albert-xlarge": _albert(24, 2048, 16),
    "albert-xxlarge": _albert(12, 4096, 64),
}


def architecture(name: str, *, head: str = "none", classes: int | None = None) -> ModelConfig:
    """The structure of a published architecture, with a head, made as its family reads it.

    Raises ValueError for a name that is not known, and for a head that the family does not have.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"model/architecture: unknown {name!r}; {closest(name, ARCHITECTURES)}")
    return read_architecture(ARCHITECTURES[name], head=head, classes=classes)


def read_architecture(hf: Mapping[str, Any], *, head: str = "none", classes: int | None = None) -> ModelConfig:
    """The structure of a Hugging Face config of a known `model_type`, with a head.

    Raises ValueError for a head that the family does not have.
    """
    hf = dict(hf)
    family = FAMILIES[hf["model_type"]]
    if head != "none":
        if head not in family.heads:
            raise ValueError(f"model: {family.model_type} has no head {head!r}; {closest(head, family.heads)}")
        hf["architectures"] = [family.heads[head][0]]
    if classes is not None:
        hf["num_labels"] = classes
    return family.read_config(hf)

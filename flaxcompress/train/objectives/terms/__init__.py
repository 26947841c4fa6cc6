"""The terms of distillation. A new one is a file with its settings and a `DistillTerm`, and its two entries here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flaxcompress.train.objectives.terms.attention import ATTENTION, AttentionSettings, attention_term
from flaxcompress.train.objectives.terms.base import DistillTerm, Pair, counted
from flaxcompress.train.objectives.terms.cosine import COSINE, CosineSettings, cosine_term
from flaxcompress.train.objectives.terms.embeddings import EMBEDDINGS, EmbeddingSettings
from flaxcompress.train.objectives.terms.hard import HARD, HardSettings
from flaxcompress.train.objectives.terms.hidden import HIDDEN, HiddenSettings, hidden_term
from flaxcompress.train.objectives.terms.layers import LayerSettings, check_layers
from flaxcompress.train.objectives.terms.logit_error import LOGIT_ERROR, LogitErrorSettings, logit_error_term
from flaxcompress.train.objectives.terms.logits import LOGITS, LogitsSettings, logits_term
from flaxcompress.train.objectives.terms.relations import RELATIONS, RelationSettings, relation_term

TERMS: tuple[DistillTerm, ...] = (COSINE, HIDDEN, LOGITS, LOGIT_ERROR, RELATIONS, ATTENTION, EMBEDDINGS, HARD)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(
    CosineSettings,
    HiddenSettings,
    LogitsSettings,
    LogitErrorSettings,
    RelationSettings,
    AttentionSettings,
    EmbeddingSettings,
    HardSettings,
    LayerSettings,
):
    """All settings of all terms; each is described where its term is."""


def values_of(settings: Any) -> dict[str, Any]:
    """The terms' settings of an object that has them among others."""
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(Settings) if hasattr(settings, f.name)}


def terms_in(settings: Any) -> list[DistillTerm]:
    """The terms that count: those whose weight is not 0."""
    return [term for term in TERMS if getattr(settings, term.name, 0.0)]


def check_settings(settings: Any, where: str, terms: Sequence[DistillTerm] = TERMS) -> None:
    """Raises ValueError for weights that are negative or all 0, and for what a term says of its own settings."""
    names = [term.name for term in terms]
    for name in names:
        if not getattr(settings, name) >= 0:
            raise ValueError(f"{where}: {name} must not be negative, got {getattr(settings, name)}")
    if not any(getattr(settings, name) for name in names):
        raise ValueError(f"{where}: {', '.join(names[:-1])} and {names[-1]} are all 0: nothing is learned")
    for term in terms:
        term.check(settings, where)


__all__ = [
    "TERMS",
    "DistillTerm",
    "Pair",
    "Settings",
    "attention_term",
    "check_layers",
    "check_settings",
    "cosine_term",
    "counted",
    "hidden_term",
    "logit_error_term",
    "logits_term",
    "relation_term",
    "terms_in",
    "values_of",
]

"""Embeddings: what the first layer gets, its error relative to the teacher's norm."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from flaxcompress.config import ModelConfig
from flaxcompress.train.objectives.base import Term
from flaxcompress.train.objectives.terms.base import DistillTerm, Pair, check_width
from flaxcompress.train.objectives.terms.hidden import hidden_term


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingSettings:
    """Settings of the term.

    Attributes:
      embeddings: weight of the error of the first layer's input relative to the teacher's norm (TinyBERT, Jiao et al.
        2020, eq. 9); both need the same width.
    """

    embeddings: float = 0.0


def _fits(settings: Any, student: ModelConfig, teacher: ModelConfig) -> bool:
    del settings
    check_width("embeddings", "embeddings", student, teacher)
    return True


def _of(pair: Pair) -> Term:
    ours, theirs = (out.hidden_states[:1].astype(jnp.float32) for out in (pair.ours, pair.theirs))
    return hidden_term(ours, theirs, pair.mask)


EMBEDDINGS = DistillTerm(name="embeddings", of=_of, needs=("hidden_states",), fits=_fits)

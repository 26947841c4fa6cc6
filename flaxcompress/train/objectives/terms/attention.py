"""Attention: where the student's heads look, compared with the teacher's, head by head."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flaxcompress.config import Linformer, ModelConfig
from flaxcompress.train.objectives.base import Term
from flaxcompress.train.objectives.terms.base import DistillTerm, Pair, attending
from flaxcompress.train.objectives.terms.layers import layers_match, of_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """Settings of the term.

    Attributes:
      attention: weight of the squared difference of attention probabilities (see `attention_term`), layer by layer as
        `layers` says; both need the same number of heads.
    """

    attention: float = 0.0


def attention_term(
    student: Float[Array, "L B H T T"],
    teacher: Float[Array, "L B H T T"],
    sees: Bool[Array, "#B T T"],
    mask: Bool[Array, "B T"],
) -> Term:
    """Mean squared difference of attention (TinyBERT, Jiao et al. 2020, eq. 7), of probabilities instead of scores.

    Probabilities are what every kind of attention has; scores are arbitrary up to a number per row. Mean over layers,
    heads, the keys that a token may see, and the tokens.

    Args:
      sees: which tokens each token may see.
      mask: the tokens that count.
    """
    seen = jnp.broadcast_to(sees, (mask.shape[0], *sees.shape[1:]))
    keys = jnp.maximum(seen.sum(-1), 1).astype(jnp.float32)
    error = jnp.square(student.astype(jnp.float32) - teacher.astype(jnp.float32))
    by_token = jnp.where(seen[:, None], error, 0.0).sum(-1).mean((0, 2)) / keys
    weights = mask.astype(jnp.float32)
    return Term((by_token * weights).sum(), weights.sum())


def _fits(settings: Any, student: ModelConfig, teacher: ModelConfig) -> bool:
    ours, theirs = attending(student), attending(teacher)
    if ours.heads != theirs.heads:
        raise ValueError(
            f"distill: attention is compared head by head, but the teacher has {theirs.heads} heads and the student "
            f"{ours.heads}; use relations, which may differ in heads, or attention=0"
        )
    if not layers_match(settings, ours, theirs):
        raise ValueError(
            f"distill: the attention of {len(settings.layers or range(theirs.layers))} of the teacher's layers is "
            f"compared with the student's {ours.layers}: it cannot be; give layers, or use attention=0"
        )
    for who, config in (("teacher", theirs), ("student", ours)):
        if isinstance(config.attention, Linformer):
            raise ValueError(
                f"distill: the {who}'s attention is Linformer's, whose probabilities are not those of tokens; use "
                "relations, or attention=0"
            )
    return True


def _of(pair: Pair) -> Term:
    theirs = of_layers(pair.settings, pair.theirs.attentions)
    return attention_term(pair.ours.attentions, theirs, pair.sees, pair.mask)


ATTENTION = DistillTerm(name="attention", of=_of, needs=("attentions",), fits=_fits)

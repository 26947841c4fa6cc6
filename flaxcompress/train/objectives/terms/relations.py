"""Relations within self-attention: how alike the queries, the keys and the values of a text's tokens are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flaxcompress.config import Latent, ModelConfig
from flaxcompress.train.objectives.base import Term
from flaxcompress.train.objectives.terms.base import DistillTerm, Pair, attending

_FORBIDDEN = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelationSettings:
    """Settings of the term.

    Attributes:
      relations: weight of the divergence of self-attention relations (see `relation_term`): of any widths, heads and
        depths.
      relation_heads: into how many heads queries, keys and values are split for it; 0: as many as the teacher has.
      relation_layers: the layers of teacher and student that are compared; negative ones count from the end.
    """

    relations: float = 0.0
    relation_heads: int = 0
    relation_layers: tuple[int, int] = (-1, -1)


def relation_term(
    student: Sequence[Float[Array, "B T H d"]],
    teacher: Sequence[Float[Array, "B T G e"]],
    sees: Bool[Array, "#B T T"],
    mask: Bool[Array, "B T"],
    heads: int,
) -> Term:
    """KL(teacher‖student) of softmax(X Xᵀ/√(n/A)), X queries, keys or values (MiniLMv2, Wang et al. 2021, §3.1).

    The heads of X lie side by side, n wide, and are split into A = `heads` again, so that student and teacher need to
    have neither the same heads nor the same width. Where fewer heads of keys and values serve all queries, these few
    are what is split. Mean over A and the real tokens, sum over what there is in `student` and `teacher`.

    Args:
      sees: which tokens each token is compared with.
      mask: the tokens that count.

    Raises:
      ValueError: heads that do not divide n.
    """
    found = jnp.zeros((), jnp.float32)
    allowed, weights = sees[:, None], mask.astype(jnp.float32)[:, None]
    for ours, theirs in zip(student, teacher, strict=True):
        log_s, log_t = (jax.nn.log_softmax(_scores(x, allowed, heads)) for x in (ours, theirs))
        divergence = (jnp.exp(log_t) * jnp.where(allowed, log_t - log_s, 0.0)).sum(-1)
        found += (divergence * weights).sum() / heads
    return Term(found, mask.astype(jnp.float32).sum())


def _scores(x: Float[Array, "B T H d"], allowed: Bool[Array, "#B 1 T T"], heads: int) -> Float[Array, "B A T T"]:
    x = x.reshape(*x.shape[:2], -1)
    if x.shape[-1] % heads:
        raise ValueError(f"distill: vectors of width {x.shape[-1]} cannot be split into {heads} relation heads")
    x = x.reshape(*x.shape[:2], heads, -1)
    scores = jnp.einsum("btad,bsad->bats", x, x, preferred_element_type=jnp.float32)
    return jnp.where(allowed, scores * x.shape[-1] ** -0.5, _FORBIDDEN)


def _widths(config: ModelConfig) -> dict[str, int]:
    """How wide all heads together are."""
    if isinstance(config.attention, Latent):
        kind = config.attention
        scored, value = kind.plain_width + kind.rotary_width, kind.value_width
        return {name: config.heads * n for name, n in (("queries", scored), ("keys", scored), ("values", value))}
    groups, scored = config.groups, config.query_key_dim
    return {"queries": config.heads * scored, "keys": groups * scored, "values": groups * config.head_dim}


def _heads(settings: Any, teacher: ModelConfig) -> int:
    return settings.relation_heads or attending(teacher).heads


def _check(settings: Any, where: str) -> None:
    if settings.relation_heads < 0:
        raise ValueError(f"{where}: relation_heads must not be negative, got {settings.relation_heads}")
    if len(settings.relation_layers) != 2:
        raise ValueError(
            f"{where}: relation_layers are two, the teacher's and the student's, got {list(settings.relation_layers)}"
        )


def _fits(settings: Any, student: ModelConfig, teacher: ModelConfig) -> bool:
    heads = _heads(settings, teacher)
    of_both = (("teacher", attending(teacher)), ("student", attending(student)))
    for (who, config), layer in zip(of_both, settings.relation_layers, strict=True):
        if not -config.layers <= layer < config.layers:
            raise ValueError(f"distill: relation_layers: the {who} has {config.layers} layers, and no layer {layer}")
    widths = [(who, name, n) for who, config in of_both for name, n in _widths(config).items()]
    if apart := [f"the {who}'s {name} are {n} wide" for who, name, n in widths if n % heads]:
        raise ValueError(
            f"distill: {heads} relation heads do not divide all widths: {', '.join(apart)}; use relation_heads that "
            f"divide {math.gcd(*(n for *_, n in widths))}"
        )
    return True


def _of(pair: Pair) -> Term:
    layers = reversed(pair.settings.relation_layers)
    ours, theirs = (
        [x[layer] for x in out.projections] for out, layer in zip((pair.ours, pair.theirs), layers, strict=True)
    )
    return relation_term(ours, theirs, pair.sees, pair.mask, _heads(pair.settings, pair.teacher))


RELATIONS = DistillTerm(name="relations", of=_of, needs=("projections",), check=_check, fits=_fits)

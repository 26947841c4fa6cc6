"""Another head on a model: heads are exchanged, left out, or made anew on a body that stays as it is."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from flaxcompress.config import HEADS, Classifier, ModelConfig, closest, own_heads
from flaxcompress.families import FAMILIES
from flaxcompress.model import Model, init_params

COUNTED = ("sequence_classification", "token_classification")  # those whose classes somebody has to count


def known_heads(family: str) -> list[str]:
    """The heads that a model of this family can have: those that transformers has, and registered ones."""
    return ["none", *(FAMILIES[family].heads if family in FAMILIES else ()), *own_heads()]


def headed(config: ModelConfig, head: str, classes: int | None = None) -> ModelConfig:
    """The structure with another head, made as transformers makes it for the family.

    Raises ValueError for a head that the family does not have (naming those it has), and for a classifier without
    `classes`.
    """
    plain = config.replace(head="none", classes=0, classifier=Classifier())
    if head == "none":
        return plain
    if plain.formats:
        plain = plain.with_rule("head/.*", {"kind": "dense"})  # rules were made for the weights that there are
    if head in own_heads():
        return plain.replace(head=head, classes=classes or 0)
    known = known_heads(config.family)
    if head not in known:
        what = f"{config.family} models have no head {head!r}" if head in HEADS else f"unknown head {head!r}"
        raise ValueError(f"head: {what}; {closest(head, known)}; register_head adds one")
    if head in COUNTED and classes is None:
        raise ValueError(f"head: {head!r} needs classes=, the number of classes")
    family = FAMILIES[config.family]
    stock = family.write_config(plain.replace(sharing=None, formats=()))
    stock = {**stock, "architectures": [family.heads[head][0]], "num_labels": classes or 2}
    found = family.read_config(stock)
    fields = ("classes", "classifier", "head_activation", "head_bias")
    return plain.replace(head=head, **{name: getattr(found, name) for name in fields})


def with_head(model: Model, head: str, *, classes: int | None = None, key: jax.Array | None = None) -> Model:
    """The model with another head; its weights are random, the body's are those of `model`.

    Args:
      head: "sequence_classification", …, one that `register_head` made known, or "none".
      classes: C, of a classifier.
      key: draws the head's weights; not needed where it has none of its own.

    Raises:
      ValueError: a head that does not exist (those that do are named), a classifier without classes, no key.
    """
    if head == model.config.head and classes in (None, model.config.classes):
        return model
    config = headed(model.config, head, classes)
    params: dict[str, Any] = {name: child for name, child in model.params.items() if name != "head"}
    draw = functools.partial(_head, config)
    if jax.eval_shape(draw, jax.random.key(0)) is not None:
        if key is None:
            raise ValueError(
                f"head: {head!r} has no weights in this checkpoint; give a random key for new ones: "
                "key=jax.random.key(0)"
            )
        params["head"] = jax.jit(draw)(key)
    assets = dataclasses.replace(model.assets, classes=())  # which were the old head's
    return model.replace(params=params, config=config, assets=assets)  # pyright: ignore[reportAttributeAccessIssue]


def _head(config: ModelConfig, key: jax.Array) -> Any:
    return init_params(config, key).get("head")

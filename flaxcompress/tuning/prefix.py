"""Prefix tuning: trained keys and values in front of every layer's own, while all else stays (Li & Liang 2021).

    y = softmax(q·[Pₖ; K]ᵀ)·[Pᵥ; V],   Pₖ [P, K·r], Pᵥ [P, K·d]

They belong to the weight sets of attention, and take part of what tokens attend to from the start: with them a model
does not compute the same. Tokens' positions begin at P, as where a cache held the prefix, so that P fewer are left.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from flaxcompress import tree
from flaxcompress.model import Model, init_params
from flaxcompress.tuning.base import Tuning, register

TRAINABLE = r"(decoder/)?layers/\d+/attention/prefix/(key|value)"


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix(Tuning):
    """Keys and values in front of those of the sequence; the field is that of `with_prefix`."""

    name: ClassVar[str] = "prefix"

    length: int = 16

    def __post_init__(self):
        _check_length(self.length)

    @property
    def trainable(self):
        return TRAINABLE

    def __call__(self, model, *, key):
        return with_prefix(model, length=self.length, key=key)


def with_prefix(model: Model, *, length: int = 16, key: jax.Array) -> Model:
    """The model with a prefix in every layer: `fit(…, trainable=prefix.TRAINABLE)` trains it alone.

    Args:
      length: P; the model's longest sequence is shorter by as much. In a model with a decoder, that of both stacks.
      key: draws keys and values, normal of the config's `initializer_range`.

    Raises ValueError for a length that leaves no positions, a model that has a prefix, one of images, and kinds of
    attention that a prefix is not for: in latent attention keys and values come from the latent, Linformer's
    projections and Nyström's landmarks are over the tokens of the sequence alone.
    """
    _check_length(length)
    config = model.config
    if config.prefix_length:
        raise ValueError("prefix: the model has one already")
    if config.patches is not None:
        raise ValueError("prefix: a model of images has no positions to leave to a prefix; use lora or adapters")
    decoder = None if config.decoder is None else _behind(config.decoder, length)
    config = _behind(config, length).replace(decoder=decoder)
    own = tree.flatten(model.params)
    drawn = jax.jit(lambda key: {a: n for a, n in tree.flatten(init_params(config, key)).items() if a not in own})
    assets = dataclasses.replace(model.assets, max_length=min(model.assets.max_length, config.positions))
    params = tree.unflatten({**own, **drawn(key)})
    return model.replace(params=params, config=config, assets=assets)  # pyright: ignore[reportAttributeAccessIssue]


def _behind(config, length):
    if length >= config.positions:
        raise ValueError(f"prefix: length {length} leaves none of the {config.positions} positions; use a shorter one")
    if config.attention is not None:
        raise ValueError(
            f"prefix: {config.attention.kind} attention has no keys and values beside those of its tokens; use lora"
        )
    return config.replace(prefix_length=length, positions=config.positions - length)


def _check_length(length: int) -> None:
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"prefix: length must be a positive integer, got {length!r}")

"""Several documents in one row, so that training computes no padding: none sees another (Krell et al. 2021)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer

from flaxcompress.config import ModelConfig
from flaxcompress.nn.depthwise import held_inputs


def check_packs(config: ModelConfig, **given: Any) -> None:
    """Raises ValueError where packed documents could not be told apart, or beside what packs make up for.

    Args:
      given: arguments that must be None, by their names.
    """
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"packs: {name} cannot be given too; packs say themselves which tokens are no padding")
    mixing = [name.removesuffix("_inputs") + "_kernel" for name in held_inputs(config)]
    if mixing:
        raise ValueError(
            f"packs: {' and '.join(mixing)} convolve over the sequence, across the documents of a row; give each "
            "document a row of its own"
        )
    if config.attention is not None and config.attention.kind in ("linformer", "nystrom"):
        raise ValueError(
            f"packs: {config.attention.kind} attention mixes all places of a row; give each document a row of its own"
        )
    what = "images" if config.patches is not None else "an encoder and a decoder" if config.decoder is not None else ""
    if what:
        raise ValueError(f"packs: a model of {what} takes one example per row")
    if config.head == "sequence_classification":
        raise ValueError("packs: the head 'sequence_classification' reads one vector per row; give each document a row")


def first_places(packs: Integer[Array, "B T"]) -> Integer[Array, "B T"]:
    """Where in its row the document of each token begins."""
    before = jnp.pad(packs[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jax.lax.cummax(jnp.where(packs != before, jnp.arange(packs.shape[1]), 0), axis=1)


def same_document(packs: Integer[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Which tokens each token may see; padding sees nothing, and nothing sees it."""
    return (packs[:, :, None] == packs[:, None, :]) & (packs > 0)[:, None, :]

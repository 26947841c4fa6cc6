"""The training step that a plan compiles: gradient and update of the loss that goes with a model's head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Integer

from flaxcompress.config import ModelConfig
from flaxcompress.nn import run
from flaxcompress.train.trainable import combine

MASKED = 0.15  # the share of tokens that masked language modelling has labels for (Devlin et al. 2019, §3.1)
Step = Callable[..., tuple[Any, Any, jax.Array]]


def abstract_batch(config: ModelConfig, batch_size: int, length: int) -> dict[str, Any]:
    """The arrays of a batch, with the names that training gives them, for the objective that goes with the head."""
    integers = lambda *shape: jax.ShapeDtypeStruct((batch_size, *shape), jnp.int32)  # noqa: E731
    mask = jax.ShapeDtypeStruct((batch_size, length), bool)
    if (patches := config.patches) is not None:
        pixels = (batch_size, patches.channels, patches.height, patches.width)
        return {"pixel_values": jax.ShapeDtypeStruct(pixels, jnp.float32), "labels": integers()}
    tokens: dict[str, Any] = {"input_ids": integers(length)}
    if config.decoder is not None:
        both = {"decoder_input_ids": integers(length), "decoder_attention_mask": mask}
        return {**tokens, "attention_mask": mask, **both, "labels": integers(length)}
    if config.head in ("masked_lm", "pretraining"):
        few = integers(max(1, round(MASKED * length)))
        order = {"order_labels": integers()} if config.head == "pretraining" else {}
        return {**tokens, "attention_mask": mask, "label_positions": few, "labels": few, **order}
    if config.head == "causal_lm":
        return {**tokens, "labels": integers(length)}
    whole = config.head == "sequence_classification"
    return {**tokens, "attention_mask": mask, "labels": integers() if whole else integers(length)}


def training_step(config: ModelConfig, optimizer: optax.GradientTransformation, dtype: Any, remat: str) -> Step:
    """(trainable, other parameters, optimizer's state, batch, key) -> (trainable, state, loss)."""
    if config.head in ("none", "span", "replaced_token"):
        raise ValueError(
            f"plan: there is no objective for the head {config.head!r}; give the model one of another head"
        )

    def loss(moving: Any, fixed: Any, batch: dict[str, Any], key: jax.Array) -> jax.Array:
        logits = _logits(config, combine(moving, fixed), batch, dtype, remat, key)
        if config.head != "pretraining":
            return cross_entropy(logits, batch["labels"])
        return cross_entropy(logits.masked_lm, batch["labels"]) + cross_entropy(
            logits.sentence_order, batch["order_labels"]
        )

    def step(moving: Any, fixed: Any, state: Any, batch: dict[str, Any], key: jax.Array):
        value, gradient = jax.value_and_grad(loss)(moving, fixed, batch, key)
        updates, state = optimizer.update(gradient, state, moving)
        return optax.apply_updates(moving, updates), state, value

    return step


def _logits(config: ModelConfig, params: Any, batch: dict[str, Any], dtype: Any, remat: str, key: jax.Array) -> Any:
    names = {"decoder_input_ids": "decoder_ids", "decoder_attention_mask": "decoder_mask"}
    given = {names.get(name, name): array for name, array in batch.items() if "labels" not in name}
    inputs = [given.pop(name, None) for name in ("pixel_values" if config.patches else "input_ids", "attention_mask")]
    parts = (config, config.decoder)
    drops = any(p is not None and (p.dropout or p.attention_dropout or p.layer_dropout) for p in parts)
    rngs = {"dropout": key} if drops else {}
    return run(params, config, dtype, *inputs, **given, remat=remat, deterministic=not drops, rngs=rngs).logits


def cross_entropy(logits: Float[Array, "*B C"], labels: Integer[Array, "*B"]) -> Float[Array, ""]:
    """The mean over labels that are not negative."""
    rows = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    counted = labels >= 0
    return jnp.where(counted, jax.nn.logsumexp(logits, -1) - rows, 0).sum() / jnp.maximum(counted.sum(), 1)

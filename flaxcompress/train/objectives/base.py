"""What a training run minimises: an objective gives the terms of a loss as sums, so that they add up over batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from flaxcompress.config import ModelConfig
from flaxcompress.data.batches import IGNORED
from flaxcompress.nn import run
from flaxcompress.nn.logical import is_on_mesh
from flaxcompress.ops import label_scores


class Term(NamedTuple):
    """A mean, as its sum and how much it is over, float32 scalars.

    Attributes:
      total: the sum.
      weight: what it is divided by, once it is added up over microbatches and devices.
      scale: what the mean is multiplied by in the loss; 0 for one that is only watched, such as an accuracy.
    """

    total: Any
    weight: Any
    scale: float = 1.0


Terms = dict[str, Term]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A plain, hashable description of a loss; `loss` is pure.

    Attributes:
      dropout: whether the config's dropout is used while training.
    """

    dropout: bool = True

    def split(self) -> tuple[Objective, Any]:
        """The objective without the arrays that it needs, which stay as they are, and those arrays."""
        return self, ()

    def loss(self, run: Run, constants: Any, batch: Mapping[str, Any]) -> Terms:
        """The terms of the loss on a batch (its keys are those of `data.Batches`)."""
        raise NotImplementedError(f"{type(self).__name__}.loss")


@dataclasses.dataclass(frozen=True)
class Run:
    """A network with its parameters, ready for a batch; what an objective calls.

    Attributes:
      key: of dropout; None for none.
    """

    params: Any
    config: ModelConfig
    dtype: Any
    remat: str = "none"
    key: Any = None
    unroll: int = 1

    def __call__(self, batch: Mapping[str, Any], **options: Any) -> Any:
        """`Transformer`'s output on a batch."""
        given = {"decoder_ids": "decoder_input_ids", "decoder_mask": "decoder_attention_mask", "packs": "packs"}
        given |= {"label_positions": "label_positions", "features": "feature_ids"}
        options |= {name: batch[key] for name, key in given.items() if key in batch}
        config = self.config
        rates = [c for c in (config, config.decoder) if c is not None]
        if self.key is not None and any(c.dropout or c.attention_dropout or c.layer_dropout for c in rates):
            options |= {"deterministic": False, "rngs": {"dropout": self.key}}
        inputs = batch["pixel_values"] if config.patches is not None else batch["input_ids"]
        more = () if config.patches is not None else (batch.get("attention_mask"), batch.get("segment_ids"))
        return run(self.params, config, self.dtype, inputs, *more, remat=self.remat, unroll=self.unroll, **options)


@dataclasses.dataclass(frozen=True)
class Program:
    """An objective on a network of a config: (params, constants, batch, key) -> terms; hashable, to compile once."""

    objective: Objective
    config: ModelConfig
    dtype: Any
    remat: str = "none"
    unroll: int = 1

    def __call__(self, params: Any, constants: Any, batch: Mapping[str, Any], key: Any) -> Terms:
        key = key if self.objective.dropout else None
        run = Run(params, self.config, self.dtype, self.remat, key, self.unroll)
        return self.objective.loss(run, constants, batch)


def cross_entropy(
    logits: Float[Array, "*B V"],
    labels: Integer[Array, "*B"],
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    weights: Sequence[float] = (),
) -> Terms:
    """-log softmax(logits)[label] over the labels that count, in float32, and how many of them are the largest logit.

    Args:
      smoothing: the share of the target spread over all V (Szegedy et al. 2016, §7).
      z_loss: adds z·log²Z, Z the softmax's normaliser, which keeps logits from drifting (Chowdhery et al. 2022, §5).
      weights: of the V classes: what a label counts in the mean; all count alike where there are none.
    """
    logits = logits.astype(jnp.float32)
    counts = labels != IGNORED
    counted = counts.astype(jnp.float32)
    chosen, normaliser, largest = label_scores(logits, labels, whole=not is_on_mesh())
    value = normaliser - chosen
    if smoothing:
        value = (1.0 - smoothing) * value + smoothing * (normaliser - logits.mean(-1))
    if z_loss:
        value = value + z_loss * jnp.square(normaliser)
    right, number = largest & counts, counted.sum()
    if weights:
        counted = counted * jnp.asarray(weights, jnp.float32)[jnp.where(counts, labels, 0)]
    return {
        "cross_entropy": Term(jnp.where(counts, counted * value, 0.0).sum(), counted.sum()),
        "accuracy": Term(right.astype(jnp.float32).sum(), number, 0.0),
    }


def renamed(terms: Terms, prefix: str, scale: float = 1.0) -> Terms:
    """The terms under other names, those that count in the loss scaled."""
    return {f"{prefix}_{name}": term._replace(scale=term.scale * scale) for name, term in terms.items()}


def mean_of(terms: Terms, weights: Mapping[str, Any] | None = None) -> Float[Array, ""]:
    """The loss: Σ scale · total / weight; `weights` stand in for the terms' own where they are a part of a batch."""
    own = {name: term.weight for name, term in terms.items()} if weights is None else weights
    loss = jnp.zeros((), jnp.float32)
    for name, term in terms.items():
        if term.scale:
            loss += term.scale * term.total / jnp.maximum(own[name], 1e-12)
    return loss

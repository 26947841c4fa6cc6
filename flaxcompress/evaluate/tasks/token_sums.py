"""Sums over the tokens of a batch that count: what a language model's figures are made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress.data.batches import IGNORED
from flaxcompress.encoding import compute_dtype
from flaxcompress.evaluate.tasks.task import Result
from flaxcompress.model import Model
from flaxcompress.nn import run
from flaxcompress.ops import label_scores

Sums = dict[str, float]


class TokenSums:
    """Adds up what a model, and a reference of the same tokens, make of batches.

    Batches have input_ids, attention_mask and labels; of masked models also segment_ids, label_positions and, where
    there are two segments, order_labels.
    """

    def __init__(self, model: Model, reference: Model | None = None):
        self._models = [model] if reference is None else [model, reference]
        self.sums: Sums = {}

    def add(self, batch: Mapping[str, np.ndarray]) -> None:
        """Runs a batch."""
        params, configs = (tuple(getattr(one, name) for one in self._models) for name in ("params", "config"))
        for name, rows in _sums(params, dict(batch), configs, compute_dtype()).items():
            self.sums[name] = self.sums.get(name, 0.0) + float(np.asarray(rows, np.float64).sum())

    def result(self, prefix: str = "") -> Result:
        """nats_per_token, perplexity and accuracy of the model, or of the reference; and sentence_order_accuracy."""
        count = max(self.sums["tokens"], 1.0)
        nats = self.sums[f"{prefix}nats"] / count
        out: Result = {"nats_per_token": nats, "perplexity": math.exp(min(nats, 700.0))}
        out["accuracy"] = self.sums[f"{prefix}right"] / count
        if f"{prefix}order_right" in self.sums:
            pairs = self.sums["pairs"]
            out["sentence_order_accuracy"] = self.sums[f"{prefix}order_right"] / pairs if pairs else None
        return {f"{prefix}{name}": value for name, value in out.items()}

    def compared(self) -> Result:
        """kl_per_token and agreement of model and reference."""
        count = max(self.sums["tokens"], 1.0)
        return {"kl_per_token": self.sums["kl"] / count, "agreement": self.sums["same"] / count}


@functools.partial(jax.jit, static_argnums=(2, 3))
def _sums(params, batch, configs, dtype) -> dict[str, Any]:
    """Float32 sums of each row [B], by name."""
    labels, found, out = batch["labels"], [], {}
    counted = labels != IGNORED
    for weights, config, prefix in zip(params, configs, ("", "reference_"), strict=False):
        positions = {"label_positions": batch["label_positions"]} if "label_positions" in batch else {}
        segments = batch.get("segment_ids") if config.segments > 1 else None
        logits: Any = run(
            weights, config, dtype, batch["input_ids"], batch["attention_mask"], segments, **positions
        ).logits
        order = getattr(logits, "sentence_order", None)
        logits = getattr(logits, "masked_lm", logits).astype(jnp.float32)
        scores = label_scores(logits, labels, whole=True)
        out[f"{prefix}nats"] = jnp.where(counted, scores.normaliser - scores.chosen, 0.0).sum(-1)
        out[f"{prefix}right"] = (scores.largest & counted).sum(-1)
        if order is not None and "order_labels" in batch:
            wanted = batch["order_labels"]
            out["pairs"] = (wanted != IGNORED)[:, None].sum(-1)
            out[f"{prefix}order_right"] = (order.argmax(-1) == wanted)[:, None].sum(-1)
        found.append((logits, scores.normaliser))
    out["tokens"] = counted.sum(-1)
    if len(found) == 2:
        (ours, our_sum), (theirs, their_sum) = found
        log_ours, log_theirs = ours - our_sum[..., None], theirs - their_sum[..., None]
        out["kl"] = jnp.where(counted, (jnp.exp(log_theirs) * (log_theirs - log_ours)).sum(-1), 0.0).sum(-1)
        out["same"] = ((ours.argmax(-1) == theirs.argmax(-1)) & counted).sum(-1)
    return out

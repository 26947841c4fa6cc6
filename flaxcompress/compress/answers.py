"""How far a compressed model's answers are from the original's: of sentence encoders, and of causal models."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress.compress.statistics import Batch
from flaxcompress.config import ModelConfig
from flaxcompress.encoding import compute_dtype, pool
from flaxcompress.model import Model
from flaxcompress.nn import Transformer
from flaxcompress.nn.heads import HeadInputs
from flaxcompress.text import Pooling


class Answers:
    """The original's answers to some batches, and the loss of others beside them.

    The loss is the mean over texts of 1 - cosine of sentence vectors; of a causal model, the mean over tokens of the
    divergence KL(original‖compressed) of the next one. `statistics.answer` has the gradients that belong to it.

    Attributes:
      batches: of token ids and masks.
      unit: what the loss is: "1 - cosine" or "KL per token".
      parts: how many texts, or tokens, it is the mean of.
    """

    def __init__(
        self, original: Model, batches: Sequence[Batch], states: Sequence[Float[Array, "B T D"]] | None = None
    ):
        """`states` are the last layer's outputs, where they are known already."""
        self._original, self.batches = original, list(batches)
        self._causal = original.config.head == "causal_lm"
        self._pooling = original.assets.pooling or Pooling()
        states = [last_states(original, batch) for batch in batches] if states is None else states
        self._references = [self._answer(x, mask) for x, (_, mask) in zip(states, batches, strict=True)]
        counted = [mask.sum() if self._causal else mask.any(1).sum() for _, mask in batches]
        self.parts = int(sum(counted))
        self.unit = "KL per token" if self._causal else "1 - cosine"

    def loss_of_states(self, states: Sequence[Float[Array, "B T D"]]) -> float:
        """The loss of a model whose last layer puts out `states`, its final norm and head being the original's."""
        total = 0.0
        for x, (_, mask), reference in zip(states, self.batches, self._references, strict=True):
            total += float(_loss(self._answer(x, mask), reference, mask, self._causal))
        return total / self.parts

    def loss(self, model: Model) -> float:
        """The loss of a model on the same tokens."""
        total = 0.0
        for batch, reference in zip(self.batches, self._references, strict=True):
            found = self._answer(last_states(model, batch), batch[1], model)
            total += float(_loss(found, reference, batch[1], self._causal))
        return total / self.parts

    def _answer(self, x: Float[Array, "B T D"], mask: Any, model: Model | None = None) -> Any:
        model = self._original if model is None else model
        if self._causal:
            return _log_probabilities(model.params, x, model.config, compute_dtype())
        return _vectors(model.params, x, mask, model.config, compute_dtype(), self._pooling)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _last_states(params, ids, mask, config: ModelConfig, dtype):
    config = config.replace(final_norm=False, pooler=False)
    out: Any = Transformer(config, dtype).apply({"params": params}, ids, mask, need_logits=False)
    return out.last_hidden_state


def last_states(model: Model, batch: Batch) -> Float[Array, "B T D"]:
    """The last layer's output, before the final norm."""
    return _last_states(model.params, *batch, model.config, compute_dtype())


def _normed(module: Transformer, x: Any) -> Any:
    return module.final_norm(x) if module.config.final_norm else x


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _vectors(params, x, mask, config: ModelConfig, dtype, pooling: Pooling):
    normed = Transformer(config, dtype).apply({"params": params}, x, method=_normed)
    return pool(normed, mask, pooling)  # pyright: ignore[reportArgumentType]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _log_probabilities(params, x, config: ModelConfig, dtype):
    def logits(module: Transformer, x: Any) -> Any:
        return module.head(_normed(module, x), HeadInputs(module.embedding.used("token"), None, None, None))

    found: Any = Transformer(config, dtype).apply({"params": params}, x, method=logits)
    return jax.nn.log_softmax(found.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=3)
def _loss(found: Any, reference: Any, mask: Any, causal: bool) -> Any:
    if causal:
        return ((jnp.exp(reference) * (reference - found)).sum(-1) * mask).sum()
    size = jnp.linalg.norm(found, axis=-1) * jnp.linalg.norm(reference, axis=-1)
    cosine = (found * reference).sum(-1) / jnp.maximum(size, 1e-12)
    return ((1.0 - cosine) * mask.any(1)).sum()

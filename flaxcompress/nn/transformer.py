"""The whole network: embeddings, layers, pooler and head, as `ModelConfig` says."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from flaxcompress.config import ModelConfig
from flaxcompress.nn.embedding import Embedding
from flaxcompress.nn.heads import HEADS, Pooler
from flaxcompress.nn.relative_bias import RelativeBias
from flaxcompress.nn.stack import Record, Stack


class TransformerOutput(NamedTuple):
    """Fields that were not asked for, or that the structure lacks, are None."""

    last_hidden_state: Float[Array, "B T D"]
    pooled: Any = None
    logits: Any = None
    hidden_states: Any = None
    attentions: Any = None
    recorded: Any = None


class Transformer(nn.Module):
    """[B, T] token ids -> `TransformerOutput`; computes in `dtype`, norms and softmax in float32."""

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        ids: Integer[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        segments: Integer[Array, "B T"] | None = None,
        *,
        deterministic: bool = True,
        need_hidden_states: bool = False,
        need_attentions: bool = False,
        need_logits: bool = True,
        record: Record | None = None,
        vectors: Float[Array, "B T D"] | None = None,
    ) -> TransformerOutput:
        config = self.config
        embedding = Embedding(config, self.dtype, name="embedding")
        x = embedding(ids, segments, deterministic=deterministic, vectors=vectors)
        bias = RelativeBias(config, name="relative_bias")(ids.shape[1]) if config.relative_buckets else None
        out = Stack(config, name="layers")(
            x,
            mask,
            bias,
            deterministic=deterministic,
            need_hidden_states=need_hidden_states,
            need_attentions=need_attentions,
            record=record,
        )
        hidden = None
        if need_hidden_states:
            hidden = jnp.concatenate([out.hidden_states, out.x[None]])
        pooled = Pooler(config, name="pooler")(out.x) if config.pooler else None
        logits = None
        if config.head != "none" and (need_logits or self.is_initializing()):
            logits = HEADS[config.head](config, name="head")(out.x, embedding.token)
        return TransformerOutput(out.x, pooled, logits, hidden, out.attentions, out.recorded)


@functools.partial(jax.jit, static_argnums=(2, 3))
def first_input(
    params: Any, ids: Integer[Array, "B T"], config: ModelConfig, dtype: Any, vectors: Float[Array, "B T E"]
) -> tuple[Float[Array, "B T D"], Float[Array, "H T T"] | None]:
    """What the first layer gets, x and the bias of all layers' scores, for methods that run layer by layer.

    `vectors` are the token table's rows.
    """
    x = Embedding(config, dtype).apply({"params": params["embedding"]}, ids, vectors=vectors)
    if not config.relative_buckets:
        return x, None  # pyright: ignore[reportReturnType]
    return x, RelativeBias(config).apply({"params": params["relative_bias"]}, ids.shape[1])  # pyright: ignore[reportReturnType]

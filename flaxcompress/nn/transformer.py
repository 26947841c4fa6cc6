"""The whole network: embeddings, layers, final norm, pooler and head, as `ModelConfig` says."""

from __future__ import annotations

import functools
import typing
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from flaxcompress.config import ModelConfig
from flaxcompress.formats import take
from flaxcompress.nn.add_norm import Norm
from flaxcompress.nn.cache import Cache, seen, slots_of
from flaxcompress.nn.context import Context
from flaxcompress.nn.embedding import Embedding
from flaxcompress.nn.heads import BY_TOKEN, HEADS, HeadInputs, Pooler
from flaxcompress.nn.image_embedding import ImageEmbedding
from flaxcompress.nn.linformer import SequenceProjection, shares_one
from flaxcompress.nn.logical import constrain
from flaxcompress.nn.packs import check_packs, first_places, same_document
from flaxcompress.nn.relative_bias import RelativeBias
from flaxcompress.nn.stack import Record, Stack
from flaxcompress.ops import both, frequencies, rotation, sight


class Memory(NamedTuple):
    """The encoder's output [B, S, D], and which of its tokens are no padding [B, S] (None: all)."""

    states: Any
    mask: Any = None


class TransformerOutput(NamedTuple):
    """Fields that were not asked for, or that the structure lacks, are None.

    With a decoder all fields are the decoder's; `encoder` has those of the encoder, where it ran.
    """

    last_hidden_state: Float[Array, "B T D"]
    pooled: Any = None
    logits: Any = None
    hidden_states: Any = None
    attentions: Any = None
    cross_attentions: Any = None
    recorded: Any = None
    cache: Any = None
    encoder: Any = None
    projections: Any = None


class Transformer(nn.Module):
    """[B, T] token ids -> `TransformerOutput`; computes in `dtype`, norms and softmax in float32.

    With a decoder, `ids` are the encoder's; the decoder's make it run too. With `last_logits` a language-modelling head
    sees the last token only, with `label_positions` those places of every row alone: it is the dearest part of a step.
    `remat` ("none", "full" or "dots") trades a gradient's memory for time (`nn/remat.py`). `unroll` layers make up
    a turn of the loop over layers: with more of them a gradient copies less, and takes longer to compile.

    `packs` number the documents of each row 1, 2, …, 0 is padding: tokens see their own document alone, whose positions
    begin at 0. What is read of a row's first token, the pooled output, is then that of its first document.

    Attributes:
      prefix: what the addresses begin with: "" or "decoder/".
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    prefix: str = ""

    def setup(self):
        config = self.config
        kind = Embedding if config.patches is None else ImageEmbedding
        self.embedding: Any = kind(config, self.dtype, self.prefix)
        if config.relative_buckets:
            self.relative_bias = RelativeBias(config, self.prefix)
        if shares_one(config):
            self.sequence = SequenceProjection(config, f"{self.prefix}sequence")
        self.layers = Stack(config, self.prefix)
        if config.final_norm:
            self.final_norm = Norm(config, f"{self.prefix}final_norm", self.dtype)
        if config.pooler:
            self.pooler = Pooler(config)
        if config.head != "none":
            self.head: Any = HEADS[config.head](config)
        if config.decoder is not None:
            self.decoder = Transformer(config.decoder.replace(formats=config.formats), self.dtype, "decoder/")

    def __call__(
        self,
        ids: Integer[Array, "B S"] | None,
        mask: Bool[Array, "B S"] | None = None,
        segments: Integer[Array, "B S"] | None = None,
        *,
        decoder_ids: Integer[Array, "B T"] | None = None,
        decoder_mask: Bool[Array, "B T"] | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
        need_hidden_states: bool = False,
        need_attentions: bool = False,
        need_projections: bool = False,
        need_logits: bool = True,
        last_logits: bool = False,
        record: Record | None = None,
        vectors: Float[Array, "B T D"] | None = None,
        remat: str = "none",
        unroll: int = 1,
        features: Integer[Array, "B S"] | None = None,
        packs: Integer[Array, "B S"] | None = None,
        label_positions: Integer[Array, "B M"] | None = None,
    ) -> TransformerOutput:
        config = self.config
        need = {"deterministic": deterministic, "need_hidden_states": need_hidden_states, "record": record}
        need |= {"need_attentions": need_attentions, "need_projections": need_projections}
        need |= {"remat": remat, "unroll": unroll}
        if packs is not None:
            check_packs(config, attention_mask=mask, cache=cache)
        if config.decoder is None:
            more = {"vectors": vectors, "features": features, "packs": packs}
            out = self.body(ids, mask, segments, cache=cache, **more, **need)
        else:
            out = None if ids is None else self.body(ids, mask, segments, vectors=vectors, features=features, **need)
            if self.is_initializing() and decoder_ids is None:
                decoder_ids = ids
            if decoder_ids is None:
                assert out is not None, "ids of the encoder or of the decoder"
                return out
            seen = None if out is None else Memory(out.last_hidden_state, mask)
            rows = take(self.embedding.used("token"), decoder_ids)
            after = self.decoder.body(decoder_ids, decoder_mask, cache=cache, vectors=rows, memory=seen, **need)
            out = after._replace(encoder=out)
        if config.head == "none" or not (need_logits or self.is_initializing()):
            return out
        x, tokens = out.last_hidden_state, (ids, mask) if config.decoder is None else (decoder_ids, decoder_mask)
        table = None if config.patches is not None else self.embedding.used("token")
        given = HeadInputs(table, out.pooled, *tokens)
        if label_positions is not None:
            x = at_places(x, label_positions, config)
        return out._replace(logits=self.head(x[:, -1:] if last_logits else x, given))

    def body(
        self,
        ids: Any,
        mask: Bool[Array, "B T"] | None = None,
        segments: Integer[Array, "B T"] | None = None,
        *,
        cache: Cache | None = None,
        vectors: Float[Array, "B T E"] | None = None,
        features: Integer[Array, "B T"] | None = None,
        memory: Memory | None = None,
        packs: Integer[Array, "B T"] | None = None,
        deterministic: bool = True,
        need_hidden_states: bool = False,
        need_attentions: bool = False,
        need_projections: bool = False,
        record: Record | None = None,
        remat: str = "none",
        unroll: int = 1,
    ) -> TransformerOutput:
        """Embeddings, layers, final norm and pooler."""
        config = self.config
        more = {"deterministic": deterministic, "vectors": vectors, "features": features, "memory": memory}
        x, context, after = self.start(ids, mask, segments, cache, packs=packs, **more)
        out = self.layers(
            x,
            context,
            cache=None if cache is None else cache.layers,
            deterministic=deterministic,
            need_hidden_states=need_hidden_states,
            need_attentions=need_attentions,
            need_projections=need_projections,
            record=record,
            remat=remat,
            unroll=unroll,
        )
        x = self.final_norm(out.x) if config.final_norm else out.x
        hidden = jnp.concatenate([out.hidden_states, x[None]]) if need_hidden_states else None
        pooled = self.pooler(x) if config.pooler else None
        kept = None if after is None else after._replace(layers=out.cache)
        beside = (out.attentions, out.cross_attentions, out.recorded, kept)
        return TransformerOutput(x, pooled, None, hidden, *beside, projections=out.projections)

    def start(
        self,
        ids: Integer[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        segments: Integer[Array, "B T"] | None = None,
        cache: Cache | None = None,
        *,
        deterministic: bool = True,
        vectors: Float[Array, "B T E"] | None = None,
        features: Integer[Array, "B T"] | None = None,
        memory: Memory | None = None,
        packs: Integer[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Context, Cache | None]:
        """What the first layer gets, what all layers see beside it, and the cache's bookkeeping after these tokens.

        `ids` are pixels [B, C, height, width] in a model of images. A decoder's `memory` is left out where the cache
        has its keys and values.

        Positions count the tokens that are not padding where there is a cache, and all tokens where there is none; in
        packed rows those of the document. They begin at P behind a prefix.
        """
        config = self.config
        if config.patches is not None:
            x = constrain(self.embedding(ids, deterministic=deterministic), "batch", "length", None)
            return x, Context(sequence=self.sequence(x.shape[1]) if shares_one(config) else None), None
        length = ids.shape[1]
        positions, after, slots, first = None, None, None, None
        if packs is not None:
            mask, first = packs > 0, first_places(packs)
            positions = jnp.arange(length) - first
            real, places, queries = same_document(packs), jnp.arange(length), jnp.arange(length)
        elif cache is None:
            real, places, queries = mask, jnp.arange(length), jnp.arange(length)
        else:
            mask = jnp.ones(ids.shape, bool) if mask is None else mask
            positions = jnp.maximum(cache.counts[:, None] + jnp.cumsum(mask, axis=1) - 1, 0)
            slots, queries = slots_of(cache, length), cache.length + jnp.arange(length)
            real, places, after = seen(cache, config, mask, slots)
        positions = None if positions is None else positions + config.prefix_length
        more = {"deterministic": deterministic, "vectors": vectors, "features": features}
        x = self.embedding(ids, segments, positions=positions, first=first, **more)
        x = constrain(x, "batch", "length", None)
        wide, near = real, None
        if config.causal or config.window:
            wide = both(real, sight(queries, places, causal=config.causal))
        if config.window:
            near = both(real, sight(queries, places, causal=config.causal, window=config.window))
        turned = {}
        if config.rotary is not None:
            positions = config.prefix_length + jnp.arange(length)[None] if positions is None else positions
            for name, local in (("rotation", False), ("local_rotation", True)):
                frequency = frequencies(config.rotary, config.rotary_dim, local=local)
                turned[name] = rotation(positions, frequency, config.rotary.magnitude)
        bias = self.relative_bias(queries, places) if config.relative_buckets else None
        context = Context(mask, wide, near, bias, slots=slots, **turned)
        if shares_one(config):
            context = context._replace(sequence=self.sequence(length))
        if memory is not None:
            context = context._replace(memory=memory.states, memory_mask=memory.mask)
            if after is not None:
                all_real = jnp.ones(memory.states.shape[:2], bool)
                after = after._replace(memory_mask=all_real if memory.mask is None else memory.mask)
        elif cache is not None:
            context = context._replace(memory_mask=cache.memory_mask)
        return x, context, after


def at_places(x: Float[Array, "B T D"], places: Integer[Array, "B M"], config: ModelConfig) -> Float[Array, "B M D"]:
    """Some of every row's vectors. Raises ValueError for a head that does not read tokens one by one."""
    if config.head not in BY_TOKEN:
        raise ValueError(
            f"label_positions: the head {config.head!r} reads whole sequences; known to read tokens: "
            f"{', '.join(BY_TOKEN)}"
        )
    return jnp.take_along_axis(x, places[..., None], axis=1, mode="clip")


def run(params: Any, config: ModelConfig, dtype: Any, *inputs: Any, **options: Any) -> TransformerOutput:
    """`Transformer` applied to its parameters."""
    return typing.cast(TransformerOutput, Transformer(config, dtype).apply({"params": params}, *inputs, **options))


@functools.partial(jax.jit, static_argnums=(2, 3))
def first_input(
    params: Any,
    ids: Integer[Array, "B T"],
    config: ModelConfig,
    dtype: Any,
    mask: Bool[Array, "B T"],
    vectors: Float[Array, "B T E"],
) -> tuple[Float[Array, "B T D"], Context]:
    """What the first layer gets, for methods that run layer by layer; `vectors` are the token table's rows."""
    found: Any = Transformer(config, dtype).apply(
        {"params": params}, ids, mask, vectors=vectors, method=Transformer.start
    )
    return found[:2]

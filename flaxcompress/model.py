"""Model: a structure, weights and assets, as one value that can be called."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flaxcompress import tree
from flaxcompress.blocks import block_rows, by_blocks, side_by_side
from flaxcompress.config import ModelConfig
from flaxcompress.decoding import Constraint, Conversation, OnToken, Prompt, Sampling, generate
from flaxcompress.encoding import compute_dtype, encode_stream
from flaxcompress.formats import nbytes, spec_of, stored_values
from flaxcompress.inputs import (
    check_cache,
    check_decoder_inputs,
    check_features,
    check_inputs,
    check_pixels,
    is_traced,
)
from flaxcompress.nn import Cache, Transformer, init_cache, run
from flaxcompress.text import Assets


@flax.struct.dataclass
class ModelOutput:
    """What a forward pass returns; fields that were not asked for, or that the structure lacks, are None.

    Attributes:
      last_hidden_state: [B, T, D].
      pooled: [B, D], BERT's tanh of the first token; sentence vectors come from `Model.encode`.
      logits: of the head, float32: [B, T, V] of a language model, [B, C] or [B, T, C] of a classifier; of
        "pretraining", `logits.masked_lm` [B, T, V] and `logits.sentence_order` [B, C].
      hidden_states: L + 1 tensors [B, T, D], embeddings first.
      attentions: L tensors [B, H, T, T].
      cache: keys and values for later tokens, where a cache was given; None otherwise.
      cross_attentions: L tensors [B, H, T, S], of a decoder on the encoder's tokens; all fields above are then its own.
      encoder_last_hidden_state, encoder_hidden_states, encoder_attentions: the encoder's, where there is a decoder.
    """

    last_hidden_state: Any
    pooled: Any = None
    logits: Any = None
    hidden_states: Any = None
    attentions: Any = None
    cache: Any = None
    cross_attentions: Any = None
    encoder_last_hidden_state: Any = None
    encoder_hidden_states: Any = None
    encoder_attentions: Any = None


@flax.struct.dataclass
class Model:
    """`config` (structure), `params` (weights, each matrix in a format) and `assets`; the leaves are `params` alone."""

    params: Any
    config: ModelConfig = flax.struct.field(pytree_node=False)
    assets: Assets = flax.struct.field(pytree_node=False, default=Assets())

    @classmethod
    def init(cls, config: ModelConfig, *, key: jax.Array, assets: Assets | None = None) -> Model:
        """A model with random weights in the formats that `config` asks for."""
        return cls(params=init_params(config, key), config=config, assets=assets or Assets(max_length=config.positions))

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        segment_ids: Any = None,
        *,
        feature_ids: Any = None,
        pixel_values: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        cache: Cache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ModelOutput:
        """Runs the network on token ids [B, T]; `attention_mask` [B, T] is 1 where a token is real.

        `feature_ids` [B, T] are those of a lexicon's terms (see `Terms.find`), where the model has one; without them no
        token has any.

        Models of images take `pixel_values` [B, C, height, width] instead; positions are stretched to the image's size.
        A model with a decoder takes the decoder's tokens too; without them, its encoder alone runs. While decoding with
        a cache, the source is given once, in the call that fills the cache.
        Compiled once per shape. With a `cache` (see `new_cache`), the tokens follow those that it holds, and the mask
        is for them alone. Raises ValueError for ids outside the vocabulary, for more tokens than positions or than the
        cache has room for, and for masks and segments of another shape.
        """
        if self.config.patches is not None:
            ids, mask, segments = check_pixels(self.config, pixel_values, input_ids, attention_mask), None, None
        elif input_ids is None and decoder_input_ids is not None and cache is not None:
            ids, mask, segments = None, None, None
        else:
            ids, mask, segments = check_inputs(self.config, input_ids, attention_mask, segment_ids, pixel_values)
        features = check_features(self.config, feature_ids, ids)
        batch = None if ids is None else ids.shape[0]
        target = check_decoder_inputs(self.config, decoder_input_ids, decoder_attention_mask, batch)
        if cache is not None:
            check_cache(self.config, cache, ids, target[0])
        rows = None
        extra = cache is not None or target[0] is not None or output_hidden_states or output_attentions
        if ids is not None and ids.ndim == 2 and not (extra or is_traced(ids)):
            rows = block_rows(*ids.shape)
        if rows is not None:
            blocks = functools.partial(
                _forward_blocks, self.params, config=self.config, dtype=compute_dtype(), rows=rows
            )
            out = side_by_side(blocks, ids, mask, segments, features)
        else:
            need = (output_hidden_states, output_attentions)
            inputs = (ids, mask, segments, features, target, cache)
            out = _forward(self.params, *inputs, self.config, compute_dtype(), *need)
        split = lambda x: None if x is None else tuple(x)  # noqa: E731
        encoder = out if self.config.decoder is not None and target[0] is None else out.encoder
        return ModelOutput(
            last_hidden_state=out.last_hidden_state,
            pooled=out.pooled,
            logits=out.logits,
            hidden_states=split(out.hidden_states),
            attentions=split(out.attentions),
            cache=out.cache,
            cross_attentions=split(out.cross_attentions),
            encoder_last_hidden_state=None if encoder is None else encoder.last_hidden_state,
            encoder_hidden_states=None if encoder is None else split(encoder.hidden_states),
            encoder_attentions=None if encoder is None else split(encoder.attentions),
        )

    def new_cache(self, batch: int, length: int, *, source: int = 0) -> Cache:
        """An empty key/value cache for `batch` sequences of `length` tokens, in the compute dtype.

        Args:
          source: how many tokens the encoder's sequences have, where there is a decoder.

        Raises ValueError for a model that is not causal, and for more tokens than positions.
        """
        config = self.config.decoder or self.config
        if not config.causal:
            raise ValueError(
                f"cache: a {self.config.family} model sees later tokens too; only causal ones have a cache"
            )
        if not 1 <= length <= config.positions or batch < 1:
            raise ValueError(f"cache: {batch} sequences of {length} tokens; the model has {config.positions} positions")
        if (source > 0) != (self.config.decoder is not None) or source > self.config.positions:
            raise ValueError(f"cache: a source of {source} tokens; give its length just where the model has a decoder")
        return init_cache(self.config, batch, length, compute_dtype(), memory=source)

    def encode(
        self, texts: str | Iterable[str], *, batch_size: int = 32, progress: bool = False
    ) -> Float[np.ndarray, "N D"]:
        """Sentence vectors [N, D] float32, pooled and normalised as the checkpoint's modules.json says.

        Texts are sorted by length and padded to one of a few lengths, so that few shapes are compiled. Any iterable is
        read as a stream, 8,192 texts at a time. Texts over the length limit are cut, with one warning that counts them.
        """
        if isinstance(texts, str):
            return self.encode([texts], batch_size=batch_size)[0]
        parts = list(self.encode_stream(texts, batch_size=batch_size, progress=progress))
        return np.concatenate(parts) if parts else np.zeros((0, self.config.width), np.float32)

    def encode_stream(
        self, texts: Iterable[str], *, batch_size: int = 32, progress: bool = False
    ) -> Iterator[Float[np.ndarray, "n D"]]:
        """Yields the vectors of a stream of texts, in order, up to 8,192 at a time; memory stays bounded."""
        return encode_stream(self.params, self.config, self.assets, texts, batch_size=batch_size, progress=progress)

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        key: jax.Array | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        beams: int = 1,
        length_penalty: float = 1.0,
        stop: Sequence[str] = (),
        on_token: OnToken | None = None,
        constraint: Constraint | None = None,
        return_ids: bool = False,
    ) -> Any:
        """Continues prompts: the new text of each, or `Generated` with its token ids when asked for.

        Greedy without a key, drawn with one. All prompts run in one batch; they may differ in length.

        Args:
          prompts: texts, or token ids; a single text gives a single answer.
          max_new_tokens: tokens per answer at most.
          key: for drawing; then the temperature is 1 unless given.
          temperature, top_k, top_p, repetition_penalty: see `Sampling`.
          beams: above 1, beam search (greedy in all else).
          length_penalty: beams are ranked by log-probability / length ** length_penalty.
          stop: texts at which an answer ends; they are cut off.
          on_token: called with (prompt's number, id, new text) for every token as it comes.
          constraint: tokens and phrases that may not, or alone may, come.

        Raises:
          ValueError: an empty prompt, ids outside the vocabulary, more tokens than positions, a model that does not
            predict the next token, or settings that do not go together.
        """
        if temperature is None:
            temperature = 0.0 if key is None else 1.0
        rules = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
        found = generate(
            self.params,
            self.config,
            self.assets,
            [prompts] if isinstance(prompts, str) else prompts,
            max_new_tokens=max_new_tokens,
            rules=rules,
            key=key,
            beams=beams,
            length_penalty=length_penalty,
            stop=stop,
            on_token=on_token,
            constraint=constraint,
        )
        answers: list[Any] = found if return_ids else [answer.text for answer in found]
        return answers[0] if isinstance(prompts, str) else answers

    def chat(self, messages: Sequence[Mapping[str, Any]] = ()) -> Conversation:
        """A conversation by the checkpoint's chat template, which may begin with messages, such as a system prompt.

        `chat.say("…")` gives the model's answer; a turn runs only what the cache of the turns before does not hold.
        Raises ValueError for a model that does not predict the next token.
        """
        return Conversation(self.params, self.config, self.assets, messages)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, each shared weight once."""
        return nbytes(self.params)

    @property
    def parameters(self) -> int:
        """How many weights are stored: packed integers one by one, scales included."""
        return sum(stored_values(node) for node in tree.View(tree.abstract(self.params)).values())


@functools.partial(jax.jit, static_argnums=(7, 8, 9, 10))
def _forward(params, ids, mask, segments, features, target, cache, config, dtype, hidden_states, attentions):
    need = {"need_hidden_states": hidden_states, "need_attentions": attentions, "features": features}
    decoder = {"decoder_ids": target[0], "decoder_mask": target[1]}
    return run(params, config, dtype, ids, mask, segments, cache=cache, **decoder, **need)


@functools.partial(jax.jit, static_argnames=("config", "dtype", "rows"))
def _forward_blocks(params, ids, mask, segments, features, *, config, dtype, rows):
    def one(ids, mask, segments, features):
        return run(params, config, dtype, ids, mask, segments, features=features)

    return by_blocks(one, rows)(ids, mask, segments, features)


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: jax.Array) -> Any:
    """Random parameters, the tree that `config` asks for."""
    ids: Any = jnp.zeros((1, 1), jnp.int32)
    if (patches := config.patches) is not None:
        ids = jnp.zeros((1, patches.channels, patches.height, patches.width))
    return Transformer(config).init(key, ids)["params"]


def abstract_flat(config: ModelConfig) -> tree.Flat:
    """{address: abstract matrix} of a config, without computing anything."""
    return tree.flatten(jax.eval_shape(functools.partial(init_params, config), jax.random.key(0)))


def replace_matrices(model: Model, changes: Mapping[str, Any]) -> Model:
    """A model whose matrices at some addresses are exchanged, the config's format rules following them."""
    config = model.config
    for address, node in changes.items():
        config = config.with_format(address, spec_of(node).to_json())
    return model.replace(params=tree.replace(model.params, changes), config=config)  # pyright: ignore[reportAttributeAccessIssue]

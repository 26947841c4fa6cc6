"""Model: a structure, weights and assets, as one value that can be called."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flaxcompress import tree
from flaxcompress.blocks import block_rows, by_blocks, side_by_side
from flaxcompress.config import ModelConfig
from flaxcompress.encoding import compute_dtype, encode_stream
from flaxcompress.formats import nbytes, spec_of, stored_values
from flaxcompress.nn import Transformer
from flaxcompress.text import Assets


@flax.struct.dataclass
class ModelOutput:
    """What a forward pass returns; fields that were not asked for, or that the structure lacks, are None.

    Attributes:
      last_hidden_state: [B, T, D].
      pooled: [B, D], BERT's tanh of the first token; sentence vectors come from `Model.encode`.
      logits: [B, T, V] of the masked-LM head.
      hidden_states: L + 1 tensors [B, T, D], embeddings first.
      attentions: L tensors [B, H, T, T].
      cache: key/value cache; None for encoders.
    """

    last_hidden_state: Any
    pooled: Any = None
    logits: Any = None
    hidden_states: Any = None
    attentions: Any = None
    cache: Any = None


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
        input_ids: Any,
        attention_mask: Any = None,
        segment_ids: Any = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ModelOutput:
        """Runs the network on token ids [B, T]; `attention_mask` [B, T] is 1 where a token is real.

        Compiled once per shape. Raises ValueError for ids outside the vocabulary, for more tokens than positions, and
        for masks and segments of another shape.
        """
        ids, mask, segments = check_inputs(self.config, input_ids, attention_mask, segment_ids)
        rows = None
        if not (isinstance(ids, jax.core.Tracer) or output_hidden_states or output_attentions):  # pyright: ignore[reportAttributeAccessIssue]
            rows = block_rows(*ids.shape)
        if rows is not None:
            blocks = functools.partial(
                _forward_blocks, self.params, config=self.config, dtype=compute_dtype(), rows=rows
            )
            out = side_by_side(blocks, ids, mask, segments)
        else:
            need = (output_hidden_states, output_attentions)
            out = _forward(self.params, ids, mask, segments, self.config, compute_dtype(), *need)
        split = lambda x: None if x is None else tuple(x)  # noqa: E731
        return ModelOutput(
            last_hidden_state=out.last_hidden_state,
            pooled=out.pooled,
            logits=out.logits,
            hidden_states=split(out.hidden_states),
            attentions=split(out.attentions),
        )

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

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, each shared weight once."""
        return nbytes(self.params)

    @property
    def parameters(self) -> int:
        """How many weights are stored: packed integers one by one, scales included."""
        return sum(stored_values(node) for node in tree.View(tree.abstract(self.params)).values())


def check_inputs(config: ModelConfig, input_ids: Any, attention_mask: Any, segment_ids: Any):
    """Arrays of the right shape and range, or ValueError with what was given and what is allowed."""
    traced = isinstance(input_ids, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]
    ids = input_ids if traced else np.asarray(input_ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"input_ids: expected integers of shape [B, T], got {ids.dtype} {list(ids.shape)}")
    if ids.shape[1] > config.positions:
        raise ValueError(f"input_ids: {ids.shape[1]} tokens, but the model has {config.positions} positions")
    if isinstance(ids, np.ndarray) and ids.size and not 0 <= ids.min() <= ids.max() < config.vocabulary:
        raise ValueError(
            f"input_ids: values {ids.min()} … {ids.max()} lie outside the vocabulary 0 … {config.vocabulary - 1}"
        )
    for name, value in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
        if value is not None and tuple(np.shape(value)) != tuple(ids.shape):
            raise ValueError(f"{name}: shape {list(np.shape(value))} differs from input_ids' {list(ids.shape)}")
    if segment_ids is not None and not traced:
        values = np.asarray(segment_ids)
        if values.size and not 0 <= values.min() <= values.max() < max(1, config.segments):
            raise ValueError(
                f"segment_ids: values {values.min()} … {values.max()} lie outside 0 … {max(1, config.segments) - 1}"
            )
    mask = None if attention_mask is None else jnp.asarray(attention_mask) != 0
    segments = None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    return jnp.asarray(ids, jnp.int32), mask, segments


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _forward(params, ids, mask, segments, config, dtype, hidden_states, attentions):
    return Transformer(config, dtype).apply(
        {"params": params}, ids, mask, segments, need_hidden_states=hidden_states, need_attentions=attentions
    )


@functools.partial(jax.jit, static_argnames=("config", "dtype", "rows"))
def _forward_blocks(params, ids, mask, segments, *, config, dtype, rows):
    net = Transformer(config, dtype)
    return by_blocks(lambda *batch: net.apply({"params": params}, *batch), rows)(ids, mask, segments)


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: jax.Array) -> Any:
    """Random parameters, the tree that `config` asks for."""
    return Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def abstract_flat(config: ModelConfig) -> tree.Flat:
    """{address: abstract matrix} of a config, without computing anything."""
    return tree.flatten(jax.eval_shape(functools.partial(init_params, config), jax.random.key(0)))


def replace_matrices(model: Model, changes: Mapping[str, Any]) -> Model:
    """A model whose matrices at some addresses are exchanged, the config's format rules following them."""
    config = model.config
    for address, node in changes.items():
        config = config.with_format(address, spec_of(node).to_json())
    return model.replace(params=tree.replace(model.params, changes), config=config)  # pyright: ignore[reportAttributeAccessIssue]

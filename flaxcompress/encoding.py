"""Sentence vectors: pooling, and encoding many texts in batches of a few shapes."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from flaxcompress import tree
from flaxcompress.config import ModelConfig
from flaxcompress.formats import dense, map_parts, take
from flaxcompress.nn import Transformer
from flaxcompress.progress import progress_bar
from flaxcompress.terms import read_terms
from flaxcompress.text import Assets, Pooling, pad_ids

log = logging.getLogger("flaxcompress")

# Lengths that batches are padded to. A padded token costs as much as a real one, and a length costs a compilation:
# fine steps where texts are many and short, coarse ones where they are few.
_FINE = (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 160, 192, 256)
_COARSE = (16, 32, 64, 128, 256)
_MANY = 2048  # texts from which fine steps pay
_CHUNK = 8192  # texts tokenized and sorted together when encoding a stream
_BLOCK = 2048  # rows of a table looked up by one program


def compute_dtype() -> Any:
    """bfloat16 where matrix units want it, float32 on CPU."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def pool(x: Float[Array, "B T D"], mask: Array, pooling: Pooling) -> Float[Array, "B D"]:
    """Sentence vectors from token vectors, in float32; an all-padding row gives zeros."""
    x = x.astype(jnp.float32)
    weights = mask.astype(jnp.float32)[..., None]
    if pooling.mode == "cls":
        pooled = x[:, 0] * weights[:, 0]
    elif pooling.mode == "max":
        pooled = jnp.where(weights > 0, x, -jnp.inf).max(1)
        pooled = jnp.where(weights.any(1), pooled, 0.0)
    else:
        pooled = (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1e-9)
    if pooling.normalize:
        # Not divided by the norm: its gradient at zero, an all-padding row, is NaN.
        pooled = pooled * jax.lax.rsqrt(jnp.maximum(jnp.square(pooled).sum(-1, keepdims=True), 1e-24))
    return pooled


def sentence_vectors(
    params, ids, mask, config: ModelConfig, dtype, pooling: Pooling, features=None
) -> Float[Array, "B D"]:
    """Pooled vectors of a padded batch; pure, for use under jit and grad."""
    out = Transformer(config, dtype).apply({"params": params}, ids, mask, need_logits=False, features=features)
    return pool(out.last_hidden_state, mask, pooling)  # pyright: ignore[reportAttributeAccessIssue]


_sentence_vectors = functools.partial(jax.jit, static_argnums=(3, 4, 5))(sentence_vectors)


def bucket_length(length: int, limit: int, *, texts: int = _MANY) -> int:
    """The length that a batch is padded to whose longest text has `length` tokens, among `texts` to encode in all."""
    for bucket in _FINE if texts >= _MANY else _COARSE:
        if length <= bucket:
            return min(bucket, max(limit, length))
    return min(math.ceil(length / 128) * 128, max(limit, length))


def lookup(table: Any, ids: Integer[np.ndarray, " n"]) -> Float[Array, "n D"]:
    """Rows of a table in any format, float32, looked up in blocks of one shape: one program for any number of ids."""
    size = -len(ids) % _BLOCK
    padded = np.pad(np.asarray(ids, np.int32), (0, size)).reshape(-1, _BLOCK)
    return jnp.concatenate([_rows(table, block) for block in padded])[: len(ids)]


_rows = jax.jit(take)


def encode_stream(
    params: Any, config: ModelConfig, assets: Assets, texts: Iterable[str], *, batch_size: int, progress: bool
) -> Iterator[Float[np.ndarray, "n D"]]:
    """Yields the vectors of a stream of texts, in order, up to 8,192 at a time (see `Model.encode`).

    Many texts are encoded with the kernels dequantized once, and with a dense table of the tokens that they hold.
    """
    if batch_size < 1:
        raise ValueError(f"encode: batch_size must be at least 1, got {batch_size}")
    known = len(texts) if isinstance(texts, Sequence) else None
    pooling = assets.pooling or Pooling()
    ready, rows, truncated = None, 0, 0
    with progress_bar("encode", known, show=progress) as advance:
        for chunk in _chunks(texts, _CHUNK):
            batch = assets.tokenize(chunk)
            truncated += batch.truncated
            highest = max((max(row, default=0) for row in batch.ids), default=0)
            if highest >= config.vocabulary:
                raise ValueError(
                    f"encode: the tokenizer gives id {highest}, but the model's vocabulary has {config.vocabulary} "
                    "entries: tokenizer and weights do not belong together"
                )
            ids, pad, used = batch.ids, config.pad_token, params
            features = None
            if config.lexicon is not None and (terms := read_terms(assets)) is not None:
                features = [terms.find(row) for row in ids]
            if ready is not None or (known or len(chunk)) > 4 * batch_size:
                ready = dequantized_kernels(params) if ready is None else ready
                vocabulary = np.unique(np.concatenate([np.asarray(row, np.int32) for row in ids]))
                vocabulary = np.concatenate([[pad], vocabulary[vocabulary != pad]])  # padding is always token 0
                rows = max(rows, 1 << (len(vocabulary) - 1).bit_length())
                table = lookup(params["embedding"]["token"], np.pad(vocabulary, (0, rows - len(vocabulary))))
                used = {**ready, "embedding": {**ready["embedding"], "token": table}}
                place = np.zeros(config.vocabulary, np.int32)
                place[vocabulary] = np.arange(len(vocabulary))
                ids, pad = [place[row] for row in ids], 0
            lengths_for = known or len(chunk)
            yield _encode_ids(
                used, config, ids, pad, assets.max_length, pooling, batch_size, lengths_for, advance, features
            )
    if truncated:
        log.warning("%d texts were longer than %d tokens and were cut", truncated, assets.max_length)


def _encode_ids(params, config, rows, pad, limit, pooling, batch_size, texts, advance, features=None) -> np.ndarray:
    # Formats decide nothing once weights exist: without them, models of equal structure share compiled programs.
    config = config.replace(formats=(), pad_token=pad)
    order = np.argsort([len(r) for r in rows], kind="stable")[::-1]
    out = np.empty((len(rows), config.width), np.float32)
    pending: list[tuple[np.ndarray, Any]] = []
    count = min(batch_size, 1 << (max(1, len(rows)) - 1).bit_length())  # few shapes for short lists, too
    for start in range(0, len(rows), count):
        chosen = order[start : start + count]
        length = bucket_length(max(len(rows[i]) for i in chosen), limit, texts=texts)
        ids, mask = pad_ids([rows[i] for i in chosen], length, count, pad)
        found = None if features is None else pad_ids([features[i] for i in chosen], length, count, 0)[0]
        pending.append((chosen, _sentence_vectors(params, ids, mask, config, compute_dtype(), pooling, found)))
        if len(pending) > 2:  # let the device run ahead of the host, but not without bound
            advance(_drain(pending.pop(0), out))
    for item in pending:
        advance(_drain(item, out))
    return out


def _drain(item: tuple[np.ndarray, Any], out: np.ndarray) -> int:
    rows, vectors = item
    out[rows] = np.asarray(vectors)[: len(rows)]
    return len(rows)


def _chunks(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def dequantized_kernels(params: Any) -> Any:
    """All but the token table in float32, dequantized once for many batches; composed kernels stay composed."""

    def ready(address: str, node: Any) -> Any:
        return node if address == "embedding/token" else map_parts(node, lambda part, _: dense(part), table=False)

    return tree.update(params, ready)

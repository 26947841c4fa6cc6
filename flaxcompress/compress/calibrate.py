"""Statistics of a model on calibration text, gathered under jit in one pass and kept until the model changes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flaxcompress import tree
from flaxcompress.compress.tiers import token_weights
from flaxcompress.config import ModelConfig
from flaxcompress.data import CalibrationText
from flaxcompress.encoding import compute_dtype, pool, sentence_vectors
from flaxcompress.formats import dense, take
from flaxcompress.model import Model
from flaxcompress.nn import Transformer
from flaxcompress.progress import progress_bar
from flaxcompress.text import Assets, Pooling, first_ordinary_token, pad_ids

Batch = tuple[np.ndarray, np.ndarray]  # ids [B, T] int32, mask [B, T] bool
_LENGTHS = (32, 64, 128, 256, 512)


class Calibration:
    """Calibration text as tokens, and what the methods need to know about it.

    Attributes:
      text: the sentences, a calibration part and a held-out part.
      rows: token ids of the calibration sentences, cut to `max_length` tokens; some of them scrambled.
      token_counts: [V], how often each token occurs in the sentences as they are.

    Args:
      scrambled: the share of sentences whose tokens, but for the first and the last, are exchanged for others drawn
        from the whole vocabulary, by the weights that its table is approximated with. Text of one domain uses few of
        the words that the model will meet, and any input shows how the original answers.
    """

    def __init__(
        self, text: CalibrationText, assets: Assets, *, vocabulary: int, max_length: int = 64, scrambled: float = 0.0
    ):
        self.text = text
        self.vocabulary = vocabulary
        self._settings = {"max_length": max_length, "scrambled": scrambled}
        limit = min(max_length, assets.max_length)
        self.rows = [cut(row, limit) for row in assets.tokenize(text.train).ids]
        flat = np.concatenate([np.asarray(row, np.int64) for row in self.rows])
        self.token_counts = np.bincount(flat, minlength=vocabulary).astype(np.float64)
        if scrambled:
            self.rows = _scrambled(self.rows, scrambled, self.token_counts, first_ordinary_token(assets))
        self._statistics: dict[str, tuple[Any, Any]] = {}

    def with_tokens(self, assets: Assets, vocabulary: int) -> Calibration:
        """The same text, cut by another tokenizer."""
        return Calibration(self.text, assets, vocabulary=vocabulary, **self._settings)

    def sample(self, count: int, *, seed: int = 0) -> list[list[int]]:
        """`count` different sentences, drawn by `seed`; all of them when there are fewer."""
        order = np.random.default_rng(seed).permutation(len(self.rows))[:count]
        return [self.rows[i] for i in order]

    def batches(self, count: int, *, size: int = 16, pad: int = 0, seed: int = 0) -> list[Batch]:
        """`count` sentences in padded batches of similar length."""
        return make_batches(self.sample(count, seed=seed), size=size, pad=pad)

    def input_moments(self, model: Model, *, sentences: int = 768, progress: bool = False) -> dict[str, np.ndarray]:
        """{address of a linear map: C = E[xᵀx], [n, n] float32} over the real tokens.

        The maps of one layer that read the same input share one array. A shared weight set sums over its uses.
        """
        return self._cached(f"moments {sentences}", model, lambda: _input_moments(model, self, sentences, progress))

    def fisher(self, model: Model, *, sentences: int = 256, progress: bool = False) -> dict[str, np.ndarray]:
        """{address of a matrix: expected squared gradient, its shape} of random projections of the sentence vector.

        With r standard normal, E[(∂(r·v)/∂W)²] is the diagonal of JᵀJ: the Gauss-Newton matrix of ‖v - v*‖²/2.
        """
        return self._cached(f"fisher {sentences}", model, lambda: _fisher(model, self, sentences, progress))

    def token_gradient_moment(self, model: Model, *, sentences: int = 256) -> Float[np.ndarray, "D D"]:
        """G = E[gᵀg], g the gradient of a random projection of the sentence vector with respect to a token's vector.

        An error e in a token's vector then costs about e·G·eᵀ: the metric in which a table should be approximated.
        """
        return self._cached(f"token gradients {sentences}", model, lambda: _token_gradients(model, self, sentences))

    def head_moment(self, model: Model, *, sentences: int = 768) -> Float[np.ndarray, "E E"]:
        """C = E[hᵀh] of the vectors that a head tied to the token table multiplies by it, logits = h @ tableᵀ.

        An error e in a token's row then costs e·C·eᵀ in its logit, squared.
        """
        return self._cached(f"head {sentences}", model, lambda: _head_moment(model, self, sentences))

    def _cached(self, name: str, model: Model, compute):
        held = self._statistics.get(name)
        if held is None or held[0] is not model.params:  # another model: its inputs differ, so measure again
            self._statistics[name] = held = (model.params, compute())
        return held[1]


def _scrambled(rows: list[list[int]], share: float, counts: np.ndarray, start: int) -> list[list[int]]:
    """Rows of which a share has all but its first and last token drawn anew, ordinary tokens only."""
    weights = token_weights(counts, start=start)
    weights[:start] = 0.0
    ends, rng = np.cumsum(weights / weights.sum()), np.random.default_rng(0)
    out = []
    for row in rows:
        if rng.random() < share and len(row) > 2:
            drawn = np.searchsorted(ends, rng.random(len(row) - 2), side="right")
            row = [row[0], *np.minimum(drawn, len(counts) - 1).tolist(), row[-1]]
        out.append(row)
    return out


def cut(row: Sequence[int], limit: int) -> list[int]:
    """At most `limit` tokens: the first ones, and the last, which closes a text ([SEP])."""
    return list(row) if len(row) <= limit else [*row[: limit - 1], row[-1]]


def make_batches(rows: Sequence[Sequence[int]], *, size: int, pad: int) -> list[Batch]:
    """Sorts sentences by length and pads each batch to one of a few lengths; the last batch is filled with padding."""
    ordered = sorted(rows, key=len)
    batches = []
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        longest = len(part[-1])
        length = next((n for n in _LENGTHS if n >= longest), longest)
        batches.append(pad_ids(part, length, size, pad))
    return batches


def dense_model(model: Model) -> Model:
    """The same function with every matrix dense float32."""
    params = tree.update(model.params, lambda _, node: dense(node))
    return model.replace(params=params, config=model.config.replace(formats=()))  # pyright: ignore[reportAttributeAccessIssue]


# Linear maps that read the input of another one.
_SAME_INPUT = {
    "attention/key": "attention/query",
    "attention/value": "attention/query",
    "feed_forward/gate": "feed_forward/up",
}


def same_input(config: ModelConfig) -> dict[str, str]:
    """{linear map: the one whose input it reads}."""
    return {m: read for m, read in _SAME_INPUT.items() if not (config.projection_kernel and m.startswith("attention/"))}


def moments_of(inputs: Mapping[str, Any], mask: Any, same: Mapping[str, str] = _SAME_INPUT) -> dict[str, Any]:
    """{part/linear: Σ xᵀx over the tokens that `mask` allows}; maps that read one input share one entry."""
    out = {}
    for part, linears in inputs.items():
        for name, kept in linears.items():
            if f"{part}/{name}" in same:
                continue
            x = kept["x"].astype(jnp.float32)
            x = (x * mask[..., None]).reshape(-1, x.shape[-1])
            out[f"{part}/{name}"] = jax.lax.dot(x.T, x, precision=jax.lax.Precision.HIGHEST)
    return out


@functools.partial(jax.jit, static_argnums=(3, 4))
def _batch_moments(params, ids, mask, config: ModelConfig, dtype):
    record = functools.partial(moments_of, same=same_input(config))
    out = Transformer(config, dtype).apply({"params": params}, ids, mask, need_logits=False, record=record)
    return out.recorded  # pyright: ignore[reportAttributeAccessIssue]


def _input_moments(model: Model, calibration: Calibration, sentences: int, progress: bool) -> dict[str, np.ndarray]:
    config = model.config
    batches = calibration.batches(sentences, pad=config.pad_token)
    total, tokens = None, 0
    with progress_bar("statistics", len(batches), show=progress) as advance:
        for ids, mask in batches:
            found = _batch_moments(model.params, ids, mask, config, compute_dtype())
            total = found if total is None else jax.tree.map(jnp.add, total, found)
            tokens += int(mask.sum())
            advance()
    assert total is not None
    moments: dict[str, Any] = {}
    for first, parts in total:
        for name, stacked in parts.items():
            for i in range(stacked.shape[0]):
                part, linear = name.split("/")
                number = getattr(config.sharing, part)[first + i]
                address = f"layers/{number}/{part}/{linear}"
                value = np.asarray(stacked[i]) / tokens
                moments[address] = moments[address] + value if address in moments else value
    for address in tree.select(tree.View(model.params), r"layers/.*/kernel"):
        *layer, part, linear, _ = address.split("/")
        if read := same_input(config).get(f"{part}/{linear}"):
            moments["/".join([*layer, part, linear])] = moments["/".join([*layer, read])]
    return moments


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _batch_fisher(params, ids, mask, key, config: ModelConfig, dtype, pooling: Pooling):
    def projection(params):
        vectors = sentence_vectors(params, ids, mask, config, dtype, pooling)
        return (vectors * jax.random.normal(key, vectors.shape)).sum()

    return jax.tree.map(jnp.square, jax.grad(projection)(params))


def _fisher(model: Model, calibration: Calibration, sentences: int, progress: bool) -> dict[str, np.ndarray]:
    dense = dense_model(model)
    batches = calibration.batches(sentences, size=8, pad=model.config.pad_token)
    total = None
    with progress_bar("gradients", len(batches), show=progress) as advance:
        for number, (ids, mask) in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(0), number)
            pooling = model.assets.pooling or Pooling()
            found = _batch_fisher(dense.params, ids, mask, key, dense.config, compute_dtype(), pooling)
            total = found if total is None else jax.tree.map(jnp.add, total, found)
            advance()
    assert total is not None
    return {a: np.asarray(n) / len(batches) for a, n in tree.flatten(total).items()}


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _batch_token_gradients(params, ids, mask, key, config: ModelConfig, dtype, pooling: Pooling):
    vectors = take(params["embedding"]["token"], ids)

    def projection(vectors):
        out = Transformer(config, dtype).apply({"params": params}, ids, mask, need_logits=False, vectors=vectors)
        pooled = pool(out.last_hidden_state, mask, pooling)  # pyright: ignore[reportAttributeAccessIssue]
        return (pooled * jax.random.normal(key, pooled.shape)).sum()

    g = jax.grad(projection)(vectors)
    g = (g * mask[..., None]).reshape(-1, g.shape[-1])
    return jax.lax.dot(g.T, g, precision=jax.lax.Precision.HIGHEST)


def _token_gradients(model: Model, calibration: Calibration, sentences: int) -> np.ndarray:
    pooling = model.assets.pooling or Pooling()
    total, tokens = 0.0, 0
    for number, (ids, mask) in enumerate(calibration.batches(sentences, size=8, pad=model.config.pad_token)):
        key = jax.random.fold_in(jax.random.key(0), number)
        found = _batch_token_gradients(model.params, ids, mask, key, model.config, compute_dtype(), pooling)
        total, tokens = total + np.asarray(found, np.float64), tokens + int(mask.sum())
    return np.asarray(total / tokens)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _batch_head(params, ids, mask, config: ModelConfig, dtype):
    """Logits of the same model with the identity for a table: what its head multiplies by the table."""
    vectors = take(params["embedding"]["token"], ids)
    width = config.table_width
    head = {n: jnp.zeros(width) if n == "bias" else part for n, part in params.get("head", {}).items()}
    embedding = {**params["embedding"], "token": jnp.eye(width)}
    params = {**params, "embedding": embedding, **({"head": head} if head else {})}
    out = Transformer(config.replace(vocabulary=width), dtype).apply({"params": params}, ids, mask, vectors=vectors)
    logits = out.logits  # pyright: ignore[reportAttributeAccessIssue]
    h = logits.masked_lm if config.head == "pretraining" else logits
    h = (h * mask[..., None]).reshape(-1, width)
    return jax.lax.dot(h.T, h, precision=jax.lax.Precision.HIGHEST)


def _head_moment(model: Model, calibration: Calibration, sentences: int) -> np.ndarray:
    total, tokens = 0.0, 0
    for ids, mask in calibration.batches(sentences, pad=model.config.pad_token):
        found = _batch_head(model.params, ids, mask, model.config, compute_dtype())
        total, tokens = total + np.asarray(found, np.float64), tokens + int(mask.sum())
    return np.asarray(total / tokens)

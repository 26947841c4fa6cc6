"""Beam search: the n likeliest continuations side by side, all of it on the device."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from flaxcompress.config import ModelConfig
from flaxcompress.encoding import compute_dtype
from flaxcompress.nn import Cache, init_cache, run

_NEVER = -1e9


class _Beams(NamedTuple):
    """n running and n finished continuations of each of B prompts.

    Attributes:
      step: how many tokens there are.
      tokens, scores: [B, n, N] and [B, n], the sum of log-probabilities, of those that run.
      best_tokens, best_scores, best_lengths: of those that ended; scores divided by length ** penalty.
      ended: [B, n] whether a place among the finished is taken.
      open: [B] whether a running one may still beat the worst finished one.
      logits: [B·n, V] for the next tokens.
    """

    step: Integer[Array, ""]
    tokens: Integer[Array, "B n N"]
    scores: Float[Array, "B n"]
    best_tokens: Integer[Array, "B n N"]
    best_scores: Float[Array, "B n"]
    best_lengths: Integer[Array, "B n"]
    ended: Bool[Array, "B n"]
    open: Bool[Array, " B"]
    logits: Float[Array, "b V"]
    cache: Cache


def beam_search(
    params: Any,
    config: ModelConfig,
    ids: np.ndarray,
    real: np.ndarray,
    length: int,
    new: int,
    beams: int,
    penalty: float,
    end_tokens: tuple[int, ...],
) -> list[list[int]]:
    """The best continuation of each prompt [B, T]: highest log-probability over (number of tokens) ** penalty.

    Ends like transformers' with early_stopping=False: when no running beam, at its present length, could still beat the
    worst of n finished ones; those still running at the limit count as finished.
    """
    if beams * 2 > config.vocabulary:
        raise ValueError(
            f"generate: {beams} beams need a vocabulary of {2 * beams}, the model's has {config.vocabulary}"
        )
    out = _search(params, ids, real, config, compute_dtype(), length, new, beams, penalty, end_tokens)
    tokens, lengths = (np.asarray(x) for x in out)
    return [row[:count].tolist() for row, count in zip(tokens, lengths, strict=True)]


def _rows(x: Array) -> Array:
    """[B, n, …] -> [B·n, …]."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _chosen(x: Array, index: Integer[Array, "B k"]) -> Array:
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7, 8, 9))
def _search(params, ids, real, config, dtype, length, new, beams, penalty, end_tokens):
    batch = ids.shape[0]
    repeat = lambda x: jnp.repeat(jnp.asarray(x), beams, axis=0)  # noqa: E731
    cache = init_cache(config, batch * beams, length, dtype)
    out = run(params, config, dtype, repeat(ids), repeat(real), cache=cache, last_logits=True)
    end = jnp.asarray(end_tokens or (-1,), jnp.int32)
    start = _Beams(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((batch, beams, new), config.pad_token, jnp.int32),
        scores=jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, _NEVER), (batch, 1)),  # all beams are equal at first
        best_tokens=jnp.full((batch, beams, new), config.pad_token, jnp.int32),
        best_scores=jnp.full((batch, beams), _NEVER),
        best_lengths=jnp.zeros((batch, beams), jnp.int32),
        ended=jnp.zeros((batch, beams), bool),
        open=jnp.ones(batch, bool),
        logits=out.logits[:, -1],
        cache=out.cache,
    )

    def going(state: _Beams):
        return (state.step < new) & state.open.any()

    def step(state: _Beams) -> _Beams:
        scores = (
            jax.nn.log_softmax(state.logits.astype(jnp.float32)).reshape(batch, beams, -1) + state.scores[..., None]
        )
        found, place = jax.lax.top_k(scores.reshape(batch, -1), 2 * beams)  # at least n of them do not end
        beam, token = place // config.vocabulary, (place % config.vocabulary).astype(jnp.int32)
        tokens = _chosen(state.tokens, beam).at[:, :, state.step].set(token)
        ends = (token[..., None] == end).any(-1)
        # Those that end, or are cut at the limit, compete with the finished ones if they are among the first n.
        taken = (ends | (state.step + 1 == new)) & (jnp.arange(2 * beams) < beams) & state.open[:, None]
        length = (state.step + 1).astype(jnp.float32) ** penalty
        ranked = jnp.where(taken, found / length, _NEVER)
        best_scores, index = jax.lax.top_k(jnp.concatenate([state.best_scores, ranked], 1), beams)
        best_tokens = _chosen(jnp.concatenate([state.best_tokens, tokens], 1), index)
        lengths = jnp.broadcast_to(state.step + 1, ranked.shape)
        best_lengths = _chosen(jnp.concatenate([state.best_lengths, lengths], 1), index)
        ended = _chosen(jnp.concatenate([state.ended, taken], 1), index)
        # The n best that do not end run on.
        running, index = jax.lax.top_k(jnp.where(ends, _NEVER, found), beams)
        parent = _chosen(beam, index) + jnp.arange(batch)[:, None] * beams
        moved = jax.tree.map(lambda x: x[:, _rows(parent)], state.cache.layers)
        cache = state.cache._replace(
            layers=moved, real=state.cache.real[_rows(parent)], counts=state.cache.counts[_rows(parent)]
        )
        kept = _chosen(tokens, index)
        worst = jnp.where(ended.all(-1), best_scores.min(-1), _NEVER)
        still = state.open & (running[:, 0] / length > worst)
        out = run(params, config, dtype, _rows(_chosen(token, index))[:, None], cache=cache)
        return _Beams(
            step=state.step + 1,
            tokens=kept,
            scores=running,
            best_tokens=best_tokens,
            best_scores=best_scores,
            best_lengths=best_lengths,
            ended=ended,
            open=still,
            logits=out.logits[:, -1],
            cache=out.cache,
        )

    last = jax.lax.while_loop(going, step, start)
    return last.best_tokens[:, 0], last.best_lengths[:, 0]  # the best is the first

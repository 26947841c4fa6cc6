"""Beam search: the n likeliest continuations side by side, all of it on the device."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from flaxcompress import tree
from flaxcompress.config import ModelConfig
from flaxcompress.decoding.step import LAID_OUT, Source, first_logits, next_logits
from flaxcompress.encoding import compute_dtype
from flaxcompress.nn import Cache, lay_out

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


class BeamRules(NamedTuple):
    """n beams, N new tokens at most, and the ids that end a text or never come."""

    beams: int
    new: int
    penalty: float
    end_tokens: tuple[int, ...]
    never_tokens: tuple[int, ...] = ()


def beam_search(
    params: Any,
    config: ModelConfig,
    source: Source | None,
    ids: np.ndarray,
    real: np.ndarray,
    length: int,
    rules: BeamRules,
) -> list[list[int]]:
    """The best continuation of each prompt [B, T]: highest log-probability over (number of tokens) ** penalty.

    `source` is what the encoder gets, where there is one; `length` the cache's.

    Ends like transformers' with early_stopping=False: when no running beam, at its present length, could still beat the
    worst of n finished ones; those still running at the limit count as finished.
    """
    if rules.beams * 2 > config.vocabulary:
        raise ValueError(
            f"generate: {rules.beams} beams need a vocabulary of {2 * rules.beams}, the model's has {config.vocabulary}"
        )
    out = _search(params, source, ids, real, config, compute_dtype(), length, rules)
    tokens, lengths = (np.asarray(x) for x in out)
    return [row[:count].tolist() for row, count in zip(tokens, lengths, strict=True)]


def _rows(x: Array) -> Array:
    """[B, n, …] -> [B·n, …]."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _chosen(x: Array, index: Integer[Array, "B k"]) -> Array:
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _search(params, source, ids, real, config, dtype, length, rules: BeamRules):
    batch, beams, new, penalty, end_tokens = ids.shape[0], *rules[:4]
    never = jnp.asarray(rules.never_tokens, jnp.int32)
    out = first_logits(params, source, ids, real, config, dtype, length)
    end = jnp.asarray(end_tokens or (-1,), jnp.int32)
    cache, axis = out.cache, 1
    if (config.decoder or config).layers <= LAID_OUT:
        params, cache, axis = tree.lay_out(params), lay_out(cache), 0
    repeat = functools.partial(jnp.repeat, repeats=beams, axis=0)
    start = _Beams(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((batch, beams, new), config.pad_token, jnp.int32),
        scores=jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, _NEVER), (batch, 1)),  # all beams are equal at first
        best_tokens=jnp.full((batch, beams, new), config.pad_token, jnp.int32),
        best_scores=jnp.full((batch, beams), _NEVER),
        best_lengths=jnp.zeros((batch, beams), jnp.int32),
        ended=jnp.zeros((batch, beams), bool),
        open=jnp.ones(batch, bool),
        logits=repeat(out.logits[:, -1]),
        cache=cache._replace(
            layers=jax.tree.map(lambda x: jnp.repeat(x, beams, axis=axis), cache.layers),
            real=repeat(cache.real),
            counts=repeat(cache.counts),
            memory_mask=None if cache.memory_mask is None else repeat(cache.memory_mask),
        ),
    )

    def going(state: _Beams):
        return (state.step < new) & state.open.any()

    def step(state: _Beams) -> _Beams:
        scores = jax.nn.log_softmax(state.logits.astype(jnp.float32)).at[:, never].set(_NEVER)
        scores = scores.reshape(batch, beams, -1) + state.scores[..., None]
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
        moved = {  # beams of one prompt share its source
            name: x
            if name.startswith("cross_")
            else jax.tree.map(lambda array: jnp.take(array, _rows(parent), axis=axis), x)
            for name, x in state.cache.layers.items()
        }
        cache = state.cache._replace(
            layers=moved, real=state.cache.real[_rows(parent)], counts=state.cache.counts[_rows(parent)]
        )
        kept = _chosen(tokens, index)
        worst = jnp.where(ended.all(-1), best_scores.min(-1), _NEVER)
        still = state.open & (running[:, 0] / length > worst)
        out = next_logits(params, _rows(_chosen(token, index))[:, None], cache, config, dtype)
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

"""Decoding: one compiled program for the prompts, one for the tokens after them.

Prompts are padded on the left to one of a few lengths, the cache has one of a few sizes, so that few programs are
compiled. Tokens are made `BLOCK` at a time on the device; between blocks the host looks for stop strings.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from flaxcompress import tree
from flaxcompress.config import GENERATING, ModelConfig
from flaxcompress.decoding.beams import BeamRules, beam_search
from flaxcompress.decoding.constraints import Constraint
from flaxcompress.decoding.sampling import NEVER, Sampling, choose
from flaxcompress.decoding.step import LAID_OUT, first_logits, next_logits
from flaxcompress.encoding import compute_dtype
from flaxcompress.nn import Cache, lay_out, stack_up
from flaxcompress.text import Assets, pad_ids

BLOCK = 32
Prompt = str | Sequence[int]
OnToken = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Generated:
    """What was generated for one prompt.

    Attributes:
      ids: the new tokens, an end token included.
      text: what they say, cut before a stop string; "" where the model has no tokenizer.
      finished: whether an end token or a stop string came, rather than the limit.
    """

    ids: list[int]
    text: str
    finished: bool


class State(NamedTuple):
    """Between two tokens: what has been run, the logits after it, and what the rules of choice look at.

    Attributes:
      seen: which tokens have come, where there is a penalty for repetition.
      recent: the last tokens, as far back as a constraint looks.
      done: which rows have ended.
    """

    cache: Cache
    logits: Float[Array, "B V"]
    seen: Bool[Array, "B V"] | None
    recent: Integer[Array, "B R"] | None
    done: Bool[Array, " B"]
    key: PRNGKeyArray


def generate(
    params: Any,
    config: ModelConfig,
    assets: Assets,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    rules: Sampling,
    key: PRNGKeyArray | None,
    beams: int = 1,
    length_penalty: float = 1.0,
    stop: Sequence[str] = (),
    on_token: OnToken | None = None,
    constraint: Constraint | None = None,
) -> list[Generated]:
    """Continues every prompt (see `Model.generate`)."""
    rows = prompt_ids(config, assets, prompts, max_new_tokens)
    source = None
    if config.decoder is not None:
        source = right_padded(rows, config)
        rows = [[config.pad_token if assets.start_token is None else assets.start_token] for _ in rows]
    check(config, assets, max_new_tokens, rules, key, beams, stop, on_token, constraint)
    if max_new_tokens == 0 or not rows:
        return [Generated([], "", False) for _ in rows]
    ids, real = left_padded(rows, config)
    length = -(-(ids.shape[1] + max_new_tokens) // 64) * 64  # one of a few sizes
    if beams > 1:
        rule = BeamRules(beams, max_new_tokens, length_penalty, assets.end_tokens, assets.never_tokens)
        found = beam_search(params, config, source, ids, real, length, rule)
        return [_answer(assets, *pair, (), pair[1][-1] in assets.end_tokens) for pair in zip(rows, found, strict=True)]
    choice = Rules(rules, assets.end_tokens, assets.never_tokens, constraint)
    start = jax.random.key(0) if key is None else key
    state = _prefill(params, source, ids, real, start, config, compute_dtype(), length, choice)
    return go_on(params, config, assets, rows, state, choice, new=max_new_tokens, stop=stop, on_token=on_token)[0]


def go_on(
    params: Any,
    config: ModelConfig,
    assets: Assets,
    rows: Sequence[list[int]],
    state: State,
    choice: Rules,
    *,
    new: int,
    stop: Sequence[str] = (),
    on_token: OnToken | None = None,
) -> tuple[list[Generated], Cache]:
    """Up to `new` tokens after the prompts `rows`, which have been run; the answers and the cache with all that ran."""
    dtype, out = compute_dtype(), [[] for _ in rows]
    ended = [False] * len(rows)
    while not all(ended) and (left := new - max(map(len, out))) > 0:
        count = 1 if on_token is not None else min(BLOCK, left)
        tokens, state = _decode(params, state, config, dtype, count, choice)
        for row, found in enumerate(np.asarray(tokens)):
            ended[row] = ended[row] or _take(assets, rows[row], out[row], found, stop, row, on_token)
    answers = [_answer(assets, *each[:2], stop, each[2]) for each in zip(rows, out, ended, strict=True)]
    return answers, state.cache


class Rules(NamedTuple):
    """All that decides which token comes next, besides the logits."""

    sampling: Sampling
    end_tokens: tuple[int, ...]
    never_tokens: tuple[int, ...]
    constraint: Constraint | None


def continuation(assets: Assets, prompt: Sequence[int], new: Sequence[int]) -> str:
    """What new tokens add to the text of a prompt (a token's text alone may lack its blank); "" without tokenizer."""
    if not assets.has_tokenizer:
        return ""
    before, both = assets.detokenize([prompt, [*prompt, *new]])
    return both[len(before) :] if both.startswith(before) else assets.detokenize([new])[0]


def _take(
    assets: Assets,
    prompt: list[int],
    out: list[int],
    new: np.ndarray,
    stop: Sequence[str],
    row: int,
    on_token: OnToken | None,
) -> bool:
    """Adds a row's new tokens up to its end; whether it has ended, by an end token or a stop string."""
    for token in new.tolist():
        out.append(token)
        if on_token is not None:
            on_token(row, token, continuation(assets, [*prompt, *out[:-1]], [token]))
        if token in assets.end_tokens:
            return True
    return bool(stop) and any(s in continuation(assets, prompt, out) for s in stop)


def _answer(assets: Assets, prompt: list[int], ids: list[int], stop: Sequence[str], end: bool) -> Generated:
    """The text of new tokens, cut before the first stop string; its tokens likewise."""
    text = continuation(assets, prompt, ids)
    places = [place for s in stop if (place := text.find(s)) >= 0]
    if places:
        text = text[: min(places)]
        counts = range(len(ids) + 1)
        keep = next((n for n in counts if continuation(assets, prompt, ids[:n]).startswith(text)), len(ids))
        ids = ids[:keep]
    return Generated(ids, text, end)


def prompt_ids(config: ModelConfig, assets: Assets, prompts: Sequence[Prompt], new: int) -> list[list[int]]:
    """Token ids of prompts, which are texts or ids. Raises ValueError for empty ones and for too long ones."""
    if isinstance(prompts, str):
        raise TypeError("generate: prompts must be a list of texts or of token ids; put the text in a list")
    rows = []
    for number, prompt in enumerate(prompts):
        row = assets.tokenize([prompt]).ids[0] if isinstance(prompt, str) else [int(i) for i in prompt]
        if isinstance(prompt, str) and len(row) > 1 and row[-1] in assets.end_tokens and config.decoder is None:
            row = row[:-1]  # tokenizers of encoders close a text; here it goes on
        if not row:
            raise ValueError(f"generate: prompt {number} has no tokens")
        if not 0 <= min(row) <= max(row) < config.vocabulary:
            raise ValueError(f"generate: prompt {number} holds ids outside the vocabulary 0 … {config.vocabulary - 1}")
        if config.decoder is not None:
            _check_lengths(config, number, len(row), new)
        elif len(row) + new > config.positions:
            raise ValueError(
                f"generate: prompt {number} has {len(row)} tokens, with {new} new ones more than the model's "
                f"{config.positions} positions"
            )
        rows.append(row)
    return rows


def _check_lengths(config: ModelConfig, number: int, source: int, new: int) -> None:
    assert config.decoder is not None
    if source > config.positions or new + 1 > config.decoder.positions:
        raise ValueError(
            f"generate: prompt {number} has {source} tokens and {new} are to come; the encoder has {config.positions} "
            f"positions, the decoder {config.decoder.positions}, one of them for the token it begins with"
        )


def check(config, assets, new, rules, key, beams, stop, on_token, constraint) -> None:
    """Raises ValueError for settings that do not go together, or not with the model."""
    if config.head not in GENERATING:
        raise ValueError(f"generate: a {config.family} model with head {config.head!r} does not predict the next token")
    if new < 0 or beams < 1:
        raise ValueError(f"generate: max_new_tokens must be 0 or more and beams 1 or more, got {new} and {beams}")
    if rules.temperature and key is None:
        raise ValueError("generate: sampling needs key=jax.random.key(…)")
    if constraint is not None:
        constraint.check(config.vocabulary)
    if stop and not assets.has_tokenizer:
        raise ValueError("generate: stop strings need a tokenizer, and the model has none")
    if any(not s for s in stop):
        raise ValueError("generate: a stop string is empty")
    if beams > 1 and (rules.temperature or stop or on_token or constraint or rules.repetition_penalty != 1.0):
        raise ValueError(
            "generate: beam search goes with none of temperature, penalty, stop, streaming and constraints"
        )


def left_padded(rows: Sequence[Sequence[int]], config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """ids [B, T] int32 and mask [B, T] bool, padded on the left to one of a few lengths."""
    longest = max(map(len, rows))
    length = 1 if longest == 1 else min(max(8, 1 << (longest - 1).bit_length()), config.positions)
    ids, real = np.full((len(rows), length), config.pad_token, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        real[i, length - len(row) :] = True
    return ids, real


def right_padded(rows: Sequence[Sequence[int]], config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """ids [B, S] int32 and mask [B, S] bool for an encoder, padded to one of a few lengths."""
    longest = max(map(len, rows))
    return pad_ids(rows, min(-(-longest // 16) * 16, config.positions), len(rows), config.pad_token)


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _prefill(params, source, ids, real, key, config, dtype, length, rules: Rules) -> State:
    out = first_logits(params, source, ids, real, config, dtype, length)
    return ready(out.cache, out.logits[:, -1], ids, real, key, config, rules)


def ready(cache: Cache, logits: Any, ids: Any, real: Any, key: Any, config: ModelConfig, rules: Rules) -> State:
    """The state after the prompts ids, real [B, T], which the cache holds; to be traced."""
    seen = None
    if rules.sampling.repetition_penalty != 1.0:
        rows = jnp.arange(ids.shape[0])[:, None]
        seen = jnp.zeros((ids.shape[0], config.vocabulary), bool).at[rows, ids].max(real)
    recent = None
    if rules.constraint is not None:
        reach = rules.constraint.reach
        recent = jnp.pad(jnp.where(real, ids, -1), ((0, 0), (reach, 0)), constant_values=-1)[:, ids.shape[1] :]
    done = jnp.zeros(ids.shape[0], bool)
    return State(cache, logits, seen, recent, done, key)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5), donate_argnums=1)
def _decode(params, state: State, config, dtype, count, rules: Rules) -> tuple[Integer[Array, "B N"], State]:
    end = jnp.asarray(rules.end_tokens or (-1,), jnp.int32)

    def step(state: State, _):
        key, now = jax.random.split(state.key)
        logits, recent = state.logits, state.recent
        if recent is not None:
            assert rules.constraint is not None
            logits = jnp.where(rules.constraint.allowed(recent, config.vocabulary), logits, NEVER)
        if rules.never_tokens:
            logits = logits.at[:, jnp.asarray(rules.never_tokens)].set(NEVER)
        token = jnp.where(state.done, config.pad_token, choose(logits, state.seen, rules.sampling, now))
        done = state.done | (token[:, None] == end).any(-1)
        seen = state.seen
        if seen is not None:
            seen = seen.at[jnp.arange(len(token)), token].set(True)
        out = next_logits(params, token[:, None], state.cache, config, dtype)
        if recent is not None:
            recent = jnp.concatenate([recent, token[:, None]], 1)[:, 1:]
        return State(out.cache, out.logits[:, -1], seen, recent, done, key), token

    apart = (config.decoder or config).layers <= LAID_OUT
    if apart:
        params, state = tree.lay_out(params), state._replace(cache=lay_out(state.cache))
    state, tokens = jax.lax.scan(step, state, None, length=count)
    return tokens.T, state._replace(cache=stack_up(state.cache)) if apart else state

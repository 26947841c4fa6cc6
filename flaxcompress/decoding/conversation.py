"""A conversation: every turn runs only the tokens that the cache does not hold yet."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress.config import ModelConfig
from flaxcompress.decoding.chat import render_chat
from flaxcompress.decoding.constraints import Constraint
from flaxcompress.decoding.generate import Generated, OnToken, Rules, State, check, go_on, prompt_ids, ready
from flaxcompress.decoding.sampling import Sampling
from flaxcompress.decoding.step import next_logits
from flaxcompress.encoding import compute_dtype
from flaxcompress.nn import Cache, cache_slots, cut, grow, held_inputs, init_cache
from flaxcompress.text import Assets


class Conversation:
    """Messages in turn, and the key/value cache of what has been run of them.

    Attributes:
      messages: {"role": …, "content": …} objects. They may be changed: what still begins as before is not run again.
      ids: the tokens that the cache holds.
    """

    def __init__(self, params: Any, config: ModelConfig, assets: Assets, messages: Sequence[Mapping[str, Any]] = ()):
        if config.head != "causal_lm":
            raise ValueError(f"chat: a {config.family} model with head {config.head!r} does not predict the next token")
        self._params, self._config, self._assets = params, config, assets
        self.messages = [dict(message) for message in messages]
        self.ids: list[int] = []
        self._cache: Cache | None = None

    def say(
        self,
        text: str,
        *,
        max_new_tokens: int = 256,
        key: jax.Array | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        on_token: OnToken | None = None,
        constraint: Constraint | None = None,
    ) -> str:
        """Adds the user's message and the model's answer to `messages`, and returns the answer.

        Arguments and errors are those of `Model.generate`; where one is raised, the conversation is as it was.
        """
        if temperature is None:
            temperature = 0.0 if key is None else 1.0
        rules = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = render_chat(self._assets, messages)
        check(self._config, self._assets, max_new_tokens, rules, key, 1, stop, on_token, constraint)
        choice = Rules(rules, self._assets.end_tokens, self._assets.never_tokens, constraint)
        more: dict[str, Any] = {"stop": stop, "on_token": on_token}
        answer = self._answer(ids, choice, jax.random.key(0) if key is None else key, max_new_tokens, more)
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer.text

    def _answer(self, ids: list[int], choice: Rules, key: jax.Array, new: int, more: dict[str, Any]) -> Generated:
        prompt_ids(self._config, self._assets, [ids], new)
        cache, known = self._held(ids, len(ids) + new)
        logits = None
        for piece in pieces(len(ids) - known):
            now = np.asarray([ids[known : known + piece]], np.int32)
            cache, logits = _run(self._params, now, cache, self._config, compute_dtype())
            known += piece
        assert logits is not None
        state = _ready(cache, logits, np.asarray([ids], np.int32), key, self._config, choice)
        answers, cache = go_on(self._params, self._config, self._assets, [ids], state, choice, new=new, **more)
        self.ids, self._cache = [*ids, *answers[0].ids], cache
        return answers[0]

    def _held(self, ids: list[int], length: int) -> tuple[Cache, int]:
        """A cache with room for `length` tokens, and how many of these ids it holds (never all of them)."""
        slots = -(-length // 64) * 64
        same = [a == b for a, b in zip(ids[:-1], self.ids, strict=False)]
        known = same.index(False) if False in same else len(same)
        cache = self._cache
        # A ring that has gone round has lost what came first, a convolution the inputs before the last ones.
        lost = cache is not None and int(cache.length) > cache.real.shape[1]
        if cache is None or known == 0 or lost or held_inputs(self._config):
            return init_cache(self._config, 1, slots, compute_dtype()), 0
        wanted = cache_slots(self._config, slots)
        return cut(grow(cache, wanted) if wanted > cache.real.shape[1] else cache, known), known


def pieces(count: int) -> list[int]:
    """Powers of two that add up to `count`, so that few lengths are compiled."""
    return [1 << i for i in reversed(range(count.bit_length())) if count >> i & 1]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _run(params: Any, ids: Any, cache: Cache, config: ModelConfig, dtype: Any) -> tuple[Cache, Any]:
    out = next_logits(params, ids, cache, config, dtype)
    return out.cache, out.logits[:, -1]


@functools.partial(jax.jit, static_argnums=(4, 5))
def _ready(cache: Cache, logits: Any, ids: Any, key: Any, config: ModelConfig, choice: Rules) -> State:
    return ready(cache, logits, ids, jnp.ones(ids.shape, bool), key, config, choice)

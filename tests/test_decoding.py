"""Rules of decoding on plain arrays, the cache, and what generate promises, on a tiny random decoder."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxcompress as fc
from flaxcompress.config import ModelConfig, Rotary
from flaxcompress.decoding.constraints import Constraint
from flaxcompress.decoding.generate import _decode, _prefill
from flaxcompress.decoding.sampling import NEVER, Sampling, choose, filter_top_k, filter_top_p, penalize

V = 40


@functools.cache
def decoder(**more) -> fc.Model:
    fields = {
        "family": "llama",
        "vocabulary": V,
        "width": 24,
        "layers": 3,
        "heads": 4,
        "key_value_heads": 2,
        "head_width": 6,
        "feed_forward_width": 32,
        "positions": 64,
        "segments": 0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "pooler": False,
        "position_embedding": "none",
        "embedding_norm": False,
        "rotary": Rotary(),
        "causal": True,
        "gated": True,
        "norm": "rms",
        "norm_place": "pre",
        "final_norm": True,
        "head": "causal_lm",
        "initializer_range": 0.3,
        **more,
    }
    return fc.Model.init(ModelConfig(**fields), key=jax.random.key(0))


def ids(batch, length, seed=0):
    return np.random.default_rng(seed).integers(1, V, (batch, length))


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 1, 3, 1), (6, 3)])
def test_tokens_in_pieces_give_the_logits_of_the_whole(pieces, window):
    model, tokens = decoder(window=window), ids(2, 9)
    whole = model(tokens).logits
    cache, got = model.new_cache(2, 16), []
    assert cache.real.shape[1] == (5 if window else 16)  # a ring where every layer has a window
    for piece in np.split(tokens, np.cumsum(pieces)[:-1], axis=1):
        out = model(piece, cache=cache)
        cache = out.cache
        got.append(out.logits)
    np.testing.assert_allclose(np.concatenate(got, 1), whole, atol=2e-5 * float(jnp.abs(whole).max()))


def test_padding_in_front_changes_nothing():
    model, tokens = decoder(), ids(1, 5)
    want = model(tokens, cache=model.new_cache(1, 8)).logits
    padded = np.concatenate([np.zeros((1, 3), int), tokens], 1)
    got = model(padded, padded != 0, cache=model.new_cache(1, 8)).logits
    np.testing.assert_allclose(got[:, 3:], want, atol=2e-5 * float(jnp.abs(want).max()))


def test_mixed_windows_keep_the_whole_cache():
    model = decoder(window=4, local=(True, False, True))
    tokens = ids(1, 12)
    whole, cache = model(tokens).logits, model.new_cache(1, 12)
    assert cache.real.shape[1] == 12
    for i in range(12):
        out = model(tokens[:, i : i + 1], cache=cache)
        cache = out.cache
        np.testing.assert_allclose(out.logits[:, 0], whole[:, i], atol=2e-5 * float(jnp.abs(whole).max()))


def test_a_cache_that_is_full_or_of_another_batch_is_refused():
    model = decoder()
    cache = model(ids(2, 6), cache=model.new_cache(2, 8)).cache
    with pytest.raises(ValueError, match="6 tokens and 3 more are over its 8"):
        model(ids(2, 3), cache=cache)
    with pytest.raises(ValueError, match="made for 2 sequences"):
        model(ids(1, 1), cache=cache)
    with pytest.raises(ValueError, match="64 positions"):
        model.new_cache(1, 65)
    with pytest.raises(ValueError, match="only causal ones"):
        fc.Model.init(
            ModelConfig(vocabulary=9, width=4, layers=1, heads=1, feed_forward_width=4), key=jax.random.key(0)
        ).new_cache(1, 4)


def test_decoding_compiles_once_whatever_is_generated():
    model = decoder()
    chex.clear_trace_counter()
    prefill = jax.jit(chex.assert_max_traces(_prefill.__wrapped__, n=1), static_argnums=(5, 6, 7, 8))
    decode = jax.jit(chex.assert_max_traces(_decode.__wrapped__, n=1), static_argnums=(2, 3, 4, 5))
    import importlib

    module = importlib.import_module("flaxcompress.decoding.generate")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_prefill", prefill)
        patch.setattr(module, "_decode", decode)
        for seed, length in enumerate((5, 7, 8, 6)):
            model.generate([ids(1, length, seed)[0].tolist()], max_new_tokens=32, return_ids=True)


# ── choice ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_top_k_leaves_the_largest():
    logits = jnp.asarray([[0.1, 3.0, 2.0, -1.0], [5.0, 5.0, 1.0, 0.0]])
    assert (filter_top_k(logits, 2) > NEVER).tolist() == [[False, True, True, False], [True, True, False, False]]
    np.testing.assert_array_equal(filter_top_k(logits, 9), logits)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 1.0])
def test_top_p_leaves_the_fewest_with_that_probability(p):
    logits = np.random.default_rng(1).normal(size=(6, 11)) * 2
    got = np.asarray(filter_top_p(jnp.asarray(logits), p)) > NEVER
    for row, kept in zip(logits, got, strict=True):
        chances = np.exp(row - row.max())
        chances /= chances.sum()
        order = np.argsort(-chances)
        count = next(n for n in range(1, 12) if n == 11 or chances[order[:n]].sum() >= p - 1e-6)
        assert set(np.flatnonzero(kept)) == set(order[:count])


def test_the_penalty_lowers_logits_of_either_sign():
    logits, seen = jnp.asarray([[2.0, -2.0, 1.0]]), jnp.asarray([[True, True, False]])
    np.testing.assert_allclose(penalize(logits, seen, 2.0), [[1.0, -4.0, 1.0]])


def test_draws_follow_the_probabilities():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.2]]))
    keys = jax.random.split(jax.random.key(3), 4000)
    rules = Sampling(temperature=1.0)
    counts = np.bincount(np.asarray(jax.vmap(lambda k: choose(logits, None, rules, k)[0])(keys)), minlength=3)
    assert np.abs(counts / 4000 - [0.5, 0.3, 0.2]).max() < 4 * np.sqrt(0.25 / 4000)
    cold = Sampling(temperature=0.01)
    assert set(np.asarray(jax.vmap(lambda k: choose(logits, None, cold, k)[0])(keys))) == {0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must lie in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
        ({"top_k": 3}, "need a temperature above 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


# ── generate ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def greedy(model, prompt, count):
    """One token after another, without a cache; padded behind to one length, for which one program is compiled."""
    tokens, length = np.zeros((1, 32), int), len(prompt)
    tokens[0, :length] = prompt
    for at in range(length, length + count):
        logits = model(tokens, np.arange(32)[None] < at).logits
        tokens[0, at] = int(jnp.argmax(logits[0, at - 1]))
    return tokens[0, length : length + count].tolist()


@pytest.mark.parametrize("window", [0, 3])
def test_greedy_tokens_equal_those_without_a_cache(window):
    model = decoder(window=window)
    prompts = [ids(1, n, n)[0].tolist() for n in (1, 4, 11)]
    got = model.generate(prompts, max_new_tokens=12, return_ids=True)
    assert [answer.ids for answer in got] == [greedy(model, prompt, 12) for prompt in prompts]
    assert not any(answer.finished for answer in got)


def test_the_same_key_draws_the_same_and_another_differs():
    model, prompt = decoder(), [[3, 4]]
    draw = lambda seed: model.generate(  # noqa: E731
        prompt, max_new_tokens=20, key=jax.random.key(seed), temperature=2.0, return_ids=True
    )
    assert draw(1) == draw(1) and draw(1) != draw(2)


def test_constraints_hold_at_every_step():
    model, prompt = decoder(), [[7, 8], [9]]
    free = model.generate(prompt, max_new_tokens=16, return_ids=True)
    first = free[0].ids[:2]
    rules = Constraint(forbidden_tokens=(free[1].ids[0],), forbidden_phrases=(tuple(first),))
    for answer in model.generate(prompt, max_new_tokens=16, constraint=rules, return_ids=True):
        assert free[1].ids[0] not in answer.ids
        assert tuple(first) not in set(zip(answer.ids, answer.ids[1:], strict=False))
    only = Constraint(allowed_tokens=(5, 6))
    for answer in model.generate(prompt, max_new_tokens=8, constraint=only, return_ids=True):
        assert set(answer.ids) <= {5, 6}


def test_a_phrase_may_begin_in_the_prompt():
    model = decoder()
    last = model.generate([[7, 8]], max_new_tokens=1, return_ids=True)[0].ids[0]
    rules = Constraint(forbidden_phrases=((7, 8, last),))
    assert model.generate([[7, 8]], max_new_tokens=1, constraint=rules, return_ids=True)[0].ids[0] != last


def test_the_penalty_forbids_repetition_when_it_is_strong():
    model = decoder()
    answer = model.generate([[3]], max_new_tokens=20, repetition_penalty=1e6, return_ids=True)[0]
    assert len({3, *answer.ids}) == 21


def test_tokens_arrive_in_order_as_they_come():
    model, seen = decoder(), []
    answers = model.generate(
        [[3, 4], [5]], max_new_tokens=6, on_token=lambda row, token, text: seen.append((row, token)), return_ids=True
    )
    for row, answer in enumerate(answers):
        assert [token for r, token in seen if r == row] == answer.ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[]]}, "prompt 0 has no tokens"),
        ({"prompts": [[1], [V]]}, "prompt 1 holds ids outside"),
        ({"prompts": [[1] * 60], "max_new_tokens": 5}, "60 tokens, with 5 new ones more than the model's 64"),
        ({"prompts": [[1]], "temperature": 0.5}, "sampling needs key"),
        ({"prompts": [[1]], "beams": 0}, "beams 1 or more"),
        ({"prompts": [[1]], "beams": 2, "repetition_penalty": 2.0}, "beam search goes with none"),
        ({"prompts": [[1]], "beams": 30}, "need a vocabulary of 60"),
        ({"prompts": [[1]], "stop": ("x",)}, "stop strings need a tokenizer"),
        ({"prompts": [[1]], "constraint": Constraint(forbidden_tokens=(V,))}, "outside the vocabulary"),
    ],
)
def test_wrong_calls_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        decoder().generate(**{"max_new_tokens": 4, **arguments})


def test_an_encoder_does_not_generate():
    model = fc.Model.init(
        ModelConfig(vocabulary=9, width=4, layers=1, heads=1, feed_forward_width=4), key=jax.random.key(0)
    )
    with pytest.raises(ValueError, match="does not predict the next token"):
        model.generate([[1]])


def test_nothing_asked_for_is_nothing():
    assert decoder().generate([], return_ids=True) == []
    assert decoder().generate([[1]], max_new_tokens=0, return_ids=True)[0].ids == []

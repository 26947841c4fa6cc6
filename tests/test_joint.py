"""Steps that cut two maps together and make heads and networks narrower."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick
from tiny_models import numbered_text, numbered_words

from flaxcompress import tree
from flaxcompress.compress import (
    Calibration,
    Context,
    JointQueryKey,
    JointValueOutput,
    PruneChannels,
    joint_query_key,
    joint_value_output,
)
from flaxcompress.config import Deltas, ModelConfig, Rotary, Sharing
from flaxcompress.model import Model, abstract_flat

D, HEADS, WIDTH = 16, 4, 6
PLAIN: dict[str, Any] = {
    **{"vocabulary": 60, "width": D, "layers": 3, "heads": HEADS, "head_width": WIDTH, "feed_forward_width": 32},
    **{"positions": 20, "dropout": 0.0, "attention_dropout": 0.0, "pooler": False},
}
GATED = {"gated": True, "activation": "silu", "attention_bias": False, "output_bias": False, "feed_forward_bias": False}
DECODER = {
    "family": "llama",
    "causal": True,
    "head": "causal_lm",
    "norm_place": "pre",
    "final_norm": True,
    "norm": "rms",
}
DECODER |= {"segments": 0, "position_embedding": "none", "embedding_norm": False, "norm_bias": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "biased": {},
    "grouped, rotary, gated": {**DECODER, **GATED, "key_value_heads": 2, "rotary": Rotary()},
    "shared, grouped, no output bias": {
        "sharing": Sharing(attention=(0, 0, 1), feed_forward=(0, 1, 1), norms=(0, 1, 2)),
        "key_value_heads": 2,
        "output_bias": False,
    },
}
STEPS = {
    "value and output": lambda width: JointValueOutput(width=width),
    "query and key": lambda width: JointQueryKey(width=width),
    "feed-forward": lambda width: PruneChannels(keep=width / WIDTH),
}


@functools.cache
def tiny(name: str) -> Model:
    """Random weights with decaying spectra, large biases, and inputs that are not centred."""
    config = ModelConfig(**{**PLAIN, **CONFIGS[name]})
    rng = np.random.default_rng(1)
    flat = {}
    for address, node in abstract_flat(config).items():
        value = rng.normal(size=node.shape)
        if value.ndim == 2:
            value = value * np.geomspace(1.5, 0.05, node.shape[1]) @ rng.normal(size=(node.shape[1],) * 2)
            value = value / node.shape[1] ** 0.5
        else:
            value = 0.3 * value + (1.0 if address.endswith("/scale") else 0.0)
        flat[address] = jnp.asarray(value, jnp.float32)
    return Model(params=tree.unflatten(flat), config=config, assets=numbered_words(55))


@functools.cache
def calibration() -> Calibration:
    return numbered_text(55, tiny("biased").assets)


def run(step, model: Model) -> Model:
    return step(model, Context(original=model, calibration=calibration()), key=jax.random.key(0))


@functools.cache
def inputs() -> tuple[np.ndarray, np.ndarray]:
    rows = calibration().rows
    ids = np.asarray([row + [0] * (16 - len(row)) for row in rows])
    return ids, np.arange(16) < np.asarray([[len(row)] for row in rows])


def hidden(model: Model) -> np.ndarray:
    ids, mask = inputs()
    return np.asarray(model(ids, mask).last_hidden_state, np.float64)[mask]


def error(model: Model, of: Model) -> float:
    want = hidden(of)
    return float(np.square(hidden(model) - want).mean() / want.var())


QUICK = [("value and output", "biased"), ("query and key", "biased")]  # compiling takes the time
CASES = quick([(step, name) for step in STEPS for name in CONFIGS], among=QUICK)


@pytest.mark.parametrize(("step", "name"), CASES)
def test_the_full_width_is_lossless_and_half_of_it_is_what_the_plan_says(step, name):
    model = tiny(name)
    # Float32 weights, through √ of products that are cut in float64: some 1e-6 of a value, and its square in the error.
    assert error(run(STEPS[step](WIDTH), model), model) < 1e-9
    half = STEPS[step](4)
    small = run(half, model)
    shapes = [
        {a: tree.signature(n) for a, n in flat.items()}
        for flat in (tree.flatten(small.params), abstract_flat(half.plan(model.config)), abstract_flat(small.config))
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    assert small.nbytes < model.nbytes
    assert error(small, model) < 1.0


def test_values_and_outputs_of_a_group_are_the_truncated_svd_of_their_product():
    """Against the SVD of C^½W_v[W_o,1 W_o,2], the two heads of a group side by side."""
    rng = np.random.default_rng(0)
    value, output = rng.normal(size=(D, 2 * WIDTH)), rng.normal(size=(HEADS * WIDTH, D))
    x = rng.normal(size=(200, D)) @ rng.normal(size=(D, D)) + 1.0
    c = x.T @ x / len(x)
    got_value, got_output, spectra = joint_value_output.compress_heads(value, output, c, groups=2, width=4)
    assert got_value.shape == (D, 2 * 4) and got_output.shape == (HEADS * 4, D)
    lower = np.linalg.cholesky(c)
    for k in range(2):
        heads = output.reshape(2, 2, WIDTH, D)[k]
        product = np.hstack([value[:, k * WIDTH : (k + 1) * WIDTH] @ head for head in heads])
        u, s, vt = np.linalg.svd(lower.T @ product, full_matrices=False)
        naive = np.linalg.solve(lower.T, u[:, :4] * s[:4]) @ vt[:4]
        got = np.hstack([got_value[:, k * 4 : (k + 1) * 4] @ head for head in got_output.reshape(2, 2, 4, D)[k]])
        atol = 64 * np.finfo(np.float64).eps * np.linalg.cond(lower) * np.abs(product).max() * np.sqrt(D)
        np.testing.assert_allclose(got, naive, rtol=0, atol=atol)
        e = product - got
        np.testing.assert_allclose(np.trace(e.T @ c @ e), (s[4:] ** 2).sum(), rtol=1e-9)
        np.testing.assert_allclose(spectra[k], s[:WIDTH], rtol=1e-6)


def test_queries_and_keys_of_a_group_are_the_truncated_svd_of_their_scores():
    """Against the SVD of the two heads' C^½W_qW_kᵀC'^½, one above the other; the error of the scores is the tail."""
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(D + 1, HEADS * WIDTH)), rng.normal(size=(D, 2 * WIDTH))
    x = rng.normal(size=(200, D)) @ rng.normal(size=(D, D)) + 1.0
    ones = np.hstack([x, np.ones((200, 1))])
    first, second = ones.T @ ones / 200, np.cov(x.T, bias=True)
    got_query, got_key, spectra = joint_query_key.compress_heads(query, key, first, second, groups=2, width=4)
    left, right = np.linalg.cholesky(first), np.linalg.cholesky(second)
    for k in range(2):
        asked = query.reshape(D + 1, 2, 2, WIDTH)[:, k].transpose(1, 0, 2)
        scores = [one @ key[:, k * WIDTH : (k + 1) * WIDTH].T for one in asked]
        s = np.linalg.svd(np.vstack([left.T @ one @ right for one in scores]), compute_uv=False)
        new = got_query.reshape(D + 1, 2, 2, 4)[:, k].transpose(1, 0, 2)
        lost = [one - cut @ got_key[:, k * 4 : (k + 1) * 4].T for one, cut in zip(scores, new, strict=True)]
        total = sum(np.trace(e.T @ first @ e @ second) for e in lost)
        np.testing.assert_allclose(total, (s[4:] ** 2).sum(), rtol=1e-9)
        np.testing.assert_allclose(spectra[k], s[:WIDTH], rtol=1e-6)


def test_a_keys_bias_changes_nothing():
    """Which is why it may be dropped: it adds the same to all scores of a query."""
    model = tiny("biased")
    flat = tree.flatten(model.params)
    for address in (a for a in flat if a.endswith("key/bias")):
        assert np.abs(flat[address]).max() > 0.1
        flat[address] = jnp.zeros_like(flat[address])
    assert error(Model(params=tree.unflatten(flat), config=model.config, assets=model.assets), model) < 1e-9


@pytest.mark.slow
def test_the_pairs_that_stay_are_the_ones_that_count():
    """One pair of a head is made large and another small; the frequencies go with the pairs that stay."""
    model = tiny("grouped, rotary, gated")
    flat = tree.flatten(model.params)
    for address in (a for a in flat if a.endswith(("query/kernel", "key/kernel"))):
        held = np.array(flat[address]).reshape(D, -1, 2, WIDTH // 2)
        held[..., 1] *= 1e-6
        flat[address] = jnp.asarray(held.reshape(D, -1))
    silent = Model(params=tree.unflatten(flat), config=model.config, assets=model.assets)
    small = run(JointQueryKey(width=4), silent)
    assert small.config.rotary is not None and small.config.rotary.pairs == (0, 2)
    assert error(small, silent) < 1e-9
    again = run(JointQueryKey(width=2), small)
    assert again.config.rotary is not None and again.config.rotary.pairs in ((0,), (2,))
    assert ModelConfig.from_json(again.config.to_json()) == again.config


@pytest.mark.parametrize(
    ("step", "more", "message"),
    [
        (JointValueOutput(width=7), {}, "JointValueOutput: width 7 is not in 1 … 6"),
        (JointValueOutput(), {}, "JointValueOutput: give either width or keep"),
        (JointQueryKey(keep=1.5), {}, "JointQueryKey: keep 1.5 must lie in"),
        (JointQueryKey(width=3), {"rotary": Rotary()}, r"width 3 is not in 2 … 6, in steps of 2"),
        (JointQueryKey(width=3), {"query_key_norm": True}, "models with norms of queries and keys"),
        (JointQueryKey(width=3), {"projection_kernel": 3}, "models with convolved projections"),
        (
            PruneChannels(width=3),
            {"deltas": Deltas(rank=2)},
            "does not cover models with deltas",
        ),
        (PruneChannels(width=40), {}, "PruneChannels: width 40 is not in 1 … 32"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_plan(step, more, message):
    with pytest.raises(ValueError, match=message):
        step.plan(ModelConfig(**{**PLAIN, **more}))


def test_a_ridge_of_nothing_is_refused():
    with pytest.raises(ValueError, match="ridge must be positive"):
        PruneChannels(width=3, ridge=0.0)


def test_weights_that_are_not_finite_are_named():
    model = tiny("biased")
    flat = tree.flatten(model.params)
    flat["layers/1/attention/output/kernel"] = flat["layers/1/attention/output/kernel"].at[0, 0].set(np.nan)
    broken = Model(params=tree.unflatten(flat), config=model.config, assets=model.assets)
    with pytest.raises(ValueError, match=r"JointValueOutput: .*not finite"):
        run(JointValueOutput(width=3), broken)

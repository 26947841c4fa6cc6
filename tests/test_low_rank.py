"""Metrics, allocated ranks and fitting in sequence: what each is for, and what each refuses."""

from __future__ import annotations

import functools
import itertools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxcompress as fc
from flaxcompress import linalg, tree
from flaxcompress.compress import Calibration, Context, LowRank
from flaxcompress.compress.loss_gradient import loss_gradient
from flaxcompress.compress.low_rank import compress_matrix
from flaxcompress.compress.metrics import METRICS, Statistics
from flaxcompress.compress.rank_allocation import values_of, water_filling, zero_sum
from flaxcompress.config import ModelConfig, Sharing
from flaxcompress.data import CalibrationText
from flaxcompress.formats import Format, materialize
from flaxcompress.formats.low_rank import break_even_rank
from flaxcompress.model import Model, abstract_flat
from flaxcompress.text import Assets, Pooling

KERNELS = r"layers/\d+/.*/kernel"
CONFIG = ModelConfig(
    vocabulary=60, width=16, layers=3, heads=2, feed_forward_width=32, positions=20, dropout=0.0, attention_dropout=0.0
)
N, M = 20, 24  # of single matrices; wide, so that the projection of inputs has a full rank, too


# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def moment(n: int, seed: int) -> np.ndarray:
    """Of correlated variables that are far from centred."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(300, n)) * np.geomspace(3, 0.1, n) @ rng.normal(size=(n, n)) + rng.normal(size=n)
    return x.T @ x / len(x)


@functools.cache
def weight() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, M))


@functools.cache
def statistics() -> Statistics:
    fisher = np.random.default_rng(3).exponential(size=(N, M)) * np.geomspace(9, 0.1, N)[:, None]
    return Statistics(input_moments=moment(N, 1), gradient_moments=moment(M, 2), fisher=fisher)


def error(metric: str, judge: str) -> float:
    """The squared error of the rank-5 matrix of a metric, by the measure of another."""
    e = weight() - np.asarray(materialize(compress_matrix(weight(), 5, metric=metric, statistics=statistics())[0]))
    given: Any = statistics()
    left, right = {
        "none": (np.eye(N), np.eye(M)),
        "fisher": (np.diag(given.fisher.sum(1)), np.eye(M)),
        "asvd": (np.diag(np.sqrt(np.diagonal(given.input_moments))), np.eye(M)),
        "activation": (given.input_moments, np.eye(M)),
        "two_sided": (given.input_moments, given.gradient_moments),
    }[judge]
    return float(np.einsum("nm,nk,kl,lm->", e, left, e, right))


@pytest.mark.parametrize("judge", [name for name in METRICS if name != "pca"])
def test_no_metric_beats_another_by_the_others_own_measure(judge):
    errors = {metric: error(metric, judge) for metric in METRICS}
    best = errors.pop(judge)
    assert best < 0.999 * min(errors.values()), errors


@pytest.mark.parametrize("metric", METRICS)
def test_full_rank_is_lossless_in_every_metric(metric):
    node, spectrum = compress_matrix(weight(), N, metric=metric, statistics=statistics())
    # float32 factors, and the condition of the metric's root that was undone (two-sided: at most 1e3·√M).
    atol = 8 * np.finfo(np.float32).eps * np.sqrt(N) * np.abs(weight()).max() * (30 if metric == "two_sided" else 4)
    np.testing.assert_allclose(materialize(node), weight(), rtol=0, atol=atol)
    assert len(spectrum) == N and np.isfinite(spectrum).all()


@pytest.mark.parametrize("metric", METRICS)
def test_factors_of_a_lower_rank_are_those_of_a_higher_one_cut(metric):
    """Which is why one decomposition gives the losses at all ranks."""
    whole, part = (METRICS[metric].factorize(weight(), r, statistics()) for r in (N, 5))
    for a, b in ((whole.left[:, :5], part.left), (whole.right[:5], part.right)):  # products of two shapes
        np.testing.assert_allclose(a, b, rtol=0, atol=8 * np.finfo(np.float64).eps * np.sqrt(N) * np.abs(b).max())


@pytest.mark.parametrize("metric", METRICS)
def test_inputs_that_never_change_or_never_come_give_finite_factors(metric):
    constant = np.outer(np.arange(N), np.arange(N)).astype(float)
    for c in (constant, np.zeros((N, N))):
        known = Statistics(input_moments=c, gradient_moments=np.zeros((M, M)), fisher=np.zeros((N, M)))
        node, spectrum = compress_matrix(weight(), 5, metric=metric, statistics=known)
        assert np.isfinite(np.asarray(materialize(node))).all() and np.isfinite(spectrum).all()


# ── ranks ────────────────────────────────────────────────────────────────────────────────────────────────────────────

SHAPES = {"a": (6, 6), "b": (6, 9), "c": (9, 6)}


def losses(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {a: np.sort(rng.exponential(size=min(s)) ** 2)[::-1] for a, s in SHAPES.items()}


def total(ranks) -> int:
    return sum(values_of(SHAPES[a], r) for a, r in ranks.items())


def lost(ranks, found) -> float:
    return sum(0.0 if r is None else float(found[a][r:].sum()) for a, r in ranks.items())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [50, 90, 110])
def test_water_filling_is_as_good_as_trying_all_ranks(seed, budget):
    """But for what one more component would take, since components are not divided."""
    found = losses(seed)
    choices = [[*range(1, break_even_rank(*SHAPES[a]) + 1), None] for a in SHAPES]
    every = [dict(zip(SHAPES, ranks, strict=True)) for ranks in itertools.product(*choices)]
    ranks = water_filling(found, SHAPES, budget)
    assert total(ranks) <= budget
    largest = max(values_of(s, None) - values_of(s, break_even_rank(*s)) for s in SHAPES.values())
    smaller = budget - max(largest, max(n + m for n, m in SHAPES.values()))
    best = min((lost(r, found) for r in every if total(r) <= smaller), default=np.inf)
    assert min(lost(r, found) for r in every if total(r) <= budget) <= lost(ranks, found) <= best


def test_a_matrix_that_would_reach_break_even_stays_dense():
    found = losses(0)
    found["a"] = found["a"] * 1e6
    ranks = water_filling(found, SHAPES, 80)
    assert ranks["a"] is None and None not in (ranks["b"], ranks["c"])
    assert water_filling(found, SHAPES, 36 + 54 + 54) == dict.fromkeys(SHAPES)  # room for all: nothing is cut


@pytest.mark.parametrize("allocate", [water_filling, zero_sum])
def test_a_budget_below_rank_one_is_refused(allocate):
    with pytest.raises(ValueError, match="rank 1 of every matrix takes 42 values, more than the 41 allowed"):
        allocate(losses(0), SHAPES, 41)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [60, 100])
def test_zero_sum_keeps_the_sum_of_effects_small_and_the_budget(seed, budget):
    rng = np.random.default_rng(seed)
    effects = {a: rng.normal(size=min(s)) * np.geomspace(3, 0.1, min(s)) for a, s in SHAPES.items()}
    ranks = zero_sum(effects, SHAPES, budget)
    assert total(ranks) <= budget
    cut = sum(0.0 if r is None else float(effects[a][r:].sum()) for a, r in ranks.items())
    assert abs(cut) <= max(np.abs(e).max() for e in effects.values())


def test_zero_sum_by_hand():
    """+1 is met by -2, then the sum of -1 by +3; the matrix with +9 at its end is not touched."""
    shapes = dict.fromkeys("xyz", (4, 4))
    effects = {"x": [5.0, 5.0, 3.0, 1.0], "y": [5.0, 5.0, 7.0, -2.0], "z": [5.0, 5.0, 5.0, 9.0]}
    ranks = zero_sum({a: np.asarray(e) for a, e in effects.items()}, shapes, 48)
    assert ranks == dict.fromkeys("xyz")
    # A rank of 1 takes 8 of 16 values: x gives up +1, +3 and +5 before y's +7 and z's +9 come up.
    ranks = zero_sum({a: np.asarray(e) for a, e in effects.items()}, shapes, 40)
    assert ranks == {"x": 1, "y": None, "z": None}


# ── the step ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def tiny(causal: bool = False, shared: bool = False) -> Model:
    """Random weights with decaying spectra, of unlike strength from layer to layer, and inputs that are not centred."""
    config = CONFIG
    if causal:
        config = config.replace(
            family="gpt2", causal=True, head="causal_lm", pooler=False, segments=0, norm_place="pre"
        )
        config = config.replace(final_norm=True, embedding_norm=False)
    if shared:
        config = config.replace(sharing=Sharing(attention=(0, 0, 1), feed_forward=(0, 1, 1), norms=(0, 1, 2)))
    rng = np.random.default_rng(1)
    flat = {}
    for address, node in abstract_flat(config).items():
        value = rng.normal(size=node.shape)
        if value.ndim == 2:
            decay = np.geomspace(1.5, rng.choice([0.5, 0.02]), node.shape[1])
            value = value * decay @ rng.normal(size=(node.shape[1],) * 2) / node.shape[1] ** 0.5
        else:
            value = 0.3 * value + (1.0 if address.endswith("/scale") else 0.0)
        flat[address] = jnp.asarray(value, jnp.float32)
    words = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55))])
    assets = Assets(files=(("vocab.txt", words.encode()),), max_length=16, pooling=Pooling("mean", True))
    return Model(params=tree.unflatten(flat), config=config, assets=assets)


@functools.cache
def calibration(count: int = 60) -> Calibration:
    rng = np.random.default_rng(0)
    rows = tuple(" ".join(f"w{i}" for i in rng.zipf(1.5, int(n)) % 55) for n in rng.integers(4, 14, count))
    return Calibration(CalibrationText(name="words", train=rows, held_out=()), tiny().assets, vocabulary=60)


def run(step: LowRank, model: Model, count: int = 60) -> Model:
    return step(model, Context(original=model, calibration=calibration(count)), key=jax.random.key(0))


def hidden(model: Model) -> np.ndarray:
    """Last hidden states of the real tokens, by dense weights: one program for all results."""
    flat = {a: materialize(n) if isinstance(n, Format) else n for a, n in tree.flatten(model.params).items()}
    dense = Model(params=tree.unflatten(flat), config=model.config.replace(formats=()), assets=model.assets)
    rows = calibration().rows
    ids = np.asarray([row + [0] * (16 - len(row)) for row in rows])
    mask = np.arange(16) < np.asarray([[len(row)] for row in rows])
    return np.asarray(dense(ids, mask).last_hidden_state)[mask]


def distance(step: LowRank, model: Model) -> float:
    want = hidden(model)
    return float(np.square(hidden(run(step, model)) - want).mean() / want.var())


@pytest.mark.slow
def test_fitting_in_sequence_makes_up_for_the_layers_before():
    alone, sequential = (LowRank(KERNELS, keep=0.5, sequential=s) for s in (False, True))
    assert distance(sequential, tiny()) < 0.95 * distance(alone, tiny())


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_fitting_in_sequence_at_full_rank_is_lossless(shared):
    step = LowRank(KERNELS, rank=16, allow_larger=True, sequential=True)
    # Float32 noise in the moments, divided by the ridge of 1e-3: of the variance, the square of it.
    assert distance(step, tiny(shared=shared)) < (16 * np.finfo(np.float32).eps / 1e-3) ** 2


def output_losses(small: Model) -> float:
    """Σ E‖x(Ŵ - W)‖²/E‖xW‖² over the kernels, on the original's inputs."""
    moments = calibration().input_moments(tiny())
    old, new = tree.flatten(tiny().params), tree.flatten(small.params)
    found = 0.0
    for address, c in ((f"{a}/kernel", c) for a, c in moments.items()):
        w = np.asarray(old[address], np.float64)
        e = w - np.asarray(materialize(new[address]), np.float64)
        found += np.einsum("nm,nk,km->", e, c, e) / np.einsum("nm,nk,km->", w, c, w)
    return float(found)


def test_allocated_ranks_lose_less_than_equal_ones_and_take_no_more():
    small, equal = (run(LowRank(KERNELS, keep=0.5, allocation=a), tiny()) for a in ("energy", "uniform"))
    assert output_losses(small) < 0.8 * output_losses(equal)
    assert small.nbytes <= equal.nbytes
    ranks = {getattr(n, "rank", None) for a, n in tree.View(small.params).items() if a.endswith("/kernel")}
    assert len(ranks) > 3


def text_loss(flat) -> float:
    """Mean cross-entropy of the next tokens, token by token."""
    rows = calibration().rows
    padded = np.asarray([row + [0] * (16 - len(row)) for row in rows])
    mask = np.arange(16) < np.asarray([[len(row)] for row in rows])
    moved = Model(params=tree.unflatten(flat), config=tiny(causal=True).config, assets=tiny().assets)
    logits = np.asarray(moved(padded, mask).logits, np.float64)
    chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(np.mean([-chances[b, i, row[i + 1]] for b, row in enumerate(rows) for i in range(len(row) - 1)]))


def test_the_loss_gradient_predicts_small_changes():
    """Along the gradient's signs, by a central difference of a step at which float32 rounds little."""
    gradient = loss_gradient(tiny(causal=True), calibration(), sentences=60)
    flat = tree.flatten(tiny(causal=True).params)
    signs = {a: np.sign(gradient[a]) for a in flat if a.endswith("/kernel")}
    moved = lambda step: {a: n + jnp.asarray(step * signs[a], n.dtype) if a in signs else n for a, n in flat.items()}  # noqa: E731
    ends = [text_loss(moved(step)) for step in (1e-3, -1e-3)]
    want = sum(float((gradient[a] * s).sum()) for a, s in signs.items())
    assert abs((ends[0] - ends[1]) / 2e-3 - want) < 0.02 * abs(want)


@pytest.mark.slow
def test_zero_sum_ranks_fit_the_budget_of_a_language_model():
    step = LowRank(KERNELS, keep=0.6, allocation="zero_sum")
    model = tiny(causal=True)
    small = run(step, model)
    assert small.nbytes <= sum(n.nbytes for n in jax.tree.leaves(run(LowRank(KERNELS, keep=0.6), model).params))
    assert np.isfinite(hidden(small)).all()


def test_zero_sum_refuses_an_encoder():
    with pytest.raises(ValueError, match="this one's head is 'none'; use allocation: energy"):
        run(LowRank(KERNELS, keep=0.6, allocation="zero_sum"), tiny())


def test_few_tokens_are_warned_of_with_their_number(caplog):
    with caplog.at_level(logging.WARNING, logger="flaxcompress"):
        small = run(LowRank(KERNELS, rank=4), tiny(), count=2)
    tokens = sum(map(len, calibration(2).rows))
    assert tokens < 32 and f"{tokens} calibration tokens leave some of 32 inputs unseen" in caplog.text
    assert np.isfinite(hidden(small)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value):
    address = "layers/1/feed_forward/up/kernel"
    flat = tree.flatten(tiny().params)
    flat[address] = flat[address].at[2, 3].set(value)
    broken = Model(params=tree.unflatten(flat), config=CONFIG, assets=tiny().assets)
    with pytest.raises(ValueError, match=f"LowRank: {address}: 1 of 512 values are not finite"):
        run(LowRank(KERNELS, rank=4, whitening="none"), broken)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 4, "whitening": "activations"}, "unknown whitening 'activations'.*activation"),
        ({"rank": 4, "allocation": "energy"}, "divides what keep: leaves"),
        ({"keep": 0.5, "whitening": "fisher", "sequential": True}, "does not read; use one of pca, asvd, activation"),
        ({"keep": 0.5, "sentences": 0}, "sentences must be at least 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LowRank(KERNELS, **settings)


def test_fitting_in_sequence_refuses_what_stands_outside_the_layers():
    step = LowRank(r"pooler/dense/kernel", rank=4, sequential=True)
    with pytest.raises(ValueError, match="sequential goes through the layers, and pooler/dense/kernel stand outside"):
        step.plan(CONFIG)


# ── a trained checkpoint ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_of_a_trained_layer_the_error_is_the_tail_and_the_two_forms_agree():
    """MiniLM's first layer: biased, correlated inputs. float64 on float32 moments, so that C is not quite positive."""
    model = fc.load("minilm")
    text = fc.calibration_text()
    moments = Calibration(text, model.assets, vocabulary=model.config.vocabulary).input_moments(model, sentences=64)
    flat = tree.View(model.params)
    for name in ("attention/query", "attention/output", "feed_forward/up"):
        w, c = (
            np.asarray(flat[f"layers/0/{name}/kernel"], np.float64),
            np.asarray(moments[f"layers/0/{name}"], np.float64),
        )
        c = (c + c.T) / 2 + 1e-6 * np.trace(c) / len(c) * np.eye(len(c))  # for Cholesky
        lower = np.linalg.cholesky(c)
        u, s, vt = np.linalg.svd(lower.T @ w, full_matrices=False)
        total, eps = float((s**2).sum()), float(np.finfo(np.float64).eps)
        for rank in (16, 96):
            got = linalg.output_pca(w, rank, c)
            e = w - got.left @ got.right
            error = float(np.einsum("nm,nk,km->", e, c, e, optimize=True))
            np.testing.assert_allclose(error, (s[rank:] ** 2).sum(), rtol=0, atol=w.size * eps * total)
            naive = np.linalg.solve(lower.T, u[:, :rank] * s[:rank]) @ vt[:rank]
            atol = 64 * eps * np.linalg.cond(lower) * np.abs(w).max() * np.sqrt(len(w))
            np.testing.assert_allclose(got.left @ got.right, naive, rtol=0, atol=atol)
            fast = linalg.randomized_svd(w, rank, c)
            e = w - fast.left @ fast.right
            assert float(np.einsum("nm,nk,km->", e, c, e, optimize=True)) <= 1.01 * error

"""Token weights, and the layout of tiers and bands that fits a number of bytes."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import numpy as np
import pytest

from flaxcompress.compress.factorize_embedding import banded_table
from flaxcompress.compress.tiers import basis_bytes, choose_layout, row_bytes, token_weights, zipf_prior
from flaxcompress.formats import BandedSpec, Bucketed, LowRank, nbytes
from flaxcompress.formats.banded import GAUSSIAN_LOSS

V, D = 600, 48
TARGETS = (6_000, 9_000, 14_000, 22_000, 40_000)
REAL = (6_000, 14_000)  # for which nodes are made: every tier compiles its own rounding


@functools.cache
def table() -> np.ndarray:
    """Rows whose leading components carry more energy."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(V, D)) * np.geomspace(3, 0.1, D) @ np.linalg.qr(rng.normal(size=(D, D)))[0]


@functools.cache
def weights() -> np.ndarray:
    return token_weights(np.random.default_rng(1).poisson(2000 / (np.arange(V) + 5)), start=10)


@functools.cache
def energies() -> np.ndarray:
    root = np.sqrt(weights())[:, None]
    _, _, vt = np.linalg.svd(root * table(), full_matrices=False)
    return (table() @ vt.T) ** 2


@functools.cache
def layout(target: int, max_tiers: int = 8):
    return choose_layout(np.sqrt(energies()), weights(), target, max_tiers=max_tiers)


@functools.cache
def node(target: int, max_tiers: int = 4) -> LowRank:
    basis = (np.eye(D), np.eye(D))
    return banded_table(table(), weights(), basis, target, max_tiers, jax.random.key(0))[0]


def predicted_error(layouts) -> float:
    order, start, total = np.argsort(-weights(), kind="stable"), 0, 0.0
    for tier in layouts:
        rows = order[start : start + tier.rows]
        loss = np.concatenate([np.full(columns, GAUSSIAN_LOSS[bits]) for columns, bits in tier.bands])
        total += float((weights()[rows, None] * energies()[rows] * loss).sum())
        start += tier.rows
    return total


@pytest.mark.parametrize("target", TARGETS)
def test_layout_fits_and_covers_the_table(target):
    layouts = layout(target)
    assert 1 <= len(layouts) <= 8
    assert sum(tier.rows for tier in layouts) == V
    for tier in layouts:
        assert sum(columns for columns, _ in tier.bands) == D
        assert tier.bands[0][1] > 0  # every row stores something


@pytest.mark.parametrize("target", REAL)
@pytest.mark.parametrize("max_tiers", [1, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_the_real_node_has_the_bytes_that_were_counted(target, max_tiers):
    found = node(target, max_tiers)
    assert nbytes(found) <= target
    tiers = found.left.tiers if isinstance(found.left, Bucketed) else (found.left,)
    counted = sum(t.shape[0] * BandedSpec(bands=t.bands).row_bytes for t in tiers)
    counted += found.left.assignment.size if isinstance(found.left, Bucketed) else 0
    counted += basis_bytes(found.rank, D, 2)
    assert nbytes(found) == counted
    assert found.shape == (V, D)


@pytest.mark.parametrize("target", REAL)
def test_the_budget_is_used(target):
    """Room is kept for a basis of full rank; beyond that, less is left than a band of a stretch of rows would take."""
    found = node(target)
    assert nbytes(found) + (D - found.rank) * D > 0.95 * target


def test_more_bytes_mean_less_error():
    predicted = [predicted_error(layout(target)) for target in TARGETS]
    assert all(b < a for a, b in itertools.pairwise(predicted))
    real = [(weights()[:, None] * (np.asarray(node(t).materialize()) - table()) ** 2).sum() for t in REAL]
    assert all(b < a for a, b in itertools.pairwise(real))


@pytest.mark.parametrize("target", REAL)
def test_predicted_error_is_the_real_one(target):
    """Within the difference between a rotated row and a Gaussian."""
    real = (weights()[:, None] * (np.asarray(node(target).materialize()) - table()) ** 2).sum()
    assert 0.6 < real / predicted_error(layout(target, 4)) < 1.6


def test_tiers_beat_one_tier():
    assert predicted_error(layout(9_000)) < 0.95 * predicted_error(layout(9_000, 1))


def test_the_heaviest_rows_get_most_bits_and_the_lightest_fewest():
    """Between them, a stretch of longer rows may earn more than a heavier one of shorter rows."""
    bits = [sum(columns * b for columns, b in tier.bands) for tier in layout(9_000)]
    assert len(bits) > 2
    assert bits[0] == max(bits) > min(bits) == bits[-1]


def test_too_small_a_target_names_the_smallest():
    with pytest.raises(
        ValueError, match=rf"100 bytes are too few for a {V}×{D} table; the smallest takes \d+"
    ) as caught:
        choose_layout(np.sqrt(energies()), weights(), 100)
    smallest = int(re.findall(r"\d+", str(caught.value))[-1])
    fitting = choose_layout(np.sqrt(energies()), weights(), smallest)
    assert sum(tier.rows for tier in fitting) == V
    with pytest.raises(ValueError, match="the smallest takes"):
        choose_layout(np.sqrt(energies()), weights(), smallest - 1)


@pytest.mark.parametrize("shape", [(5, 3), (40, 8), (130, 20)])
def test_small_tables(shape):
    rng = np.random.default_rng(2)
    found = choose_layout(rng.exponential(size=shape), np.full(shape[0], 1 / shape[0]), 10_000)
    assert sum(tier.rows for tier in found) == shape[0]
    assert sum(columns for columns, _ in found[0].bands) == shape[1]


# ── token weights ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prior", ["zipf", "uniform"])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("start", [0, 5, 50])
def test_token_weights_are_a_distribution(prior, power, start):
    counts = np.random.default_rng(3).poisson(3.0, size=50)
    found = token_weights(counts, start=start, prior=prior, power=power)
    assert found.shape == (50,) and (found > 0).all()
    np.testing.assert_allclose(found.sum(), 1.0, rtol=50 * np.finfo(float).eps)


def test_more_frequent_tokens_weigh_more():
    counts = np.zeros(40)
    counts[20:30] = np.arange(10)
    found = token_weights(counts, start=4, prior="uniform")
    assert (np.diff(found[20:30]) > 0).all()
    tempered, plain = found, token_weights(counts, start=4, prior="uniform", power=1.0)
    assert tempered.max() / tempered[4:].min() < plain.max() / plain[4:].min()


def test_zipf_prior_prefers_low_ids_and_skips_the_special_block():
    prior = zipf_prior(4, 20)
    np.testing.assert_array_equal(prior[:4], 0)
    assert (np.diff(prior[4:]) < 0).all()
    np.testing.assert_allclose(prior.sum(), 1.0, rtol=1e-14)
    np.testing.assert_array_equal(zipf_prior(20, 20), 0)


def test_special_tokens_weigh_most_if_seen_and_least_if_not():
    counts = np.zeros(40)
    counts[[1, 10]] = 3, 500
    found = token_weights(counts, start=4)
    assert found[1] == found.max()
    assert found[[0, 2, 3]].max() < found[4:].min()


def test_no_counts_leave_the_prior():
    found = token_weights(np.zeros(30), start=0, power=1.0)
    np.testing.assert_allclose(found, zipf_prior(0, 30), rtol=1e-12)


def test_unknown_prior():
    with pytest.raises(ValueError, match="prior 'zip'; known: uniform, zipf"):
        token_weights(np.zeros(3), start=0, prior="zip")


def test_bytes_of_a_tier():
    assert row_bytes(10, None) == 40 and row_bytes(10, 4) == 5 + 2 and row_bytes(10, 3) == 6 + 2
    assert basis_bytes(10, 48, None) == 1920 and basis_bytes(10, 48, 4) == 12 * 48

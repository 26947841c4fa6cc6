"""Rounding: GPTQ against a naive loop in float64, and what each method is for."""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from flaxcompress.compress.rounding import gptq, round_banded, round_rows
from flaxcompress.formats import BandedSpec, QuantizedSpec
from flaxcompress.formats.banded import GAUSSIAN_LOSS, GAUSSIAN_STEP
from flaxcompress.formats.codebook import NF4, FP8Spec, NF4Spec
from flaxcompress.formats.quantized import top_level
from flaxcompress.formats.scaled import spread_scale

ROWS, N = 24, 40
SPECS = {
    "int4": QuantizedSpec(bits=4),
    "int4-16": QuantizedSpec(bits=4, group=16),  # the last group is not full
    "int3-8": QuantizedSpec(bits=3, group=8),
    "int2-16": QuantizedSpec(bits=2, group=16),
    "int8": QuantizedSpec(bits=8),
    "nf4-16": NF4Spec(group=16),
    "fp8": FP8Spec(),
}
EVERY = pytest.mark.parametrize("name", SPECS)


@functools.cache
def weights() -> np.ndarray:
    return np.random.default_rng(0).standard_t(5, size=(ROWS, N)).astype(np.float32)


@functools.cache
def second_moment() -> np.ndarray:
    """Strongly correlated inputs, as activations are."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, N)) * np.geomspace(4, 0.1, N) @ rng.normal(size=(N, N))
    return (x.T @ x / len(x)).astype(np.float32)


@functools.cache
def rounded(method: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    if method == "gptq":
        levels, scale = gptq(jnp.asarray(weights()), jnp.asarray(second_moment()), SPECS[name])
    else:
        levels, scale = round_rows(jnp.asarray(weights()), SPECS[name], rounding=method)
    return np.asarray(levels), np.asarray(scale)


def back(levels, scale, spec) -> np.ndarray:
    return np.asarray(levels * spread_scale(jnp.asarray(scale), N, spec.group), np.float64)


def output_error(approximation: np.ndarray) -> float:
    """E‖x(Ŵ - W)‖², summed over the outputs."""
    e = approximation - weights()
    return float(np.einsum("rn,nk,rk->", e, second_moment().astype(np.float64), e))


def level_set(spec) -> np.ndarray:
    """All levels, in order."""
    if isinstance(spec, NF4Spec):
        return np.asarray(NF4)
    if isinstance(spec, FP8Spec):
        numbers = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float64)
        return np.unique(numbers[np.isfinite(numbers)])
    top = top_level(spec.bits)
    return np.arange(-top, top + 1)


def nearest(x: np.ndarray, spec) -> np.ndarray:
    levels = level_set(spec)
    return levels[np.abs(x[..., None] - levels).argmin(-1)]


def naive_gptq(scale: np.ndarray, spec, damping: float = 0.01) -> np.ndarray:
    """Frantar et al. 2023, algorithm 1 with block size 1, in float64, for scales that are given."""
    w = weights().astype(np.float64)
    h = second_moment().astype(np.float64)
    h = h + damping * np.mean(np.diagonal(h)) * np.eye(N)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    levels = np.zeros_like(w)
    for i in range(N):
        s = scale[:, 0 if spec.group is None else i // spec.group].astype(np.float64)
        levels[:, i] = nearest(w[:, i] / s, spec)
        error = (w[:, i] - levels[:, i] * s) / u[i, i]
        w[:, i + 1 :] -= error[:, None] * u[i, i + 1 :]
    return levels


@EVERY
def test_gptq_equals_the_naive_loop(name):
    """A tie may fall to the other side in float32, and the row's later columns then differ: rare, and no worse."""
    levels, scale = rounded("gptq", name)
    want = naive_gptq(scale, SPECS[name])
    assert (levels == want).mean() > 0.95
    assert output_error(back(levels, scale, SPECS[name])) <= 1.02 * output_error(back(want, scale, SPECS[name]))


@EVERY
def test_gptq_beats_mse_beats_nearest_on_outputs(name):
    errors = {m: output_error(back(*rounded(m, name), SPECS[name])) for m in ("gptq", "mse", "nearest")}
    assert errors["gptq"] < 0.7 * errors["nearest"]
    assert errors["gptq"] < 0.8 * min(errors["mse"], errors["nearest"])


@EVERY
def test_mse_beats_nearest_on_weights(name):
    errors = {m: ((back(*rounded(m, name), SPECS[name]) - weights()) ** 2).sum() for m in ("mse", "nearest")}
    assert errors["mse"] <= errors["nearest"] * (1.0 if SPECS[name].bits < 8 else 1.01)
    if SPECS[name].bits < 4:
        assert errors["mse"] < 0.95 * errors["nearest"]


@EVERY
@pytest.mark.parametrize("method", ["gptq", "mse", "nearest"])
def test_levels_and_scales_are_storable(method, name):
    spec = SPECS[name]
    levels, scale = rounded(method, name)
    assert levels.shape == (ROWS, N) and scale.shape == (ROWS, 1 if spec.group is None else -(-N // spec.group))
    np.testing.assert_array_equal(levels, nearest(levels.astype(np.float64), spec).astype(np.float32))
    assert np.abs(levels).max() <= spec.top
    np.testing.assert_array_equal(scale, scale.astype(np.float16).astype(np.float32))


def test_mse_weights_move_the_scale_to_what_matters():
    """With all the importance on one column, that column is nearly exact."""
    importance = np.full(N, 1e-6, np.float32)
    importance[3] = 1.0
    spec = QuantizedSpec(bits=2)
    levels, scale = round_rows(jnp.asarray(weights()), spec, rounding="mse", weights=jnp.asarray(importance))
    plain = back(*rounded("mse", "int2-16"), SPECS["int2-16"])
    error = np.abs(back(levels, scale, spec) - weights())[:, 3]
    assert np.square(error).sum() < np.square(np.abs(plain - weights())[:, 3]).sum()


@pytest.mark.parametrize("case", ["zero moment", "dead inputs", "zero rows", "one column"])
def test_gptq_stays_finite(case):
    w, c = weights().copy(), second_moment().copy()
    if case == "zero moment":
        c[:] = 0
    elif case == "dead inputs":
        c[5:20] = 0
        c[:, 5:20] = 0
    elif case == "zero rows":
        w[::2] = 0
    else:
        w, c = w[:, :1], c[:1, :1]
    levels, scale = gptq(jnp.asarray(w), jnp.asarray(c), QuantizedSpec(bits=4, group=16))
    assert np.isfinite(np.asarray(levels)).all() and np.isfinite(np.asarray(scale)).all()
    if case == "zero rows":
        got = np.asarray(levels) * np.repeat(np.asarray(scale), 16, axis=1)[:, :N]
        np.testing.assert_array_equal(got[::2], 0)


def test_gptq_with_independent_inputs_is_plain_rounding():
    """No correlation, nothing to make up for: every value goes to its nearest level."""
    spec = QuantizedSpec(bits=4, group=8)
    levels, scale = gptq(jnp.asarray(weights()), jnp.eye(N), spec)
    unit = weights() / np.repeat(np.asarray(scale), 8, axis=1)
    np.testing.assert_array_equal(levels, np.clip(np.round(unit), -7, 7))


# ── bands ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def gaussian() -> np.ndarray:
    """A fine quadrature of the unit Gaussian: values at the middles of equally likely slices."""
    from scipy.stats import norm

    count = 200_001
    return norm.ppf((np.arange(count) + 0.5) / count)


def gaussian_error(bits: int, step: float) -> float:
    top = {1: 0.5, 2: 1.5, 3: 3.5, 4: 7.0, 8: 127.0}[bits]
    shift = 0.5 if bits < 4 else 0.0
    level = np.clip(np.round(gaussian() / step - shift) + shift, -top, top)
    return float(np.mean((gaussian() - level * step) ** 2))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_gaussian_step_is_optimal(bits):
    step = GAUSSIAN_STEP[bits]
    best = min(gaussian_error(bits, step * f) for f in np.linspace(0.9, 1.1, 41))
    assert gaussian_error(bits, step) <= 1.01 * best
    # The table has four decimals.
    assert abs(gaussian_error(bits, step) - GAUSSIAN_LOSS[bits]) <= 5e-5 + 0.02 * GAUSSIAN_LOSS[bits]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_banded_error_on_gaussians(bits):
    """About the table's loss; the scale that fits each row may take it a little lower."""
    rng = np.random.default_rng(bits)
    size = np.exp(rng.normal(size=(30, 1)))
    rows = (rng.normal(size=(30, 1024)) * size).astype(np.float32)
    spec = BandedSpec(bands=((1024, bits),))
    levels, scale = round_banded(jnp.asarray(rows), jnp.ones(1024), spec)
    error = ((np.asarray(levels) * GAUSSIAN_STEP[bits] * np.asarray(scale) - rows) ** 2).mean(1) / size[:, 0] ** 2
    spread = math.sqrt(2 / (30 * 1024))  # of the mean of that many squares
    assert 0.9 * GAUSSIAN_LOSS[bits] < error.mean() < (1.03 + 3 * spread) * GAUSSIAN_LOSS[bits]


def test_banded_costs_and_empty_bands():
    rng = np.random.default_rng(5)
    rows = jnp.asarray(rng.normal(size=(30, 24)), jnp.float32)
    spec = BandedSpec(bands=((8, 3), (8, 1), (8, 0)))
    levels, scale = round_banded(rows, jnp.asarray(np.repeat([9.0, 1.0, 1.0], 8), jnp.float32), spec)
    np.testing.assert_array_equal(levels[:, 16:], 0)
    assert np.abs(np.asarray(levels[:, :8])).max() <= 3.5
    np.testing.assert_array_equal(np.abs(levels[:, 8:16]), 0.5)
    zeros, _ = round_banded(jnp.zeros((2, 24)), jnp.ones(24), spec)
    assert np.isfinite(np.asarray(zeros)).all()
    assert np.asarray(scale).shape == (30, 1)

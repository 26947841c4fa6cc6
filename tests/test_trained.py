"""What is exact on random matrices is exact on trained ones, whose inputs are correlated and far from centred."""

from __future__ import annotations

import functools
import gzip
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.compress import Calibration, Context, Step, joint_query_key, joint_value_output
from flaxcompress.compress.metrics import METRICS
from flaxcompress.compress.narrow import input_means
from flaxcompress.data import CalibrationText
from flaxcompress.model import Model

SQUARE = r"layers/\d+/(attention/(query|output)|feed_forward/.*)/kernel"  # whose smaller side is the width, 64
READING = r"layers/\d+/(attention/(query|output)|feed_forward/(up|gate))/kernel"  # of 64 inputs
FULL: dict[str, Step] = {
    **{
        f"LowRank {name}": fc.LowRank(SQUARE, rank=64, whitening=name, allow_larger=True)
        for name in METRICS
        if name != "pca"
    },
    "LowRank pca": fc.LowRank(READING, rank=64, whitening="pca", allow_larger=True),
    "LowRank sequential": fc.LowRank(SQUARE, rank=64, sequential=True, allow_larger=True),
    "ShareBasis": fc.ShareBasis(r"layers/\d+/attention/query/kernel", rank=64, allow_larger=True),
    "Tensorize tucker": fc.Tensorize(SQUARE, kind="tucker", rank=10**6, allow_larger=True),
    "Tensorize tensor_train": fc.Tensorize(SQUARE, kind="tensor_train", rank=10**6, allow_larger=True),
    "JointValueOutput": fc.JointValueOutput(keep=1.0),
    "JointQueryKey": fc.JointQueryKey(keep=1.0),
    "PruneChannels": fc.PruneChannels(keep=1.0),
    "FactorizeEmbedding": fc.FactorizeEmbedding(rank=64, allow_larger=True),
    "Fold": fc.Fold(),
}


@functools.cache
def stories() -> tuple[Model, Calibration, np.ndarray]:
    """A trained decoder with grouped heads and rotary positions, text to calibrate on, and tokens [4, 96]."""
    folder = os.environ.get("FLAXCOMPRESS_DATA")
    if not folder:
        pytest.skip("needs the small public data sets: set FLAXCOMPRESS_DATA to their folder")
    model = fc.load(Path(folder) / "models" / "stories260K")
    text = gzip.decompress((Path(folder) / "tinystories" / "sample_2mib.txt.gz").read_bytes()).decode()
    rows = tuple(story.strip() for story in text.split("<|endoftext|>")[:64])
    calibration = Calibration(
        CalibrationText(name="stories", train=rows, held_out=()), model.assets, vocabulary=512, max_length=128
    )
    return model, calibration, np.asarray([row[:96] for row in calibration.rows[:4]])


def logits(model: Model) -> np.ndarray:
    return np.asarray(model(stories()[2]).logits, np.float64)


@functools.cache
def one_rounding() -> float:
    """How far logits move when every weight is off by as much as storing it in float32 may be."""
    model, rng = stories()[0], np.random.default_rng(0)
    eps = np.finfo(np.float32).eps

    def off(w: jax.Array) -> jax.Array:
        return w + eps * jnp.abs(w).max() * jnp.asarray(rng.uniform(-1, 1, w.shape), w.dtype)

    return float(
        np.abs(
            logits(Model(params=jax.tree.map(off, model.params), config=model.config, assets=model.assets))
            - logits(model)
        ).max()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_nothing_cut_away_gives_the_logits_back(name):
    """Within 16 roundings of the weights: products of two or three rounded factors, of larger entries than theirs."""
    model, calibration, _ = stories()
    whole = FULL[name](model, Context(original=model, calibration=calibration), key=jax.random.key(0))
    np.testing.assert_allclose(logits(whole), logits(model), rtol=0, atol=16 * one_rounding())


@functools.cache
def minilm() -> tuple[Model, Calibration]:
    model = fc.load("minilm")
    return model, Calibration(fc.calibration_text(), model.assets, vocabulary=model.config.vocabulary)


def attention(layer: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """{path: float64 array} of a layer's attention, and the mean [D] and second moment [D, D] of what it reads."""
    model, calibration = minilm()
    prefix = f"layers/{layer}/attention"
    flat = tree.View(model.params)
    held = {a.removeprefix(f"{prefix}/"): np.asarray(flat[a], np.float64) for a in flat if a.startswith(prefix)}
    moment = np.asarray(calibration.input_moments(model, sentences=64)[f"{prefix}/query"], np.float64)
    mean = input_means(model, calibration, sentences=64)[prefix]
    return held, mean, (moment + moment.T) / 2


def root(moment: np.ndarray) -> np.ndarray:
    """C^1/2, what rounding made negative taken as zero."""
    values, vectors = np.linalg.eigh(moment)
    return np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 4])
def test_the_joint_errors_of_trained_heads_are_the_tails(layer):
    """Of each head's scores and of each head's outputs, against the SVD of the whitened products."""
    held, mean, moment = attention(layer)
    heads, width, kept = minilm()[0].config.heads, 32, 12
    assert np.abs(mean).max() > np.sqrt(np.trace(moment - np.outer(mean, mean)) / len(mean))  # far from centred
    query = np.vstack([held["query/kernel"], held["query/bias"]])
    first = np.block([[moment, mean[:, None]], [mean[None], np.ones((1, 1))]])
    second = moment - np.outer(mean, mean)
    down, up, _ = joint_query_key.compress_heads(query, held["key/kernel"], first, second, groups=heads, width=kept)
    into, out, _ = joint_value_output.compress_heads(
        held["value/kernel"], held["output/kernel"], moment, groups=heads, width=kept
    )
    left, right, read = root(first), root(second), root(moment)

    def check(whitened: np.ndarray, cut: np.ndarray) -> None:
        spectrum = np.linalg.svd(whitened, compute_uv=False)
        lost, tail = np.square(whitened - cut).sum(), np.square(spectrum[kept:]).sum()
        # Squares of singular values in float64: each of `width` is off by eps times the largest, or some of it.
        np.testing.assert_allclose(lost, tail, rtol=0, atol=64 * width * np.finfo(np.float64).eps * spectrum[0] ** 2)
        assert tail > 1e-6 * spectrum[0] ** 2  # there is something to lose

    for h in range(heads):
        old, new = slice(h * width, (h + 1) * width), slice(h * kept, (h + 1) * kept)
        check(
            left @ query[:, old] @ held["key/kernel"][:, old].T @ right.T, left @ down[:, new] @ up[:, new].T @ right.T
        )
        check(read @ held["value/kernel"][:, old] @ held["output/kernel"][old], read @ into[:, new] @ out[new])

"""Gradual pruning: the schedule, the masks, and what straight-through gradients and movement do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.compress import Context
from flaxcompress.data.batches import StepBatches
from flaxcompress.formats import SparseSpec, spec_of
from flaxcompress.train.config import TrainConfig
from flaxcompress.train.optimizer import Optimizer
from flaxcompress.train.pruning import GradualPruning, prune_gradually

STEPS = 12


def params(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    maps = {"up": {"kernel": draw(2, 5, 4), "bias": draw(2, 4)}}
    return {"layers": {"feed_forward": {"000": maps}}, "embedding": {"token": draw(7, 5)}}


def kernel(tree):
    return np.asarray(tree["layers"]["feed_forward"]["000"]["up"]["kernel"])


def run(settings, updates, start=None):
    """The parameters after every step of given updates."""
    transform, weights = prune_gradually(settings, STEPS), params() if start is None else start
    state, out, step = transform.init(weights), [], jax.jit(transform.update)
    for update in updates:
        changes, state = step(update, state, weights)
        weights = optax.apply_updates(weights, changes)
        out.append(weights)
    return out


def drawn(count=STEPS, size=0.3):
    return [jax.tree.map(lambda leaf: size * leaf, params(seed + 1)) for seed in range(count)]


def test_the_schedule_is_cubic():
    """s·(1 - (1 - (t - t₀)/n)³), Zhu & Gupta 2017, eq. 1, from an initial sparsity of nothing."""
    share = GradualPruning(sparsity=0.8, begin=0.1, end=0.6).schedule(100)
    for step in range(100):
        want = 0.8 * (1 - (1 - np.clip((step - 10) / (59 - 10), 0, 1)) ** 3)
        np.testing.assert_allclose(share(step), want, rtol=0, atol=4 * np.finfo(np.float32).eps)
    assert share(0) == 0 and float(share(59)) == float(share(99)) == np.float32(0.8)


@pytest.mark.parametrize("by", ["magnitude", "movement"])
@pytest.mark.parametrize("straight_through", [True, False])
def test_equals_a_naive_loop_over_matrices(by, straight_through):
    settings = GradualPruning(sparsity=0.6, begin=0.0, end=0.8, every=3, by=by, straight_through=straight_through)
    updates = drawn()
    got = run(settings, updates)
    share = settings.schedule(STEPS)
    dense = kernel(params()).astype(np.float64)
    scores, kept = np.zeros_like(dense), np.ones(dense.shape, bool)
    for step, update in enumerate(updates):
        if not straight_through:
            dense = np.where(kept, dense, 0.0)
        scores += dense * kernel(update)
        dense = dense + kernel(update)
        if (step % 3 == 0 or step == STEPS - 1) and share(step) > 0:
            for i in range(2):  # each weight set by itself
                rank = (np.abs(dense) if by == "magnitude" else scores)[i].ravel().copy()
                if not straight_through:
                    rank[~kept[i].ravel()] = -np.inf
                gone = np.argsort(rank, kind="stable")[: round(float(share(step)) * 20)]
                fresh = np.ones(20, bool)
                fresh[gone] = False
                kept[i] = fresh.reshape(5, 4) if straight_through else kept[i] & fresh.reshape(5, 4)
        want = np.where(kept, dense, 0.0)
        assert np.array_equal(kernel(got[step]) == 0, ~kept)
        # A masked weight is exactly zero; others gather a rounding a step.
        np.testing.assert_allclose(kernel(got[step]), want, rtol=0, atol=4 * STEPS * np.finfo(np.float32).eps)
    assert (kernel(got[-1]) == 0).sum(axis=(1, 2)).tolist() == [12, 12]


def test_only_maps_lose_weights():
    got, updates = run(GradualPruning(sparsity=0.9), drawn()), drawn()
    want = params()
    for update in updates:
        want = optax.apply_updates(want, update)
    np.testing.assert_array_equal(got[-1]["embedding"]["token"], want["embedding"]["token"])
    bias = lambda tree: tree["layers"]["feed_forward"]["000"]["up"]["bias"]  # noqa: E731
    np.testing.assert_array_equal(bias(got[-1]), bias(want))


def test_straight_through_a_weight_comes_back_and_else_it_does_not():
    """One weight is least at first, and its updates make it the largest."""
    start = params()
    held = np.ones((2, 5, 4), np.float32)
    held[:, 0, 0] = 0.01
    start["layers"]["feed_forward"]["000"]["up"]["kernel"] = jnp.asarray(held)
    grow = jax.tree.map(jnp.zeros_like, start)
    push = np.zeros((2, 5, 4), np.float32)
    push[:, 0, 0] = 0.3
    grow["layers"]["feed_forward"]["000"]["up"]["kernel"] = jnp.asarray(push)
    ends = {}
    for through in (True, False):
        settings = GradualPruning(sparsity=0.25, end=0.3, every=1, straight_through=through)
        got = run(settings, [grow] * STEPS, start)
        assert (kernel(got[1])[:, 0, 0] == 0).all()
        ends[through] = kernel(got[-1])[:, 0, 0]
    np.testing.assert_allclose(ends[True], 0.01 + 0.3 * STEPS, rtol=1e-5)
    assert (ends[False] == 0).all()


def test_movement_keeps_what_moves_away_from_zero_though_it_is_small():
    start = params()
    held = np.full((2, 5, 4), 2.0, np.float32)
    held[:, :, :2] = 0.1
    start["layers"]["feed_forward"]["000"]["up"]["kernel"] = jnp.asarray(held)
    moves = np.where(held > 1, -0.01, 0.05).astype(np.float32)  # the large shrink, the small grow
    update = jax.tree.map(jnp.zeros_like, start)
    update["layers"]["feed_forward"]["000"]["up"]["kernel"] = jnp.asarray(moves)
    kept = {
        by: kernel(run(GradualPruning(sparsity=0.5, end=0.9, by=by), [update] * STEPS, start)[-1]) != 0
        for by in ("movement", "magnitude")
    }
    assert kept["movement"][:, :, :2].all() and not kept["movement"][:, :, 2:].any()
    assert kept["magnitude"][:, :, 2:].all() and not kept["magnitude"][:, :, :2].any()


@pytest.mark.slow
def test_training_ends_sparse_and_pruning_then_stores_just_that(tmp_path):
    """Through `fit`, stopped state and all: half of every map is zero, and `Prune` by magnitude keeps the rest."""
    config = fc.ModelConfig(vocabulary=30, width=16, layers=2, heads=2, feed_forward_width=24, positions=12, classes=2)
    config = config.replace(head="sequence_classification")
    model = fc.Model.init(config, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 30, (64, 10))
    data = [
        {"input_ids": ids[i : i + 16], "attention_mask": np.ones((16, 10), bool), "labels": ids[i : i + 16, 0] % 2}
        for i in range(0, 64, 16)
    ]
    prune = GradualPruning(sparsity=0.5, every=2)
    trained = fc.fit(
        model,
        fc.Classification(),
        StepBatches(lambda number: data[number % len(data)]),
        steps=20,
        key=jax.random.key(1),
        optimizer=Optimizer(learning_rate=1e-2, prune=prune),
        out=tmp_path / "run",
    )
    flat = tree.flatten(trained.params)
    maps = [a for a in flat if a.startswith("layers/") and a.endswith("/kernel")]
    for address in maps:
        assert (np.asarray(flat[address]) == 0).sum() == round(0.5 * flat[address].size), address
    packed = fc.Prune(sparsity=0.5, by="magnitude")(trained, Context(original=trained), key=jax.random.key(0))
    assert all(isinstance(spec_of(tree.flatten(packed.params)[address]), SparseSpec) for address in maps)
    mask = np.ones((16, 10), bool)
    np.testing.assert_allclose(packed(ids[:16], mask).logits, trained(ids[:16], mask).logits, rtol=0, atol=1e-5)
    assert packed.nbytes < 0.75 * trained.nbytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must lie between 0 and 1, got 1.0"),
        ({"sparsity": -0.1}, "sparsity must lie between 0 and 1"),
        ({"sparsity": 0.5, "begin": 0.8}, "0 <= begin < end <= 1, got 0.8 and 0.7"),
        ({"sparsity": 0.5, "every": 0}, "every must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GradualPruning(**settings)


@pytest.mark.parametrize("training", [{"take_best": True, "evaluate_every": 2, "keep_best": 1}, {"ema": 0.9}])
def test_what_would_give_other_weights_is_refused(training):
    settings = {
        "model": {"load": "minilm"},
        "task": "classification",
        "data": {"train": "train.tsv", "hold_out": 10, "columns": ["text", "label"]},
        "training": {"steps": 4, "batch_size": 8, **training},
        "optimizer": {"prune": {"sparsity": 0.5}},
        "out": "out",
    }
    with pytest.raises(ValueError, match="optimizer/prune: take_best and ema"):
        TrainConfig.from_dict(settings)
    settings["training"] = {"steps": 4, "batch_size": 8}
    prune = TrainConfig.from_dict(TrainConfig.from_dict(settings).resolved()).optimizer.prune
    assert prune == GradualPruning(sparsity=0.5)

"""Optimizers from settings: equal to optax's on plain trees, and to a loop over layers on stacked ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.formats import parse_spec
from flaxcompress.train import Optimizer, thaw_model
from flaxcompress.train.leaves import describe, matrices
from flaxcompress.train.optimizer import OPTIMIZERS
from flaxcompress.train.trainable import partition

EPS = float(np.finfo(np.float32).eps)
STEPS = 6
RATE = 1e-2


def draw(shape, seed, size=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * size, jnp.float32)


def run(transform, params, gradients):
    """The parameters after every step."""
    state, out = transform.init(params), []
    advance = jax.jit(transform.update)
    for gradient in gradients:
        updates, state = advance(gradient, state, params)
        params = optax.apply_updates(params, updates)
        out.append(params)
    return out


def assert_near(got, want, ulps=8):
    """Leaf by leaf within a few roundings of the largest value."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=ulps * EPS * float(jnp.abs(b).max()) + 1e-30)


def plain(seed=0):
    """Outside of layers, as optax sees it: matrices and a bias."""
    return {"head": {"kernel": draw((5, 3), seed), "bias": draw((3,), seed + 1)}, "table": draw((7, 4), seed + 2)}


def decayed(params):
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


def lamb_of(rate):
    both = optax.chain(optax.scale_by_adam(eps=1e-6), optax.add_decayed_weights(0.1))
    groups = {
        True: optax.chain(both, optax.scale_by_trust_ratio(), optax.scale_by_learning_rate(rate)),
        False: optax.chain(optax.scale_by_adam(eps=1e-6), optax.scale_by_learning_rate(rate)),
    }
    return optax.partition(groups, decayed)


# name -> optax's own, with weight decay 0.1 of matrices at a rate
THEIRS = {
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.1, mask=decayed),
    "lion": lambda rate: optax.lion(rate, weight_decay=0.1, mask=decayed),
    "lamb": lamb_of,
    "muon": lambda rate: optax.adamw(rate, weight_decay=0.1, mask=decayed),  # no maps in layers here
}


@pytest.mark.parametrize("name", THEIRS)
def test_plain_trees_move_as_in_optax(name):
    gradients = [plain(10 + i) for i in range(STEPS)]
    ours = Optimizer(name=name, learning_rate=RATE, weight_decay=0.1, warmup=2, clip=0.5).build(STEPS)
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, 2, STEPS)
    theirs = optax.chain(optax.clip_by_global_norm(0.5), THEIRS[name](schedule))
    for got, want in zip(run(ours, plain(), gradients), run(theirs, plain(), gradients), strict=True):
        assert_near(got, want)


def test_adafactor_moves_as_in_optax():
    params = {"table": draw((130, 140), 0), "bias": draw((9,), 1)}
    gradients = [{"table": draw((130, 140), i), "bias": draw((9,), i + 50)} for i in range(STEPS)]
    ours = Optimizer(
        name="adafactor", learning_rate=RATE, weight_decay=0.0, schedule="constant", warmup=0, clip=None, b1=0.9
    )
    theirs = optax.adafactor(RATE, momentum=0.9)
    got = run(ours.build(STEPS), params, gradients)
    assert_near(got[-1], run(theirs, params, gradients)[-1])
    state = ours.build(STEPS).init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 1.2 * (130 * 140 + 9) + 300  # momentum, and no squares


def test_adafactor_factors_each_matrix_of_a_stack():
    start, gradients = draw((2, 130, 140), 0), [draw((2, 130, 140), i + 1) for i in range(3)]
    settings = Optimizer(
        name="adafactor", learning_rate=RATE, weight_decay=0.0, schedule="constant", warmup=0, clip=None
    ).build(STEPS)
    wrap = lambda leaf: {"layers": {"000": {"kernel": leaf}}}  # noqa: E731
    got = run(settings, wrap(start), [wrap(g) for g in gradients])[-1]["layers"]["000"]["kernel"]
    for i in range(2):
        want = run(optax.adafactor(RATE), {"w": start[i]}, [{"w": g[i]} for g in gradients])[-1]["w"]
        assert_near(got[i], want)
    assert sum(leaf.size for leaf in jax.tree.leaves(settings.init(wrap(start)))) < 2 * (130 + 140 + 4)


def test_muon_moves_a_stack_as_optax_moves_its_matrices():
    shape, rate = (3, 6, 4), Optimizer(learning_rate=RATE, warmup=2).learning_rates(STEPS)
    wrap = lambda leaf: {"layers": {"000": {"kernel": leaf}}}  # noqa: E731
    start, gradients = draw(shape, 0), [draw(shape, i + 1) for i in range(STEPS)]
    ours = Optimizer(name="muon", learning_rate=RATE, weight_decay=0.1, warmup=2, clip=None).build(STEPS)
    got = run(ours, wrap(start), [wrap(g) for g in gradients])[-1]["layers"]["000"]["kernel"]
    theirs = optax.contrib.muon(rate, weight_decay=0.1, consistent_rms=0.2)
    for i in range(shape[0]):
        assert_near(got[i], run(theirs, {"w": start[i]}, [{"w": g[i]} for g in gradients])[-1]["w"], ulps=64)


def test_muon_orthogonalizes_maps_in_layers_alone():
    layer = {"attention": {"000": {"query": {"kernel": draw((2, 6, 4), 0), "bias": draw((2, 4), 1)}}}}
    params = {"layers": layer, "embedding": {"token": draw((7, 4), 2)}}
    gradient = jax.tree.map(lambda leaf: draw(leaf.shape, 9), params)
    ours = Optimizer(name="muon", learning_rate=RATE, weight_decay=0.0, schedule="constant", warmup=0, clip=None)
    moved = run(ours.build(STEPS), params, [gradient])[0]
    step = jax.tree.map(lambda new, old: (old - new) / RATE, moved, params)
    kernels = step["layers"]["attention"]["000"]["query"]["kernel"]
    for kernel in kernels:  # 0.2·√max(n, m) times singular values between 0.5 and 1.5, the iteration's range
        values = np.linalg.svd(np.asarray(kernel), compute_uv=False) / (0.2 * np.sqrt(6))
        assert values.min() > 0.4 and values.max() < 1.6
    adam = run(optax.adam(RATE), {"token": params["embedding"]["token"]}, [{"token": gradient["embedding"]["token"]}])
    assert_near(moved["embedding"]["token"], adam[0]["token"])


def stacked_params(layers=3, width=8, **formats):
    config = fc.ModelConfig(
        vocabulary=20, width=width, layers=layers, heads=2, feed_forward_width=12, positions=8, formats=(), **formats
    )
    low_rank = {"kind": "low_rank", "rank": 3, "left": {"kind": "quantized", "bits": 8}, "right": {"kind": "dense"}}
    config = config.with_rule(r"layers/\d+/feed_forward/up/kernel", low_rank)
    config = config.with_rule("embedding/token", {"kind": "quantized", "bits": 8})
    return partition(thaw_model(fc.Model.init(config, key=jax.random.key(0))))[0]


def apart(params, name):
    """The same weight sets, none stacked; for Muon, which moves maps in layers alone, each in a stack of one."""
    out = {"layers": {}}
    for address, node in tree.flatten(params).items():
        leaves = jax.tree.leaves(node)
        if name == "muon" and tree.place(address) and leaves[0].ndim == 2:
            out["layers"][address] = {"kernel": jax.tree.map(lambda leaf: leaf[None], node)}
        else:
            out[address] = {address.rsplit("/", 1)[1]: node}
    return out


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_layers_move_as_they_would_one_by_one(name):
    """The optimizer sees the matrices of a stack: equal to the same settings on a tree where none is stacked."""
    params = stacked_params()
    leaves, structure = jax.tree.flatten(params)
    gradients = [structure.unflatten([draw(x.shape, 100 * i + n) for n, x in enumerate(leaves)]) for i in range(3)]
    transform = Optimizer(
        name=name, learning_rate=RATE, weight_decay=0.1, schedule="constant", warmup=0, clip=None
    ).build(9)
    got = run(transform, params, gradients)[-1]
    want = run(transform, apart(params, name), [apart(g, name) for g in gradients])[-1]
    moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), got, params)
    assert min(jax.tree.leaves(moved)) > 1e-6
    assert_near(apart(got, name), want, ulps=64)


def test_what_decays():
    params = stacked_params()
    flags = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        flags[jax.tree_util.keystr(path)] = (describe(path, leaf), leaf.shape)
    decays = {name for name, (leaf, _) in flags.items() if leaf.matrix}
    assert not any("bias" in name or "norm" in name or "scale" in name for name in decays)
    assert any(name.endswith("['embedding']['token'].latent") for name in decays)
    assert any(".left.latent" in name for name in decays) and any(".right" in name for name in decays)
    maps = {name for name, (leaf, _) in flags.items() if leaf.dense_map}
    assert maps and all("['layers']" in name for name in maps)
    assert jax.tree.structure(matrices(params)) == jax.tree.structure(params)


@pytest.mark.parametrize("ranks", [{"kind": "tensor_train", "ranks": 2}, {"kind": "cp", "rank": 2}], ids=str)
def test_a_tensors_factors_are_no_map_for_muon(ranks):
    spec = parse_spec({"rows": [2, 3], "columns": [2, 2], **ranks})
    node = spec.init(jax.random.key(0), (6, 4), jax.nn.initializers.normal(), table=False)
    params = {"layers": {"attention": {"000": {"query": {"kernel": jax.tree.map(lambda leaf: leaf[None], node)}}}}}
    found = [describe(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    assert found and all(leaf.matrix and not leaf.dense_map for leaf in found)


@pytest.mark.parametrize(
    "name, at_warmup_end, at_end",
    [
        ("cosine", 1.0, 0.1),
        ("linear", 1.0, 0.1),
        ("constant", 1.0, 1.0),
        ("rsqrt", 1.0, np.sqrt(10 / 100)),
        ("wsd", 1.0, 0.1),
    ],
)
def test_schedules(name, at_warmup_end, at_end):
    end = 0.1 if name in ("cosine", "linear", "wsd") else 0.0
    rate = Optimizer(schedule=name, warmup=10, end=end, learning_rate=2.0).learning_rates(100)
    assert float(rate(0)) == 0.0
    np.testing.assert_allclose(float(rate(5)), 1.0, rtol=1e-6)
    np.testing.assert_allclose([rate(10), rate(100)], [2.0 * at_warmup_end, 2.0 * at_end], rtol=1e-5)
    values = [float(rate(step)) for step in range(10, 101)]
    assert values == sorted(values, reverse=True)


def test_wsd_stays_and_then_falls():
    rate = Optimizer(schedule="wsd", warmup=10, cooldown=0.2, learning_rate=1.0).learning_rates(100)
    np.testing.assert_allclose([rate(10), rate(80), rate(90), rate(100)], [1.0, 1.0, 0.5, 0.0], atol=1e-6)


def test_the_usual_warmup_is_a_tenth_of_the_run():
    assert float(Optimizer(learning_rate=1.0).learning_rates(50)(5)) == 1.0
    assert float(Optimizer(learning_rate=1.0).learning_rates(100_000)(1000)) == 1.0
    assert float(Optimizer(learning_rate=1.0).learning_rates(1)(1)) == 1.0


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"name": "adam"}, ["'adam'", "adamw"]),
        ({"schedule": "cosin"}, ["cosin", "cosine"]),
        ({"learning_rate": 0.0}, ["learning_rate", "positive"]),
        ({"clip": -1.0}, ["clip"]),
        ({"b2": 1.0}, ["b2", "[0, 1)"]),
        ({"end": 2.0}, ["end", "0 … 1"]),
        ({"weight_decay": -0.1}, ["weight_decay"]),
        ({"cooldown": 0.0}, ["cooldown"]),
        ({"warmup": -1}, ["warmup"]),
        ({"name": "adafactor", "b2": 0.9}, ["adafactor has no b2"]),
        ({"name": "lion", "eps": 1e-8}, ["lion has no eps"]),
        ({"schedule": "constant", "end": 0.1}, ["'constant' has no end"]),
        ({"schedule": "rsqrt", "warmup": 0}, ["rsqrt", "at least 1"]),
        ({"learning_rate": float("nan")}, ["learning_rate"]),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(ValueError) as error:
        Optimizer(**settings)
    assert all(word in str(error.value) for word in words)


def test_a_warmup_as_long_as_the_run():
    with pytest.raises(ValueError, match=r"warmup of 100 steps.*run of 100"):
        Optimizer(warmup=100).build(100)


# ── layers apart: rates and thawing by depth ─────────────────────────────────────────────────────────────────────────


def layers_above(address, layers=3):
    """A naive count: 0 for what stands behind the layers, layers + 1 for the embedding."""
    at = tree.place(address)
    if at is None:
        return layers + 1 if address.startswith("embedding") else 0
    return layers - at.number


def moved_by(settings, count):
    """{address: the largest change of any of its values} after `count` steps of equal gradients."""
    params = stacked_params()
    gradients = [jax.tree.map(jnp.ones_like, params)] * count
    after = run(settings.build(8), params, gradients)[-1]
    change = jax.tree.map(lambda a, b: a - b, after, params)
    return {a: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(n)) for a, n in tree.flatten(change).items()}


def test_each_layer_has_its_share_of_the_rate():
    """Adam's first step of a constant gradient is the rate itself, whatever the weights."""
    options = {"learning_rate": RATE, "schedule": "constant", "warmup": 0, "weight_decay": 0.0, "clip": None}
    moved = moved_by(Optimizer(**options, layer_decay=0.5), 1)
    assert {layers_above(address) for address in moved} == {0, 1, 2, 3, 4}
    for address, size in moved.items():
        assert size == pytest.approx(RATE * 0.5 ** layers_above(address), rel=1e-4), address  # weights' own rounding


def test_layers_begin_to_move_one_after_the_other():
    options = {"learning_rate": RATE, "schedule": "constant", "warmup": 0, "weight_decay": 0.1}
    for count in (1, 2, 3, 5, 8):
        moved = moved_by(Optimizer(**options, unfreeze_every=2), count)
        for address, size in moved.items():
            assert (size > 0) == (count > 2 * layers_above(address)), (count, address)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layer_decay": 0.0}, "layer_decay must lie in"),
        ({"unfreeze_every": -1}, "unfreeze_every must not be negative"),
    ],
)
def test_depths_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Optimizer(**options)

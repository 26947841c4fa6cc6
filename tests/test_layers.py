"""How layers are put together: depth, rematerialisation, sharing by name."""

from __future__ import annotations

import functools
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.export.torch import check_folder
from flaxcompress.model import abstract_flat, init_params
from flaxcompress.nn import Stack, run
from flaxcompress.nn.stack import init_layers

EPS = float(np.finfo(np.float32).eps)
BASE = fc.ModelConfig(
    vocabulary=20, width=8, layers=4, heads=2, feed_forward_width=12, positions=8, dropout=0.0, attention_dropout=0.0
)
IDS = np.random.default_rng(0).integers(0, 20, (2, 7))


def abstract_params(config):
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def random_params(config, seed=0, size=0.4):
    """Random values everywhere: zero biases and norms of one hide mistakes."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * size, leaf.dtype)  # noqa: E731
    return tree.unflatten(jax.tree.map(draw, abstract_flat(config)))


# ── depth ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def square(config, remat, params, ids):
    return jnp.square(run(params, config, jnp.float32, ids, remat=remat).last_hidden_state).mean()


@pytest.mark.parametrize("sharing", ["own", "all", "cycle"])
def test_programs_do_not_grow_with_depth(sharing):
    """Init, forward and gradient have as many operations for 96 layers as for 8: nothing is unrolled."""

    def sizes(layers):
        sets = layers // 2 if sharing == "cycle" else None
        config = BASE.replace(layers=layers, sharing=fc.Sharing.named(sharing, layers=layers, sets=sets))
        params, key = abstract_params(config), jax.eval_shape(lambda: jax.random.key(0))
        loss = functools.partial(square, config, "none")
        programs = (jax.jit(loss), jax.jit(jax.grad(loss)))
        texts = [program.lower(params, IDS).as_text() for program in programs]
        texts.append(jax.jit(functools.partial(init_params.__wrapped__, config)).lower(key).as_text())
        return [text.count("\n") for text in texts]

    assert sizes(8) == sizes(96)


@pytest.mark.slow
def test_layers_drawn_together_equal_layers_drawn_alone():
    """The set of a number has the same weights however many sets are drawn beside it."""
    config = BASE.with_rule("layers/1/feed_forward/.*/kernel", {"kind": "low_rank", "rank": 2})
    draw = jax.jit(init_layers, static_argnums=0)
    four = draw(config, jax.random.key(3))
    two = tree.flatten({"layers": draw(config.replace(layers=2, sharing=None), jax.random.key(3))})
    flat = tree.flatten({"layers": four})
    assert len(two) == len(flat) / 2
    for address, node in two.items():
        for a, b in zip(jax.tree.leaves(flat[address]), jax.tree.leaves(node), strict=True):
            np.testing.assert_allclose(a, b, rtol=4 * EPS, atol=0)
    assert tree.signature(tree.unflatten(flat)["layers"]) == tree.signature(four)


def test_rules_that_say_the_same_make_one_run():
    config = BASE.with_rule("layers/1/.*", {"kind": "dense", "dtype": "float32"})
    assert list(abstract_params(config)["layers"]["attention"]) == ["000"]
    config = BASE.with_rule("layers/1/.*/kernel", {"kind": "dense", "dtype": "float16"})
    assert list(abstract_params(config)["layers"]["attention"]) == ["000", "001", "002"]


def stack_gradient(config, remat, layers, x, **options):
    def loss(layers):
        return jnp.square(Stack(config).apply({"params": layers}, x, remat=remat, **options).x).mean()

    return jax.grad(loss)(layers)


def test_rematerialised_gradients_are_the_same_and_need_less_memory():
    config = BASE.replace(layers=24, width=16, feed_forward_width=64, sharing=None)
    layers, x = random_params(config)["layers"], jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 16)))
    programs = {
        remat: jax.jit(functools.partial(stack_gradient, config, remat)).lower(layers, x).compile()
        for remat in ("none", "dots", "full")
    }
    memory = {remat: program.memory_analysis().temp_size_in_bytes for remat, program in programs.items()}
    assert memory["full"] < 0.4 * memory["none"] and memory["full"] < memory["dots"] < 0.9 * memory["none"]
    want, *others = (program(layers, x) for program in programs.values())
    for got in others:
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=64 * config.layers * EPS * max(np.abs(b).max(), 1e-3))


def test_one_layer_and_dropout_rematerialise_too():
    """The keys are folded inside, so both computations drop the same."""
    config = BASE.replace(layers=1, dropout=0.5, sharing=None)
    layers, x = random_params(config)["layers"], jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 8)))
    options = {"deterministic": False, "rngs": {"dropout": jax.random.key(1)}}
    full, none = (
        jax.jit(functools.partial(stack_gradient, config, remat, **options))(layers, x) for remat in ("full", "none")
    )
    for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(none), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=64 * EPS * max(np.abs(b).max(), 1e-3))


def test_unknown_kinds_of_rematerialisation():
    with pytest.raises(ValueError, match=r"remat: unknown kind 'dot'.*did you mean 'dots'"):
        run(random_params(BASE), BASE, jnp.float32, IDS, remat="dot")


# ── sharing by name ──────────────────────────────────────────────────────────────────────────────────────────────────

EACH, ONE = (0, 1, 2, 3, 4, 5), (0,) * 6
NAMED = {  # (name, sets): the map of shared matrices, from the figures of Takase & Kiyono 2021
    ("own", None): EACH,
    ("all", None): ONE,
    ("sequence", 3): (0, 0, 1, 1, 2, 2),
    ("cycle", 3): (0, 1, 2, 0, 1, 2),
    ("cycle_rev", 3): (0, 1, 2, 2, 1, 0),
    ("cycle_rev", 2): (0, 1, 0, 1, 1, 0),
    ("cycle_rev", 6): EACH,
    ("pairs", None): (0, 0, 1, 1, 2, 2),
}


@pytest.mark.parametrize(("name", "sets"), NAMED)
def test_named_maps(name, sets):
    want = NAMED[name, sets]
    assert fc.Sharing.named(name, layers=6, sets=sets) == fc.Sharing(attention=want, feed_forward=want, norms=want)
    own_norms = fc.Sharing.named(name, layers=6, sets=sets, norms="own", cross_attention=True)
    assert own_norms == fc.Sharing(attention=want, feed_forward=want, norms=EACH, cross_attention=want)


def test_one_part_alone_is_shared():
    assert fc.Sharing.named("attention", layers=6) == fc.Sharing(attention=ONE, feed_forward=EACH, norms=EACH)
    assert fc.Sharing.named("feed_forward", layers=6) == fc.Sharing(attention=EACH, feed_forward=ONE, norms=EACH)


@pytest.mark.parametrize("layers", [1, 2, 5, 7, 12])
@pytest.mark.parametrize("name", ["sequence", "cycle", "cycle_rev"])
def test_any_number_of_sets_is_stored_whole(name, layers):
    for sets in range(1, layers + 1):
        assert fc.Sharing.named(name, layers=layers, sets=sets).sets("attention") == sets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cicle"}, "unknown name 'cicle'.*did you mean 'cycle'"),
        ({"name": "cycle"}, "'cycle' needs sets, from 1 to the 6 layers, got None"),
        ({"name": "cycle", "sets": 0}, "got 0"),
        ({"name": "sequence", "sets": 7}, "got 7"),
        ({"name": "cycle_rev", "sets": 2.0}, "got 2.0"),
        ({"name": "all", "sets": 2}, "stores 1 sets, got 2"),
        ({"name": "pairs", "sets": 2}, "stores 3 sets, got 2"),
        ({"name": "all", "norms": "mine"}, "unknown norms 'mine'.*known: own, shared"),
    ],
)
def test_names_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        fc.Sharing.named(**options, layers=6)


@pytest.mark.parametrize(
    "sharing", ["pairs", {"name": "cycle", "sets": 2, "norms": "own"}, {"name": "own", "cross_attention": True}]
)
def test_json_may_say_the_name(sharing):
    config = fc.ModelConfig.from_json({**BASE.to_json(), "sharing": sharing})
    options = {"name": sharing} if isinstance(sharing, str) else sharing
    assert config.sharing == fc.Sharing.named(**options, layers=4)
    assert fc.ModelConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match=r"config/sharing: unknown key 'set'.*did you mean 'sets'"):
        fc.ModelConfig.from_json({**BASE.to_json(), "sharing": {"name": "cycle", "set": 2}})


@pytest.mark.parametrize("name", ["all", "attention", "feed_forward", "cycle_rev", "pairs"])
def test_a_named_sharing_is_stored_once_and_runs_in_pytorch(name, tmp_path):
    sets = 2 if name == "cycle_rev" else None
    pytest.importorskip("transformers")
    config = BASE.replace(sharing=fc.Sharing.named(name, layers=4, sets=sets))
    model = fc.Model(params=random_params(config), config=config)
    fc.save(model, tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert (
        sum(tensor.size for tensor in stored.values())
        == model.parameters
        < fc.Model(random_params(BASE), BASE).parameters
    )
    kernels = [n for n in stored if n.endswith("attention/query/kernel")]
    assert len(kernels) == config.sharing.sets("attention")
    assert check_folder(model, tmp_path / "m") <= 1e-4
    network = import_module("flaxcompress.export.modeling_flaxcompress").FlaxCompressModel.from_pretrained(
        tmp_path / "m"
    )
    assert sum(p.numel() for p in network.parameters()) == model.parameters


# ── widths ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def in_pytorch(config, folder, seed=0):
    """A random model, saved, loaded again and compared with PyTorch; both must be equal."""
    pytest.importorskip("transformers")
    model = fc.Model(params=random_params(config, seed), config=config)
    fc.save(model, folder)
    again = fc.load(folder)
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, tree.flatten(model.params), tree.flatten(again.params))
    assert check_folder(model, folder) <= 1e-4
    return model


@pytest.mark.parametrize("gated", [False, True])
def test_layers_of_different_widths(gated, tmp_path):
    """The widths belong to the weight sets; PyTorch computes the same, and so do narrow layers padded with zeros."""
    sharing = fc.Sharing(attention=(0, 0, 0, 0), feed_forward=(0, 1, 1, 2), norms=(0, 1, 2, 3))
    config = BASE.replace(feed_forward_width=(5, 12, 7), sharing=sharing, gated=gated)
    model = in_pytorch(config, tmp_path / "m")
    flat = tree.flatten(model.params)
    assert [flat[f"layers/{n}/feed_forward/up/kernel"].shape for n in range(3)] == [(8, 5), (8, 12), (8, 7)]
    kernels = (2 + gated) * 8 * (5 + 12 + 7)
    assert sum(n.size for a, n in flat.items() if "feed_forward" in a and a.endswith("kernel")) == kernels
    padded = {}
    for address, node in flat.items():
        if "feed_forward/" in address and "norms" not in address:
            axis = 0 if address.endswith("down/kernel") else node.ndim - 1
            short = 0 if address.endswith("down/bias") else 12 - node.shape[axis]
            node = jnp.pad(node, [(0, short if i == axis else 0) for i in range(node.ndim)])
        padded[address] = node
    wide = fc.Model(params=tree.unflatten(padded), config=config.replace(feed_forward_width=12))
    got, want = model(IDS).last_hidden_state, wide(IDS).last_hidden_state
    np.testing.assert_allclose(got, want, rtol=0, atol=64 * 4 * EPS * np.abs(want).max())
    with pytest.raises(ValueError, match=r"stock bert layers have one feed_forward_width.*\[5, 12, 7\]"):
        fc.export(model, tmp_path / "stock", format="torch-dense")


def test_equal_widths_are_one_width():
    assert BASE.replace(feed_forward_width=(12, 12, 12, 12)) == BASE


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((5, 7), "one entry for each of 4 sets, got 2"),
        ((5,), "one entry for each of 4 sets, got 1"),
        ((5, 7, 0, 3), "positive integer, or several"),
        ((5, 7, 2.0, 3), "positive integer, or several"),
        (0, "positive integer, or several, got 0"),
    ],
)
def test_widths_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        BASE.replace(feed_forward_width=given)

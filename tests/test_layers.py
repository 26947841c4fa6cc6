"""How layers are put together: depth, rematerialisation, sharing by name."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick
from safetensors.numpy import load_file

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.compress.walk import LayerWalk
from flaxcompress.export.merge import merge_deltas
from flaxcompress.export.torch import check_folder
from flaxcompress.formats import materialize, parse_spec
from flaxcompress.model import abstract_flat, init_params
from flaxcompress.nn import Stack, run
from flaxcompress.nn.initializer import kernel_initializer
from flaxcompress.nn.stack import init_layers
from flaxcompress.train.rates import label

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

    def draw(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        values = rng.normal(size=leaf.shape) * size if floating else rng.integers(-99, 99, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return tree.unflatten(jax.tree.map(draw, abstract_flat(config)))


# ── depth ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def square(config, remat, params, ids):
    return jnp.square(run(params, config, jnp.float32, ids, remat=remat).last_hidden_state).mean()


@pytest.mark.parametrize("sharing", quick(["own", "all", "cycle"], ["cycle"]))
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


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_that_are_unrolled_have_the_same_gradient_without_a_loop(remat):
    config = BASE.replace(layers=6, sharing=fc.Sharing.named("cycle", layers=6, sets=3))
    layers, x = random_params(config)["layers"], jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 8)))
    programs = {
        unroll: jax.jit(functools.partial(stack_gradient, config, remat, unroll=unroll)).lower(layers, x).compile()
        for unroll in (1, 2, 6)
    }
    loops = [program.as_text().count(" while(") for program in programs.values()]
    assert min(loops[:2]) > loops[2] == 0
    want, *others = (program(layers, x) for program in programs.values())
    for got in others:
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=64 * config.layers * EPS * max(np.abs(b).max(), 1e-3))


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


@pytest.mark.parametrize(
    "name", quick(["all", "attention", "feed_forward", "cycle_rev", "pairs"], ["attention", "cycle_rev"])
)
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


@pytest.mark.parametrize("gated", quick([False, True], [True]))
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
    with pytest.raises(ValueError, match=r"stock bert folders have one feed_forward_width.*\[5, 12, 7\]"):
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


# ── add and norm ─────────────────────────────────────────────────────────────────────────────────────────────────────

CROSSING = fc.Sharing.own(4, cross_attention=True)
PLACES = {
    "post": {},
    "post-scaled": {"residual_scale": 1.7},
    "pre": {"norm_place": "pre", "final_norm": True},
    "pre-first": {"norm_place": "pre", "first_norm": False},
    "pre-scaled": {"norm_place": "pre", "residual_scale": 0.6},
    "sandwich": {"norm_place": "sandwich", "norm": "rms"},
    "sandwich-shared-norms": {"norm_place": "sandwich", "sharing": fc.Sharing.named("all", layers=4)},
    "one-norm": {"norm_place": "pre", "parallel": "one_norm"},
    "two-norms": {"norm_place": "pre", "parallel": "two_norms"},
    "sandwich-one-norm": {"norm_place": "sandwich", "parallel": "one_norm"},
    "deepnorm": None,
}


def place_config(name):
    return BASE.with_deepnorm() if PLACES[name] is None else BASE.replace(**PLACES[name])


def plain_layers(config, flat, x):
    """The layers one after the other, in float64: attention and feed-forward of the plain kind, norms by formula."""
    w = {a: np.asarray(node, np.float64) for a, node in flat.items()}

    def norm(x, at):
        if f"{at}/scale" not in w:
            return x
        centred = x if config.norm == "rms" else x - x.mean(-1, keepdims=True)
        y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_epsilon) * w[f"{at}/scale"]
        return y + w.get(f"{at}/bias", 0)

    def linear(x, at):
        return x @ w[f"{at}/kernel"] + w[f"{at}/bias"]

    def attention(x, at):
        q, k, v = (linear(x, f"{at}/{n}").reshape(*x.shape[:2], 2, 4) for n in ("query", "key", "value"))
        scores = np.exp(np.einsum("bthd,bshd->bhts", q, k) / 2)
        y = np.einsum("bhts,bshd->bthd", scores / scores.sum(-1, keepdims=True), v)
        return linear(y.reshape(x.shape), f"{at}/output")

    def feed_forward(x, at):
        y = linear(x, f"{at}/up")
        return linear(0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))), f"{at}/down")

    for layer in range(config.layers):
        at = {part: f"layers/{getattr(config.sharing, part)[layer]}/{part}" for part in config.sharing.parts}
        alpha, norms = config.residual_scale, at["norms"]
        a = lambda x: attention(x, at["attention"])  # noqa: B023, E731
        f = lambda x: feed_forward(x, at["feed_forward"])  # noqa: B023, E731
        n_a, n_f = f"{norms}/attention", f"{norms}/feed_forward"
        if config.parallel != "none":
            y_a, y_f = a(norm(x, n_a)), f(norm(x, n_a if config.parallel == "one_norm" else n_f))
            if config.norm_place == "sandwich":
                y_a, y_f = norm(y_a, f"{n_a}_after"), norm(y_f, f"{n_f}_after")
            x = alpha * x + y_a + y_f
        elif config.norm_place == "post":
            x = norm(alpha * x + a(x), n_a)
            x = norm(alpha * x + f(x), n_f)
        else:
            after = (lambda y, at: norm(y, f"{at}_after")) if config.norm_place == "sandwich" else (lambda y, at: y)
            x = alpha * x + after(a(norm(x, n_a)), n_a)
            x = alpha * x + after(f(norm(x, n_f)), n_f)
    return x


@pytest.mark.parametrize(
    "name", quick(PLACES, ["post-scaled", "pre-first", "sandwich", "two-norms", "sandwich-one-norm", "deepnorm"])
)
def test_places_of_norms_equal_their_formulas_and_pytorch(name, tmp_path):
    config = place_config(name).replace(norm_epsilon=1e-6)
    model = in_pytorch(config, tmp_path / "m")
    x = np.random.default_rng(2).normal(size=(2, 5, 8)).astype(np.float32)
    got = jax.jit(lambda layers, x: Stack(config).apply({"params": layers}, x).x)(model.params["layers"], x)
    want = plain_layers(config, tree.flatten(model.params), x.astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=0, atol=256 * config.layers * EPS * np.abs(want).max())
    for other in PLACES:
        if other != name:
            assert place_config(other) != config
    back = fc.ModelConfig.from_json(config.to_json())
    assert back == config


def test_a_decoder_in_a_sandwich_norms_every_sublayer_twice():
    decoder = BASE.replace(vocabulary=0, pooler=False, causal=True, norm_place="sandwich", sharing=CROSSING)
    names = {a.split("/", 3)[-1] for a in abstract_flat(BASE.replace(decoder=decoder)) if "decoder/layers/0/norms" in a}
    parts = ("attention", "cross_attention", "feed_forward")
    assert names == {f"norms/{p}{end}/{leaf}" for p in parts for end in ("", "_after") for leaf in ("scale", "bias")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_place": "sandwhich"}, "unknown norm_place 'sandwhich'.*did you mean 'sandwich'"),
        ({"parallel": "one_norms"}, "unknown parallel 'one_norms'.*did you mean 'one_norm'"),
        ({"parallel": "one_norm"}, "'one_norm' needs norms before sublayers"),
        ({"parallel": "two_norms", "norm_place": "pre", "sharing": CROSSING}, "and a map of cross_attention"),
        ({"parallel": "one_norm", "norm_place": "pre", "first_norm": False}, "first_norm=False makes sense"),
        ({"residual_scale": 0.0}, "residual_scale must be positive"),
        ({"layer_dropout": 1.0}, r"layer_dropout must lie in \[0, 1\)"),
        ({"initializer": "xaver"}, "unknown initializer 'xaver'.*did you mean 'xavier'"),
        ({"initializer_gain": -1.0}, "initializer_gain must be positive"),
    ],
)
def test_additions_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        BASE.replace(**change)


@pytest.mark.parametrize("name", ["pre", "sandwich", "deepnorm"])
def test_stock_layers_cannot_say_other_places(name, tmp_path):
    pytest.importorskip("transformers")
    model = fc.Model(params=random_params(place_config(name)), config=place_config(name))
    with pytest.raises(ValueError, match=r"stock bert folders have .*, not .*save the model instead"):
        fc.export(model, tmp_path / "stock", format="torch-dense")


def test_deepnorm_constants_are_those_of_the_paper():
    """Wang et al. 2022, figure 2; with 18 layers on both sides, as in the paper's translation models."""
    alone = BASE.replace(layers=100, sharing=None).with_deepnorm()
    assert alone.residual_scale == pytest.approx(200**0.25) and alone.initializer_gain == pytest.approx(800**-0.25)
    sharing = fc.Sharing.own(18, cross_attention=True)
    decoder = BASE.replace(layers=18, vocabulary=0, pooler=False, causal=True, sharing=sharing)
    pair = BASE.replace(layers=18, sharing=None, decoder=decoder).with_deepnorm()
    assert pair.residual_scale == pytest.approx(0.81 * 18 ** (5 / 16))
    assert pair.initializer_gain == pytest.approx(0.87 * 18 ** (-5 / 16))
    assert pair.decoder is not None
    assert pair.decoder.residual_scale == pytest.approx(54**0.25)
    assert pair.decoder.initializer_gain == pytest.approx(216**-0.25)
    assert fc.ModelConfig.from_json(pair.to_json()) == pair


# ── stochastic depth ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_layers_are_dropped_example_by_example():
    """An example that loses both sublayers passes unchanged; what is kept is divided by its probability."""
    config = BASE.replace(norm_place="pre", layer_dropout=0.6, layers=3, sharing=None)
    layers = random_params(config)["layers"]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(400, 3, 8)), jnp.float32)

    @jax.jit
    def run_stack(key):
        options = {"deterministic": False, "rngs": {"dropout": key}, "need_hidden_states": True}
        out = Stack(config).apply({"params": layers}, x, **options)
        return jnp.concatenate([out.hidden_states, out.x[None]])

    states = np.asarray(run_stack(jax.random.key(0)))
    for layer, rate in enumerate((0.2, 0.4, 0.6)):  # linear in depth, the last layer's being the config's
        same = (states[layer] == states[layer + 1]).all((1, 2)).mean()
        want = rate**2  # attention and feed-forward are drawn apart
        assert abs(same - want) < 5 * math.sqrt(want * (1 - want) / 400)
    np.testing.assert_array_equal(states, run_stack(jax.random.key(0)))
    assert not np.array_equal(states, run_stack(jax.random.key(1)))


def test_the_expectation_of_a_dropped_layer_is_the_layer():
    """Of one parallel layer, where the expectation passes no nonlinearity after the draw; none without training."""
    config = BASE.replace(layers=1, norm_place="pre", parallel="one_norm", layer_dropout=0.3, sharing=None)
    layers = random_params(config)["layers"]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 8)), jnp.float32)
    many = jnp.broadcast_to(x, (4000, 3, 8))
    plain = jax.jit(lambda x: Stack(config).apply({"params": layers}, x).x)
    options = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}
    dropped = np.asarray(jax.jit(lambda x: Stack(config).apply({"params": layers}, x, **options).x)(many))
    without = jax.jit(lambda x: Stack(config.replace(layer_dropout=0.0)).apply({"params": layers}, x).x)
    np.testing.assert_array_equal(plain(x), without(x))
    error = np.abs(dropped.mean(0) - plain(x)[0])
    assert (error <= 5 * dropped.std(0) / math.sqrt(len(dropped)) + 1e-5).all()
    assert dropped.std(0).max() > 0.1


def test_pytorch_drops_layers_while_training(tmp_path):
    torch = pytest.importorskip("torch")
    config = BASE.replace(norm_place="pre", layer_dropout=0.6, layers=3, sharing=None)
    in_pytorch(config, tmp_path / "m")
    kind = import_module("flaxcompress.export.modeling_flaxcompress").FlaxCompressModel
    network = kind.from_pretrained(tmp_path / "m").train()
    torch.manual_seed(0)
    with torch.no_grad():
        ids = torch.tensor(IDS[:1]).expand(400, -1)
        states = network(ids, output_hidden_states=True).hidden_states
    for layer, want in enumerate((0.04, 0.16, 0.36)):
        same = (states[layer] == states[layer + 1]).all(-1).all(-1).float().mean().item()
        assert abs(same - want) < 5 * math.sqrt(want * (1 - want) / 400)


# ── initialisers ─────────────────────────────────────────────────────────────────────────────────────────────────────

WIDE = BASE.replace(vocabulary=500, width=64, feed_forward_width=200, heads=4, initializer_range=0.05, segments=2)


def xavier(n, m):
    return math.sqrt(2 / (n + m))


@pytest.mark.parametrize(
    "kind", quick(["normal", "truncated_normal", "xavier", "deepnorm"], ["truncated_normal", "deepnorm"])
)
def test_deviations_of_initialisers(kind):
    """Of a sample of n values, a normal one's deviation is off by σ/√(2n); the mean by σ/√n."""
    config = WIDE.replace(initializer=kind, initializer_gain=0.3, layers=2, sharing=None)
    flat = tree.flatten(jax.jit(init_params.__wrapped__, static_argnums=0)(config, jax.random.key(0, impl="rbg")))
    for address, node in flat.items():
        if node.ndim < 2:
            np.testing.assert_array_equal(node, address.endswith("scale"))
            continue
        want = 0.05
        if address.endswith("kernel") and kind in ("xavier", "deepnorm"):
            scaled = kind == "deepnorm" and address.startswith("layers") and "query" not in address
            want = xavier(*node.shape) * (0.3 if scaled and "key" not in address.split("/")[-2] else 1)
        assert abs(node.std() - want) < 5 * want / math.sqrt(2 * node.size), address
        assert abs(node.mean()) < 5 * want / math.sqrt(node.size), address
        largest = 2 * want / 0.8796 if kind == "truncated_normal" else 6 * want
        assert np.abs(node).max() <= largest, address


def test_fans_are_those_of_the_whole_matrix():
    """However a matrix is stored, its entries have the deviation asked for."""
    n, m, rank = 300, 200, 16
    draw = kernel_initializer(WIDE.replace(initializer="xavier"), "layers/0/feed_forward/up", n, m)
    node = parse_spec({"kind": "low_rank", "rank": rank}).init(jax.random.key(0), (n, m), draw, table=False)
    # The entries of a product of rank R are not independent: they hold as much as R·min(n, m) values do.
    assert abs(np.std(node.materialize()) - xavier(n, m)) < 5 * xavier(n, m) / math.sqrt(rank * min(n, m))


def activations(config, layers=96):
    """What goes into each layer and what comes out of the last, in [L + 1, tokens, D], from the layers' own start."""
    config = config.replace(width=64, heads=4, feed_forward_width=256, layers=layers, sharing=None)
    config = config.with_deepnorm() if config.initializer == "deepnorm" else config
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 64)), jnp.float32)

    @jax.jit
    def states(key):
        out = Stack(config).apply({"params": init_layers(config, key)}, x, need_hidden_states=True)
        return jnp.concatenate([out.hidden_states, out.x[None]]).reshape(layers + 1, -1, 64)

    return np.asarray(states(jax.random.key(0, impl="rbg")), np.float64)


@pytest.mark.slow
def test_variance_through_96_layers():
    """Before any training, as theory has it, N layers being 2N sublayers.

    Norms before sublayers: each adds the same variance to the stream, so the variance grows linearly (Xiong et al.
    2020, lemma 2). Norms after: it is 1. There a sublayer moves the stream, relative to it, by f(x)/αx, whose square is
    β⁴v/α² with v the variance of f without β. Without constants the squares add up to 2N·v; with DeepNorm's, α² = √(2N)
    and β⁴ = 1/(8N), to v/(4√(2N)): bounded, and half as much at four times the depth.
    """
    pre = activations(BASE.replace(norm_place="pre", initializer="xavier")).var(-1).mean(-1)
    slope, start = np.polyfit(np.arange(97), pre, 1)
    assert slope > 0 and np.abs(pre - (start + slope * np.arange(97))).max() < 0.1 * pre[-1]

    def moved(kind, layers):
        states = activations(BASE.replace(initializer=kind), layers)[1:]
        np.testing.assert_allclose(states.var(-1), 1, rtol=1e-3)
        return np.square(np.diff(states, axis=0)).mean((1, 2)).sum()

    deep, plain = ([moved(kind, layers) for layers in (24, 96)] for kind in ("deepnorm", "xavier"))
    assert 0.35 < deep[1] / deep[0] < 0.7 and 3 < plain[1] / plain[0] < 5.5


# ── low-rank deltas ──────────────────────────────────────────────────────────────────────────────────────────────────

TIED = BASE.replace(sharing=fc.Sharing.named("all", layers=4, norms="own"))
ADAPTED = {
    "all-targets": TIED.replace(deltas=fc.Deltas(rank=2, alpha=3.0)),
    "queries": TIED.replace(deltas=fc.Deltas(rank=1, targets=("attention/query", "feed_forward/down"))),
    "gated-cycle": BASE.replace(
        gated=True,
        sharing=fc.Sharing.named("cycle", layers=4, sets=2),
        deltas=fc.Deltas(rank=2, targets=("attention/(key|value)", "feed_forward/.*")),
    ),
    "shared-deltas": BASE.replace(
        sharing=fc.Sharing(attention=(0, 0, 0, 0), feed_forward=(0, 1, 2, 3), norms=(0, 0, 0, 0), deltas=(0, 1, 0, 1)),
        deltas=fc.Deltas(rank=2),
    ),
    "biases": BASE.replace(
        sharing=fc.Sharing.named("cycle", layers=4, sets=2), deltas=fc.Deltas(rank=2, bias=True), output_bias=False
    ),
    "formats": TIED.replace(deltas=fc.Deltas(rank=3))
    .with_rule("layers/0/(attention|feed_forward)/.*/kernel", {"kind": "quantized", "bits": 8})
    .with_rule("layers/2/deltas/.*", {"kind": "dense", "dtype": "float16"}),
}


def test_deltas_change_nothing_at_first():
    config = ADAPTED["all-targets"]
    draw = jax.jit(init_layers, static_argnums=0)
    layers = draw(config, jax.random.key(0, impl="rbg"))
    ups = [n for a, n in tree.flatten({"layers": layers}).items() if a.endswith("/up")]
    downs = [n for a, n in tree.flatten({"layers": layers}).items() if a.endswith("/down")]
    assert len(ups) == len(downs) == 4 * 6
    assert all((np.asarray(n) == 0).all() for n in ups) and all(np.abs(n).min() > 0 for n in downs)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 8)), jnp.float32)
    run_stack = lambda config, layers: jax.jit(Stack(config).apply)({"params": layers}, x).x  # noqa: E731
    without = {part: runs for part, runs in layers.items() if part != "deltas"}
    np.testing.assert_array_equal(run_stack(config, layers), run_stack(TIED, without))


@pytest.mark.parametrize("name", quick(ADAPTED, ["gated-cycle", "shared-deltas", "formats", "biases"]))
def test_deltas_equal_layers_of_their_own_and_pytorch(name, tmp_path):
    """Base and delta multiplied out, layer by layer, compute the same without any; a stock BERT too."""
    pytest.importorskip("transformers")
    config = ADAPTED[name]
    model = fc.Model(params=random_params(config), config=config)
    assert fc.ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    fc.save(model, tmp_path / "m")
    again = fc.load(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, tree.flatten(model.params), tree.flatten(again.params))
    assert check_folder(again, tmp_path / "m") <= (2e-3 if name == "formats" else 1e-4)
    merged = merge_deltas(model)
    assert merged.config.deltas is None and not any("deltas" in a for a in tree.flatten(merged.params))
    assert tree.signature(merged.params) == tree.signature(abstract_params(merged.config))
    flat, plain = tree.flatten(model.params), tree.flatten(merged.params)
    for layer in range(4):  # the sum, from the addresses alone
        at = {part: f"layers/{getattr(config.sharing, part)[layer]}/{part}" for part in config.sharing.parts}
        base = np.asarray(materialize(flat[f"{at['feed_forward']}/down/kernel"]), np.float64)
        down, up = (np.asarray(flat[f"{at['deltas']}/feed_forward/down/{side}"], np.float64) for side in ("down", "up"))
        want = base + config.deltas.scale * down @ up
        got = materialize(plain[f"layers/{layer}/feed_forward/down/kernel"])
        np.testing.assert_allclose(got, want, rtol=0, atol=16 * EPS * np.abs(want).max())
        if config.deltas.bias:
            want = flat[f"{at['feed_forward']}/down/bias"] + flat[f"{at['deltas']}/feed_forward/down/bias"]
            np.testing.assert_array_equal(plain[f"layers/{layer}/feed_forward/down/bias"], want)
            assert f"{at['deltas']}/attention/output/bias" not in flat
    got, want = model(IDS).last_hidden_state, merged(IDS).last_hidden_state
    np.testing.assert_allclose(got, want, rtol=0, atol=256 * 4 * EPS * np.abs(want).max())
    if not config.gated and config.output_bias:
        assert check_folder(model, fc.export(model, tmp_path / "stock", format="torch-dense")) <= 2e-3


def test_gradients_reach_base_and_deltas():
    """The gradient of a shared base is the sum over layers of those of the merged weights; a delta's is its layer's."""
    config = ADAPTED["all-targets"]
    params = tree.update(random_params(config), lambda a, node: node + 1 if a.endswith("scale") else node)
    model = fc.Model(params=params, config=config)
    merged, c = merge_deltas(model), np.random.default_rng(1).normal(size=(*IDS.shape, 8))

    def gradient(model):
        def loss(params):
            return (run(params, model.config, jnp.float32, IDS).last_hidden_state * c).sum()

        return tree.flatten(jax.jit(jax.grad(loss))(model.params))

    got, want, flat = gradient(model), gradient(merged), tree.flatten(model.params)
    for name in ("attention/query", "attention/output", "feed_forward/up"):
        each = [np.asarray(want[f"layers/{n}/{name}/kernel"], np.float64) for n in range(4)]
        # Rounding is relative to the cotangents, of which attention's softmax leaves little.
        atol = 256 * EPS * np.abs(c).max()
        assert min(np.abs(g).max() for g in each) > 20 * atol
        np.testing.assert_allclose(got[f"layers/0/{name}/kernel"], sum(each), rtol=0, atol=atol)
        for n, g in enumerate(each):
            down, up = (np.asarray(flat[f"layers/{n}/deltas/{name}/{side}"], np.float64) for side in ("down", "up"))
            np.testing.assert_allclose(got[f"layers/{n}/deltas/{name}/down"], 1.5 * g @ up.T, rtol=0, atol=4 * atol)
            np.testing.assert_allclose(got[f"layers/{n}/deltas/{name}/up"], 1.5 * down.T @ g, rtol=0, atol=4 * atol)


def test_counts_of_deltas():
    """R·(n + m) for each linear map of each layer, in parameters and in operations per token."""
    config = ADAPTED["all-targets"]
    added = 2 * (4 * (8 + 8) + 2 * (8 + 12))

    def cost(config):
        return fc.profile(fc.Model(params=abstract_params(config), config=config), length=8)

    assert cost(config).params - cost(TIED).params == 4 * added
    assert cost(config).flops_per_token - cost(TIED).flops_per_token == 2 * 4 * added


def test_a_decoders_cross_attention_has_deltas(tmp_path):
    pytest.importorskip("transformers")
    sharing = fc.Sharing.named("all", layers=4, cross_attention=True)
    deltas = fc.Deltas(rank=2, targets=("cross_attention/.*", "attention/query"))
    decoder = BASE.replace(vocabulary=0, pooler=False, causal=True, sharing=sharing, deltas=deltas)
    config = TIED.replace(decoder=decoder, pooler=False, head="seq2seq_lm", deltas=fc.Deltas(rank=1))
    model = fc.Model(params=random_params(config), config=config)
    names = {a for a in tree.flatten(model.params) if a.startswith("decoder/layers/3/deltas")}
    maps = ("cross_attention/query", "cross_attention/key", "cross_attention/value", "cross_attention/output")
    assert names == {f"decoder/layers/3/deltas/{n}/{s}" for n in (*maps, "attention/query") for s in ("down", "up")}
    merged = merge_deltas(model)
    target = np.random.default_rng(3).integers(0, 20, (2, 5))
    logits = [
        jax.jit(lambda params, m=m: run(params, m.config, jnp.float32, IDS, decoder_ids=target).logits)(m.params)
        for m in (model, merged)
    ]
    np.testing.assert_allclose(*logits, rtol=0, atol=1024 * EPS * np.abs(logits[0]).max())
    fc.save(model, tmp_path / "m")
    import torch

    kind = import_module("flaxcompress.export.modeling_flaxcompress").FlaxCompressForConditionalGeneration
    with torch.no_grad():
        theirs = kind.from_pretrained(tmp_path / "m").eval()(torch.tensor(IDS), decoder_input_ids=torch.tensor(target))
    np.testing.assert_allclose(logits[0], theirs.logits, rtol=0, atol=1e-4 * np.abs(logits[0]).max())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fc.Deltas(rank=0), "rank must be a positive integer"),
        (lambda: fc.Deltas(rank=1, alpha=0.0), "alpha must be positive"),
        (lambda: fc.Deltas(rank=1, targets=("(",)), "is not a regular expression"),
        (lambda: fc.Deltas(rank=1, targets="attention/query"), "must be a list of patterns"),
        (
            lambda: abstract_params(TIED.replace(deltas=fc.Deltas(rank=1, targets=("attention/querry",)))),
            "deltas/targets: 'attention/querry' matches no.*did you mean 'attention/query'",
        ),
        (
            lambda: BASE.replace(sharing=dataclasses.replace(fc.Sharing.own(4), deltas=(0, 1, 2, 3))),
            "there are no deltas",
        ),
        (
            lambda: BASE.replace(
                feed_forward_width=(3, 4, 5, 6),
                sharing=fc.Sharing(attention=(0,) * 4, feed_forward=(0, 1, 2, 3), norms=(0,) * 4, deltas=(0,) * 4),
                deltas=fc.Deltas(rank=1),
            ),
            "set 0 is used by layers whose feed_forward_width differs: 3 and 4",
        ),
    ],
)
def test_deltas_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_walking_layer_by_layer_sees_deltas():
    """Rounding and the like run one layer after the other: they must arrive where the model does."""
    config = ADAPTED["shared-deltas"].replace(pooler=False)
    model = fc.Model(params=random_params(config), config=config)
    walk = LayerWalk(config, tree.View(model.params), [(IDS, np.ones_like(IDS, bool))])
    stage = next(iter(walk.stages(label="walk")))
    want = model(IDS).last_hidden_state
    np.testing.assert_allclose(walk.outcome(stage, {})[0], want, rtol=0, atol=256 * 4 * EPS * np.abs(want).max())


def test_deltas_learn_at_a_rate_of_their_own():
    """A rate relative to the size of a factor that starts at zero would leave it there."""
    config = ADAPTED["queries"]
    labels = jax.tree_util.tree_map_with_path(label, abstract_params(config)["layers"])
    assert set(jax.tree.leaves(labels["deltas"])) == {"vectors"}
    assert labels["attention"]["000"]["query"]["kernel"] == "weights"

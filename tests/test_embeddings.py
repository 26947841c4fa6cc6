"""Models that are drawn, not loaded, with embedding tables and kernels in every kind of small form."""

from __future__ import annotations

import functools
import json
import math
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.export.torch import check_folder
from flaxcompress.formats import materialize, parse_spec, stored_values
from flaxcompress.nn import run
from flaxcompress.train.trainable import combine, freeze_model, partition, thaw_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

V, D = 101, 24
BASE = fc.ModelConfig(
    vocabulary=V,
    width=D,
    layers=2,
    heads=2,
    feed_forward_width=32,
    positions=12,
    head="masked_lm",
    segments=0,
    pooler=False,
)
TABLE = "embedding/token"
RANK = {"kind": "low_rank", "rank": 4}
TRAIN = {"kind": "tensor_train", "rows": [4, 5, 6], "columns": [2, 3, 4], "ranks": [5, 5]}
SQUARE = {"kind": "tensor_train", "rows": [4, 6], "columns": [6, 4], "ranks": [6]}
CP = {"kind": "cp", "rows": [10, 11], "columns": [4, 6], "rank": 6}
TUCKER = {"kind": "tucker", "rows": [101], "columns": [8, 3], "ranks": [10, 8, 3]}
KERNELS = "layers/.*/attention/.*/kernel"
TIERS = {
    "kind": "bucketed",
    "tiers": [
        {"rows": 11, "format": {"kind": "dense"}},
        {"rows": 30, "format": {"kind": "low_rank", "rank": 6}},
        {"rows": 60, "format": {"kind": "low_rank", "rank": 2}},
    ],
}
FORMS = {  # config, values of the token table
    "full": (BASE, V * D),
    "narrow": (BASE.replace(embedding_width=7), V * 7),
    "low_rank": (BASE.with_rule(TABLE, RANK), 4 * (V + D)),
    "tensor_train": (BASE.with_rule(TABLE, TRAIN), 4 * 2 * 5 + 5 * 5 * 3 * 5 + 5 * 6 * 4),
    "cp": (BASE.with_rule(TABLE, CP).with_rule(KERNELS, {**CP, "rows": [24]}), 6 * (10 + 11 + 4 + 6)),
    "tucker": (
        BASE.with_rule(TABLE, TUCKER).with_rule(KERNELS, {**TUCKER, "rows": [4, 6], "ranks": [4, 6, 8, 3]}),
        10 * 8 * 3 + 101 * 10 + 8 * 8 + 3 * 3,
    ),
    "bucketed": (BASE.with_rule(TABLE, TIERS), 11 * D + 6 * (30 + D) + 2 * (60 + D) + V),
    "bucketed-trains": (
        BASE.with_rule(
            TABLE,
            {
                "kind": "bucketed",
                "tiers": [
                    {"rows": 21, "format": {"kind": "dense"}},
                    {"rows": 80, "format": {**TRAIN, "rows": [4, 4, 5], "ranks": [3, 3]}},
                ],
            },
        ),
        21 * D + 4 * 2 * 3 + 3 * 4 * 3 * 3 + 3 * 5 * 4 + V,
    ),
    "train-kernels": (BASE.with_rule(KERNELS, SQUARE).with_rule(TABLE, RANK), 4 * (V + D)),
}
QUICK = ("narrow", "tensor_train", "cp", "tucker", "bucketed")
MOST = pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in FORMS])
EVERY = pytest.mark.parametrize("name", FORMS)
IDS = np.random.default_rng(0).integers(0, V, (2, 7))


@functools.cache
def model_of(name: str) -> fc.Model:
    return fc.Model.init(FORMS[name][0], key=jax.random.key(0, impl="rbg"))


def dense_twin(model: fc.Model) -> fc.Model:
    """The same model with every matrix multiplied out."""
    flat = {address: materialize(node) for address, node in tree.flatten(model.params).items()}
    return fc.Model(params=tree.unflatten(flat), config=model.config.replace(formats=()))


@MOST
def test_forward_equals_the_dense_twin(name):
    model = model_of(name)
    twin = dense_twin(model)
    assert model.params["embedding"]["token"].shape == (V, model.config.table_width)
    for got, want in zip(
        jax.tree.leaves(model(IDS, output_hidden_states=True)),
        jax.tree.leaves(twin(IDS, output_hidden_states=True)),
        strict=True,
    ):
        atol = 64 * model.config.layers * float(np.finfo(np.float32).eps) * math.sqrt(V) * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@MOST
def test_every_float_learns(name):
    """The gradient of a loss that reads the logits reaches each stored value that is no integer."""
    model = model_of(name)
    trainable, frozen = partition(model.params)
    ids = np.resize(np.arange(V), (13, 8))  # every token

    @jax.jit
    def gradient(trainable):
        def loss(trainable):
            out = run(combine(trainable, frozen), model.config, jnp.float32, ids)
            return -jnp.take_along_axis(jax.nn.log_softmax(out.logits), ids[..., None], -1).mean()

        return jax.value_and_grad(loss)(trainable)

    value, found = gradient(trainable)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found["embedding"]["token"]):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    stepped = jax.tree.map(lambda p, g: p - 0.5 * g, trainable, found)
    assert gradient(stepped)[0] < value


@EVERY
def test_counts_and_variance(name):
    model, (config, values) = model_of(name), FORMS[name]
    assert stored_values(model.params["embedding"]["token"]) == values
    assert model.parameters == sum(map(stored_values, tree.flatten(model.params).values()))
    table = np.asarray(materialize(model.params["embedding"]["token"]))
    assert 0.6 < table.std() / config.initializer_range < 1.5  # exact tolerances: tests/test_formats.py


@MOST
def test_json_folder_and_pytorch(name, tmp_path):
    model = model_of(name)
    assert fc.ModelConfig.from_json(json.loads(json.dumps(model.config.to_json()))) == model.config
    fc.save(model, tmp_path / "m", check=functools.partial(check_folder, model))
    again = fc.load(tmp_path / "m")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, tree.flatten(model.params), tree.flatten(again.params))
    assert check_folder(again, tmp_path / "m") <= 1e-4
    profile = fc.profile(again, length=7)
    assert profile.params == model.parameters and profile.flops_per_token > 0
    kind = import_module("flaxcompress.export.modeling_flaxcompress").FlaxCompressForMaskedLM
    with torch.no_grad():
        logits = kind.from_pretrained(tmp_path / "m").eval()(torch.tensor(IDS)).logits
    want = model(IDS).logits
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(
    "spec",
    [{**TRAIN, "dtype": "float16"}, {**RANK, "left": {"kind": "dense", "dtype": "bfloat16"}}],
    ids=["train", "rank"],
)
def test_training_is_in_float32_whatever_is_stored(spec):
    config = BASE.with_rule(TABLE, spec)
    model = fc.Model(params=jax.tree.map(jnp.asarray, model_of("full").params), config=BASE)
    node = parse_spec(spec).init(jax.random.key(1), (V, D), jax.nn.initializers.normal(), table=True)
    model = fc.Model(params=tree.replace(model.params, {TABLE: node}), config=config)
    thawed = thaw_model(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(thawed)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(np.testing.assert_array_equal, freeze_model(thawed, model).params, model.params)
    assert tree.signature(freeze_model(thawed, model).params) == tree.signature(model.params)

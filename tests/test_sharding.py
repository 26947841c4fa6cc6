"""Meshes: loss and gradients equal those of one device, for every family and format; what cannot be cut is refused."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sharded
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.families import FAMILIES
from flaxcompress.formats import base, spec_for
from flaxcompress.model import abstract_flat
from flaxcompress.nn.logical import WEIGHT_RULES, cut, weight_axes
from flaxcompress.train.mesh import AXES, describe, parse_mesh
from flaxcompress.train.sharding import batch_shardings, param_shardings, state_shardings, within

FAMILY = [*(name for name in FAMILIES if name != "vit"), "vit"]
STRUCTURES = [*sharded.structures(), *FAMILY]
# A diagonal of the table.
QUICK = {
    "quantized-low_rank": ("data=2,fsdp=2,model=2",),
    "all-deltas": ("data=2,model=2,sequence=2",),
}
LIMIT = 1e-5


@functools.cache
def measured(*requests):
    """{structure: {mesh: deviation}}, in a process with 8 devices."""
    script = Path(__file__).with_name("sharded.py")
    given = [json.dumps([name, *meshes]) for name, meshes in requests]
    paths = [str(script.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # what is read from it was compiled without a warning
    run = subprocess.run([sys.executable, str(script), *given], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Involuntary full rematerialization" not in run.stderr  # an array that GSPMD could only copy to all devices
    return dict(entry for line in run.stdout.splitlines() for entry in json.loads(line).items())


@pytest.mark.parametrize("name", QUICK)
def test_meshes_compute_what_one_device_does(name):
    found = measured(*QUICK.items())[name]
    assert set(found) == set(QUICK[name]) and max(found.values()) <= LIMIT, found


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_computes_on_meshes_what_it_does_on_one_device(name):
    """One mesh of the ten for each; experiments/mesh_equality.py tries them all."""
    if name in FAMILY:
        pytest.importorskip("transformers")
    mesh = sharded.MESHES[3 * STRUCTURES.index(name) % len(sharded.MESHES)]
    found = measured((name, (mesh,)))[name]
    assert set(found) == {mesh} and found[mesh] <= LIMIT, found


def test_every_format_has_a_case():
    def kinds(spec):
        yield spec["kind"]
        for child in (spec.get("left"), spec.get("right"), *(tier["format"] for tier in spec.get("tiers", ()))):
            yield from kinds(child) if child else ()

    tried = {kind for specs in sharded.FORMATS.values() for spec in specs.values() for kind in kinds(spec)}
    assert tried | {"basis"} == set(base._KINDS)  # a basis has no case of its own: the structure "bases" holds it
    assert set(AXES) == {axis for mesh in sharded.MESHES for axis in parse_mesh(mesh)}


# ── meshes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_mesh_is_read_and_written():
    assert parse_mesh("data=8, model=2") == {"data": 8, "model": 2}
    assert describe({"model": 2, "data": 8, "fsdp": 1}) == "data=8,model=2"


@pytest.mark.parametrize(
    "text, message",
    [
        ("dat=8", "unknown axis 'dat' in 'dat=8'; known: .* did you mean 'data'"),
        ("data=8,data=2", "axis 'data' is there twice"),
        ("data=0", "write an axis and its size"),
        ("data", "write an axis and its size"),
        ("", "unknown axis ''"),
    ],
)
def test_what_is_no_mesh_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


def test_a_mesh_of_another_size_than_the_devices_is_refused():
    devices = jax.devices()[:1] * 6
    with pytest.raises(ValueError, match="data=4 wants 4 devices, but there are 6; data=6 would use them all"):
        fc.make_mesh(data=4, devices=devices)
    with pytest.raises(ValueError, match=r"wants 4 devices.* 6; data=3,model=2 would"):
        fc.make_mesh(data=2, model=2, devices=devices)
    with pytest.raises(ValueError, match="need 4, which does not divide 6"):
        fc.make_mesh(model=4, devices=devices)
    with pytest.raises(ValueError, match="fsdp must be a positive integer, got 0"):
        fc.make_mesh(fsdp=0)


def mesh(**sizes):
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def test_widths_that_the_mesh_does_not_divide_are_refused():
    config = fc.ModelConfig(**{**sharded.BASE, "feed_forward_width": 20})
    with pytest.raises(ValueError, match=r"model=8 does not divide feed_forward_width \(20\).* would: 1, 2, 4$"):
        param_shardings(tree.unflatten(abstract_flat(config)), config, mesh(model=8))
    with pytest.raises(
        ValueError, match=r"batch\['ids'\]: 6 examples cannot be cut .* data=2 · fsdp=2; .* multiple of 4"
    ):
        batch_shardings({"ids": np.zeros((6, 3))}, mesh(data=2, fsdp=2))


# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_matrix_of_odd_rank_is_cut_by_its_other_dimension():
    assert cut(("rank", "mlp"), (5, 8), {"model": 2, "fsdp": 2}, WEIGHT_RULES) == P(None, ("model", "fsdp"))
    assert cut(("rank", "mlp"), (6, 8), {"model": 2, "fsdp": 2}, WEIGHT_RULES) == P("fsdp", "model")


@pytest.mark.parametrize(
    "axes, shape, sizes, want",
    [
        (("embed", "heads"), (8, 12), {"model": 4, "fsdp": 2}, P("fsdp", "model")),
        (("embed", "heads"), (3, 8, 12), {"model": 4, "fsdp": 2}, P(None, "fsdp", "model")),  # stacked
        (("vocab", "embed"), (30522, 8), {"model": 4, "fsdp": 2}, P(None, "fsdp")),
        (("batch", "logit_length", "vocab"), (4, 8, 30522), {"data": 2, "model": 4}, P("data", "model", None)),
        (("batch", "logit_length", "vocab"), (4, 8, 32), {"data": 2, "model": 4}, P("data", None, "model")),
        (("batch", None), (4, 3), {"dcn": 2, "data": 2, "fsdp": 8}, P(("dcn", "data"), None)),
        (("embed", "rank"), (8, 4), {"model": 2, "fsdp": 2}, P("fsdp", "model")),
        (("rank", "mlp"), (4, 8), {"model": 2, "fsdp": 2}, P("fsdp", "model")),
        (("rank", "mlp"), (5, 8), {"model": 2, "fsdp": 2}, P(None, "model")),
    ],
)
def test_dimensions_are_cut_by_rule_and_only_where_they_divide(axes, shape, sizes, want):
    assert cut(axes, shape, sizes) == want


@pytest.mark.parametrize("name", sharded.structures())
def test_every_leaf_has_its_axes(name):
    """The names fit the leaf's dimensions, and name what the matrix has: a kernel of heads is cut by heads."""
    config = sharded.structures()[name]
    found = set()
    for address, node in abstract_flat(config).items():
        place = tree.place(address)
        stacked = node if place is None else jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), node)
        axes = weight_axes(address, stacked)
        for leaf, names in zip(jax.tree.leaves(node), jax.tree.leaves(axes), strict=True):
            assert len(names) == len(leaf.shape), address
            found.update(names)
        is_query = place is not None and (place.part, place.path) == ("attention", "query/kernel")
        if is_query and spec_for(config, address).kind == "dense":
            assert axes == P("embed", "heads")
    assert found >= {"embed"}


def test_heads_of_keys_that_the_mesh_does_not_divide_stay_whole():
    config = sharded.structures()["two-groups"]
    found = param_shardings(tree.unflatten(abstract_flat(config)), config, mesh(model=4))["layers"]["attention"]["000"]
    specs = {name: found[name]["kernel"].spec for name in ("query", "key", "value")}
    assert specs == {"query": P(None, None, "model"), "key": P(None, None, None), "value": P(None, None, None)}


@pytest.mark.parametrize("make", [optax.adamw, optax.adafactor, optax.lion, optax.lamb, optax.contrib.muon])
def test_the_state_of_an_optimizer_lies_where_its_weights_do(make):
    config = fc.ModelConfig(**{**sharded.BASE, "width": 128, "feed_forward_width": 256, "heads": 8})
    params = tree.unflatten(abstract_flat(config))
    shardings = param_shardings(params, config, mesh(fsdp=2, model=2))
    state = jax.eval_shape(make(1e-3).init, params)
    found = state_shardings(make(1e-3), params, shardings)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    size = lambda tree, shardings: sum(  # noqa: E731
        np.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )
    everywhere = jax.tree.map(lambda leaf: NamedSharding(mesh(fsdp=2, model=2), P()), state)
    share = 0.55 if make is optax.adafactor else 0.35  # each factor lacks one of the two dimensions that are cut
    assert size(state, found) < share * size(state, everywhere)


def test_nothing_changes_without_a_mesh():
    config = fc.ModelConfig(**sharded.BASE)
    params = tree.unflatten(jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), abstract_flat(config)))
    ids = jnp.ones((2, 4), jnp.int32)
    forward = jax.jit(lambda params: fc.nn.run(params, config, jnp.float32, ids).logits)
    plain = forward.lower(params).as_text()
    with within(None):
        assert forward.lower(params).as_text() == plain
    assert "sharding" not in plain and "sdy" not in plain
    with within(fc.make_mesh(devices=jax.devices()[:1])):
        assert forward.lower(params).as_text() != plain

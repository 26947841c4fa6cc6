"""LoRA: what it computes, what it trains, and PEFT's folders, both ways."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxcompress as fc
from flaxcompress import cli, linalg, tree
from flaxcompress.compress import Context
from flaxcompress.data.batches import StepBatches
from flaxcompress.formats import Adapted, Quantized, materialize
from flaxcompress.train.trainable import partition, thaw_model
from flaxcompress.tuning import lora

EPS = float(np.finfo(np.float32).eps)
QUERY = "layers/0/attention/query/kernel"
KERNELS = r"layers/\d+/.*/kernel"
IDS = np.asarray([[2, 5, 7, 9, 3], [2, 8, 3, 1, 1]])


def bert_folder(out, **settings):
    """A stock BERT of random weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(
        **{**shape, "intermediate_size": 24, "max_position_embeddings": 12, "initializer_range": 0.2, **settings}
    )
    transformers.BertModel(config).eval().save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def model(folder):
    return fc.load(folder)


def adapted(model, **settings):
    return fc.with_lora(model, key=jax.random.key(3), **{"rank": 3, "alpha": 6.0, **settings})


def drawn(model, **settings):
    """Adapters whose second factor is no longer zero."""
    model, rng = adapted(model, **settings), np.random.default_rng(7)
    changes = {}
    for address, node in lora.adapters(model).items():
        right = jnp.asarray(0.1 * rng.normal(size=node.delta.right.shape), jnp.float32)
        changes[address] = node.with_parts([node.base, node.delta.replace(right=right)])
    return model.replace(params=tree.replace(model.params, changes))


def state(model, ids=IDS):
    return np.asarray(model(ids).last_hidden_state)


# ── what it computes ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "settings", [{}, {"stabilized": True}, {"pattern": KERNELS, "initializer": "pissa"}, {"dora": True}], ids=str
)
def test_adapters_begin_by_changing_nothing(model, settings):
    with_adapters = adapted(model, **settings)
    want = state(model)
    # One sum of rounded products more per kernel, through two layers.
    np.testing.assert_allclose(state(with_adapters), want, rtol=0, atol=40 * EPS * np.abs(want).max())
    assert len(lora.adapters(with_adapters)) == (12 if "pattern" in settings else 4)


@pytest.mark.parametrize("stabilized", [False, True])
def test_the_product_is_scaled_by_alpha_over_rank_or_its_root(model, stabilized):
    node = tree.View(drawn(model, stabilized=stabilized).params)[QUERY]
    scale = 6.0 / (math.sqrt(3) if stabilized else 3)
    left, right = (np.asarray(f, np.float64) for f in (node.delta.left, node.delta.right))
    want = np.asarray(tree.View(model.params)[QUERY], np.float64) + scale * left @ right
    np.testing.assert_allclose(materialize(node), want, rtol=0, atol=8 * EPS * np.abs(want).max())


@pytest.mark.parametrize("dora", [False, True])
def test_merging_gives_the_same_and_leaving_out_the_original(model, dora):
    whole = drawn(model, pattern=KERNELS, dora=dora)
    merged = fc.merged(whole)
    assert not lora.adapters(merged) and merged.config.replace(formats=()) == model.config
    want = state(whole)
    assert np.abs(want - state(model)).max() > 0.01
    np.testing.assert_allclose(state(merged), want, rtol=0, atol=40 * EPS * np.abs(want).max())
    jax.tree.map(np.testing.assert_array_equal, fc.without_lora(whole).params, model.params)


def test_dora_has_magnitudes_and_directions(model):
    """m ⊙ V/‖V‖ by column, in float64, with m away from the norms it begins with."""
    node = tree.View(drawn(model, dora=True).params)[QUERY]
    start = np.linalg.norm(np.asarray(tree.View(model.params)[QUERY], np.float64), axis=0)
    np.testing.assert_allclose(node.magnitude, start, rtol=8 * EPS)
    left, right, base = (np.asarray(f, np.float64) for f in (node.delta.left, node.delta.right, node.base))
    direction = base + node.scale * left @ right
    magnitude = np.linspace(0.5, 2.0, direction.shape[1])
    want = magnitude * direction / np.linalg.norm(direction, axis=0)
    moved = node.replace(magnitude=jnp.asarray(magnitude, jnp.float32))
    np.testing.assert_allclose(materialize(moved), want, rtol=0, atol=16 * EPS * np.abs(want).max())
    for ids, axis in ((np.asarray([3, 0]), 0), (np.asarray([5, 1, 2]), 1)):
        chosen = moved.select(ids, axis)
        got, expected = materialize(chosen), np.take(want, ids, axis)
        np.testing.assert_allclose(got, expected, rtol=0, atol=16 * EPS * np.abs(want).max())


def test_doras_norm_has_no_gradient(model):
    """§4.3: with respect to B, ‖V‖ is a constant."""
    node = tree.View(drawn(model, dora=True).params)[QUERY]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, node.shape[0])), jnp.float32)
    found = jax.grad(lambda node: jnp.sum(node.matmul(x) ** 2), allow_int=True)(node)
    y, gain = np.asarray(node.matmul(x), np.float64), np.asarray(node.gain(), np.float64)
    want = node.scale * np.asarray(x @ node.delta.left, np.float64).T @ (2 * y * gain)
    np.testing.assert_allclose(found.delta.right, want, rtol=0, atol=64 * EPS * np.abs(want).max())
    norm = np.asarray(node.magnitude, np.float64) / gain
    np.testing.assert_allclose(
        found.magnitude, (2 * y * y / gain / norm).sum(0), rtol=0, atol=64 * EPS * np.abs(want).max() * 16
    )


def test_pissa_takes_the_first_components_out_of_the_kernel(model):
    node = tree.View(adapted(model, initializer="pissa").params)[QUERY]
    w = np.asarray(tree.View(model.params)[QUERY], np.float64)
    best = linalg.output_pca(w, 3)
    np.testing.assert_allclose(
        node.scale * materialize(node.delta), best.left @ best.right, rtol=0, atol=1e-5 * np.abs(w).max()
    )
    spectrum = np.linalg.svd(w, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(np.asarray(node.base), 2), spectrum[3], rtol=1e-4)


def test_eva_looks_where_the_inputs_vary(model):
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(16, 16)))
    n = tree.View(model.params)[QUERY].shape[0]
    moment = (basis * np.geomspace(9, 1e-3, 16)) @ basis.T if n == 16 else np.diag(np.arange(n, 0, -1.0))
    moments = {a.removesuffix("/kernel"): moment for a in tree.View(model.params) if a.endswith("/kernel")}
    node = tree.View(adapted(model, initializer="eva", moments=moments).params)[QUERY]
    left = np.asarray(node.delta.left, np.float64)
    values = np.linalg.eigvalsh(moment)
    captured = np.trace(left.T @ moment @ left)
    np.testing.assert_allclose(left.T @ left, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(captured, values[-3:].sum(), rtol=1e-5)
    assert not np.asarray(node.delta.right).any()


# ── what it trains ───────────────────────────────────────────────────────────────────────────────────────────────────


def trained(model, trainable, steps=3):
    head = fc.with_head(model, "sequence_classification", classes=2, key=jax.random.key(0))
    batch = {"input_ids": IDS, "attention_mask": IDS != 1, "labels": np.asarray([0, 1])}
    after = fc.fit(
        head,
        fc.Classification(),
        StepBatches(lambda number: batch),
        steps=steps,
        key=jax.random.key(0),
        trainable=trainable,
        optimizer=fc.Optimizer(learning_rate=1e-2),
    )
    return head, after


@pytest.mark.parametrize(
    "bits, dora", [pytest.param(None, False, marks=pytest.mark.slow), (4, False), pytest.param(4, True)]
)
def test_training_changes_adapters_and_head_alone(model, bits, dora):
    """Over integers, too: QLoRA."""
    base = model
    if bits:
        step = fc.Quantize(bits=bits, group=8, pattern=KERNELS, rounding="nearest")
        base = step(model, Context(original=model), key=jax.random.key(0))
    before, after = trained(adapted(base, dora=dora), rf"{lora.TRAINABLE}|head/.*")
    old, new = tree.View(before.params), tree.View(after.params)
    assert before.config == after.config
    for address in old:
        if address.startswith("head/"):
            assert np.abs(np.asarray(old[address]) - np.asarray(new[address])).max() > 0
        elif isinstance(old[address], Adapted):
            assert isinstance(new[address].base, Quantized) == bool(bits)
            jax.tree.map(np.testing.assert_array_equal, new[address].base, old[address].base)
            assert np.abs(np.asarray(new[address].delta.right)).max() > 0
            if dora:
                assert np.abs(np.asarray(new[address].magnitude) - np.asarray(old[address].magnitude)).max() > 0
        else:
            jax.tree.map(np.testing.assert_array_equal, new[address], old[address])


def test_what_is_frozen_has_no_optimizer_state(model):
    whole = adapted(model)
    trainable, frozen = partition(thaw_model(whole, pattern=lora.TRAINABLE), lora.TRAINABLE)
    count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    factors = [factor for node in lora.adapters(whole).values() for factor in (node.delta.left, node.delta.right)]
    assert count == sum(factor.size for factor in factors)
    assert sum(leaf.size for leaf in jax.tree.leaves(frozen)) == sum(n.size for n in jax.tree.leaves(model.params))
    held = jax.eval_shape(optax.adam(1e-3).init, trainable)
    assert sum(leaf.size for leaf in jax.tree.leaves(held)) == 2 * count + 1


@pytest.mark.parametrize("dora", [False, True])
def test_a_saved_folder_has_the_adapters_beside_the_kernels(model, dora, tmp_path):
    whole = drawn(model, dora=dora)
    fc.save(whole, tmp_path / "adapted")
    again = fc.load(tmp_path / "adapted")
    assert again.config == whole.config
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    net = transformers.AutoModel.from_pretrained(tmp_path / "adapted", trust_remote_code=True).eval()
    with torch.no_grad():
        close(net(input_ids=torch.tensor(IDS)).last_hidden_state, state(whole))


# ── PEFT's folders ───────────────────────────────────────────────────────────────────────────────────────────────────


def close(got, want):
    """Two implementations of two layers."""
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=2e-5 * np.abs(np.asarray(want)).max())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stabilized": True, "rank": 2},
        {"dora": True},
        {"pattern": r"layers/\d+/(attention/output|feed_forward/.*)/kernel"},
    ],
    ids=str,
)
def test_peft_computes_the_same_from_our_folder(model, folder, settings, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    whole = drawn(model, **settings)
    fc.export(whole, tmp_path / "adapter", format="peft")
    base = transformers.AutoModel.from_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        got = theirs(input_ids=torch.tensor(IDS)).last_hidden_state
    close(got, state(whole))
    again = fc.load_adapter(model, tmp_path / "adapter")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again.params, whole.params)


@pytest.mark.slow
def test_peft_computes_the_same_with_a_trained_head(model, folder, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, after = trained(drawn(model), rf"{lora.TRAINABLE}|head/.*")
    fc.export(after, tmp_path / "adapter", format="peft")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        got = theirs(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(IDS != 1)).logits
    close(got, after(IDS, IDS != 1).logits)
    fresh = fc.load(folder, head="sequence_classification", classes=2, key=jax.random.key(9))
    again = fc.load_adapter(fresh, tmp_path / "adapter")
    close(again(IDS, IDS != 1).logits, after(IDS, IDS != 1).logits)


def test_the_command_writes_the_adapter_alone(model, tmp_path, capsys):
    fc.save(drawn(model), tmp_path / "adapted")
    out = tmp_path / "adapter"
    assert cli.main(["export", str(tmp_path / "adapted"), "--format", "peft", "--out", str(out)]) == 0
    assert {file.name for file in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "report.json"}
    assert "an adapter, for the model it was made on" in " ".join(capsys.readouterr().out.split())
    assert set(lora.adapters(fc.load_adapter(model, out))) == set(lora.adapters(drawn(model)))
    assert cli.main(["export", str(tmp_path / "adapted"), "--format", "pef", "--out", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Roberta", "Electra", "ModernBert"])
def test_peft_loads_heads_of_several_modules(kind, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 24, "max_position_embeddings": 20, "initializer_range": 0.2, "num_labels": 3}
    config = getattr(transformers, f"{kind}Config")(**shape, pad_token_id=1)
    stock = getattr(transformers, f"{kind}ForSequenceClassification")
    stock(config).eval().save_pretrained(tmp_path / "base")
    model = fc.load(tmp_path / "base")
    pattern = r"layers/\d+/attention/output/kernel"
    whole = drawn(model, pattern=pattern)
    fc.export(whole, tmp_path / "adapter", format="peft")
    theirs = peft.PeftModel.from_pretrained(stock.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        got = theirs(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(IDS != 1)).logits
    close(got, whole(IDS, IDS != 1).logits)
    again = fc.load_adapter(model, tmp_path / "adapter")
    close(again(IDS, IDS != 1).logits, got)


@pytest.mark.slow
def test_layers_that_share_weights_share_their_adapter(model, folder, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shared = fc.Share(map="all", parts=("attention",))(model, Context(original=model), key=jax.random.key(0))
    whole = drawn(shared)
    fc.export(shared, tmp_path / "base", format="torch-dense")
    fc.export(whole, tmp_path / "adapter", format="peft")
    base = transformers.AutoModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        got = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=torch.tensor(IDS))
    close(got.last_hidden_state, state(whole))
    with pytest.raises(ValueError, match="the layers of this model share weights"):
        fc.load_adapter(shared, tmp_path / "adapter")


@pytest.mark.parametrize("rslora, dora", [(False, False), (True, False), (False, True)])
def test_pefts_own_folder_loads_here(model, folder, rslora, dora, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModel.from_pretrained(folder)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["query", "dense"],
        use_rslora=rslora,
        use_dora=dora,
        init_lora_weights=False,
        rank_pattern={"attention.self.query": 2},
        alpha_pattern={"0.intermediate.dense": 5},
        exclude_modules=["pooler.dense"],
        task_type="FEATURE_EXTRACTION",
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, settings).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(IDS)).last_hidden_state
    ours = fc.load_adapter(model, tmp_path / "theirs")
    assert {node.delta.rank for node in lora.adapters(ours).values()} == {2, 4}
    close(state(ours), want)
    assert np.abs(state(ours) - state(model)).max() > 0.01


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "rank must be at least 1 and alpha positive, got 0"),
        ({"alpha": -1.0}, "alpha positive, got 3 and -1.0"),
        ({"rank": 1000}, r"rank 1000 is not in 1 … \d+ for layers/0/attention/query/kernel"),
        ({"pattern": "layers/0/attn/.*"}, "matches no parameter"),
        ({"initializer": "loftq"}, "unknown initializer 'loftq'"),
        ({"initializer": "eva"}, "eva needs moments= of the input of layers/0/attention/query/kernel"),
    ],
)
def test_settings_that_do_not_fit_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        adapted(model, **settings)


def test_a_kernel_has_one_adapter(model):
    with pytest.raises(ValueError, match=f"{QUERY} has an adapter already; merge it"):
        adapted(adapted(model))


def test_nothing_to_export_is_said(model, tmp_path):
    with pytest.raises(ValueError, match="the model has no adapters; with_lora adds them"):
        fc.export(model, tmp_path / "adapter", format="peft")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_for_no_original_is_not_exported(model, tmp_path):
    step = fc.Quantize(bits=4, group=8, pattern=KERNELS, rounding="nearest")
    rounded = step(model, Context(original=model), key=jax.random.key(0))
    repaired = fc.Repair(rank=2, whitening="none")(rounded, Context(original=model), key=jax.random.key(0))
    for whole in (adapted(model, initializer="pissa"), repaired):
        with pytest.raises(ValueError, match=r"lacks what its adapter holds \(of pissa, or Repair\)"):
            fc.export(whole, tmp_path / "adapter", format="peft")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("pattern", ["layers/(", "layers/7/.*"])
def test_a_training_pattern_that_matches_nothing_is_refused(model, pattern):
    with pytest.raises(ValueError, match=r"trainable: .*(is not a regular expression|matches no parameter)"):
        thaw_model(adapted(model), pattern=pattern)


@pytest.fixture
def exported(model, tmp_path):
    fc.export(drawn(model), tmp_path / "adapter", format="peft")
    return tmp_path / "adapter"


def change(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"peft_type": "P_TUNING"}, "adapters of kind 'P_TUNING' are not read"),
        ({"use_dora": True}, "there is lora_A, lora_B, and .* asks for lora_A, lora_B, lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_bias True is not supported, only False"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported, .* the base was changed"),
        ({"r": 5}, "query has rank 3, and adapter_config.json says 5"),
    ],
)
def test_folders_that_would_compute_something_else_are_refused(model, exported, settings, message):
    change(exported, **settings)
    with pytest.raises(ValueError, match=message):
        fc.load_adapter(model, exported)


def test_a_folder_for_another_model_is_refused(model, exported, tmp_path):
    wide = bert_folder(tmp_path / "wide", hidden_size=24, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"made for another model: .*query maps 24 to 24 here"):
        fc.load_adapter(fc.load(wide), exported)
    shallow = bert_folder(tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"made for another model: this one has no encoder\.layer\.1"):
        fc.load_adapter(fc.load(shallow), exported)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json; PEFT's save_pretrained writes it"):
        fc.load_adapter(model, tmp_path)

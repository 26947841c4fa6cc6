"""Heads: put on a model anew, registered by callers, and trained on a frozen body."""

from __future__ import annotations

import functools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.config import FormatRule
from flaxcompress.data.batches import StepBatches
from flaxcompress.nn import Linear, pool_sequence
from flaxcompress.train import Classification, fit

SIZES = {"vocabulary": 30, "width": 12, "layers": 2, "heads": 2, "feed_forward_width": 16, "positions": 12}
IDS = np.array([[3, 4, 5, 6], [7, 8, 9, 0]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
KEY = jax.random.key(1)


@functools.cache
def body(family: str = "bert") -> fc.Model:
    more = {"segments": 0, "pooler": False, "position_offset": 2, "pad_token": 1} if family == "roberta" else {}
    return fc.Model.init(fc.ModelConfig(**{**SIZES, **more}, family=family), key=jax.random.key(0))


def same_body(model: fc.Model, base: fc.Model) -> None:
    flat = {a: n for a, n in tree.flatten(model.params).items() if not a.startswith("head/")}
    assert flat.keys() == {a for a in tree.flatten(base.params) if not a.startswith("head/")}
    for address, node in flat.items():
        np.testing.assert_array_equal(node, tree.flatten(base.params)[address], err_msg=address)


def distances(x, given, config):
    """A head of a caller's own: two outputs, one a map of ours, one Linen's."""
    y = Linear(config, "head/first", config.width, 5, name="first")(pool_sequence(x, given, config))
    return {"five": y, "one": nn.Dense(1, name="second")(jnp.tanh(y))[:, 0]}


class Counting(nn.Module):
    """A head that reads the mask."""

    config: fc.ModelConfig

    @nn.compact
    def __call__(self, x, given):
        real = jnp.ones(x.shape[:2]) if given.mask is None else given.mask
        return self.param("scale", nn.initializers.ones, ()) * real.sum(1)


@pytest.fixture
def registered():
    fc.register_head("distances", distances)
    fc.register_head("counting", Counting)


def unregister(name: str) -> None:
    from flaxcompress.config import model as config
    from flaxcompress.nn import heads

    config._OWN_HEADS.remove(name)
    del heads.HEADS[name]
    jax.clear_caches()


# ── heads of one's own ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_registered_head_runs_and_round_trips(registered, tmp_path, caplog):
    model = fc.with_head(body(), "distances", key=KEY)
    same_body(model, body())
    out = model(IDS, MASK)
    assert out.logits["five"].shape == (2, 5) and out.logits["one"].shape == (2,)
    five = out.pooled @ model.params["head"]["first"]["kernel"] + model.params["head"]["first"]["bias"]
    np.testing.assert_allclose(out.logits["five"], five, rtol=0, atol=1e-6)
    with caplog.at_level(logging.WARNING, "flaxcompress"):
        fc.save(model, tmp_path / "m")
    assert "PyTorch loads this folder without it" in caplog.text
    np.testing.assert_array_equal(fc.load(tmp_path / "m")(IDS, MASK).logits["five"], out.logits["five"])

    unregister("distances")
    with pytest.raises(ValueError, match=r"unknown head 'distances'.*register_head makes one of your own known"):
        fc.load(tmp_path / "m")
    same_body(fc.load(tmp_path / "m", head="none"), body())
    fc.register_head("distances", distances)
    np.testing.assert_array_equal(fc.load(tmp_path / "m")(IDS, MASK).logits["one"], out.logits["one"])


def test_a_registered_head_may_be_initialised_from_the_start(registered):
    model = fc.Model.init(fc.ModelConfig(**SIZES, head="counting"), key=KEY)
    np.testing.assert_array_equal(model(IDS, MASK).logits, [4.0, 3.0])
    np.testing.assert_array_equal(model(IDS).logits, [4.0, 4.0])


def test_a_head_registered_again_means_the_new_one():
    fc.register_head("changing", lambda x, given, config: x[:, 0, 0])
    model = fc.with_head(body(), "changing")  # has no weights, needs no key
    before = np.asarray(model(IDS).logits)
    fc.register_head("changing", lambda x, given, config: 2 * x[:, 0, 0])
    np.testing.assert_array_equal(model(IDS).logits, 2 * before)


def test_pytorch_says_that_it_does_not_know_the_head(registered, tmp_path, caplog):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from flaxcompress.export import check_folder

    model = fc.with_head(body(), "distances", key=KEY)
    fc.save(model, tmp_path / "m")
    net = transformers.AutoModel.from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
    assert "The head 'distances' was made in JAX" in caplog.text
    with torch.no_grad():
        got = net(torch.tensor(IDS), torch.tensor(MASK)).last_hidden_state.numpy()
    want = np.asarray(model(IDS, MASK).last_hidden_state)
    np.testing.assert_allclose(got[MASK == 1], want[MASK == 1], rtol=0, atol=1e-5)
    assert check_folder(model, tmp_path / "m") <= 1e-4
    with pytest.raises(ValueError, match="is of your own, and no stock class has it"):
        fc.export(model, tmp_path / "stock")


@pytest.mark.parametrize(
    ("name", "head", "error", "message"),
    [
        ("masked_lm", distances, ValueError, "'masked_lm' is taken"),
        ("none", distances, ValueError, "'none' is taken"),
        ("a head", distances, ValueError, "not a name in lower case"),
        ("mine", 3, TypeError, "needs a Linen module's class or a function, got 3"),
        ("mine", dict, TypeError, "needs a Linen module's class or a function"),
    ],
)
def test_wrong_registrations_are_refused(name, head, error, message):
    with pytest.raises(error, match=message):
        fc.register_head(name, head)


# ── a new head ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_load_puts_a_fresh_head_on_a_checkpoint_without_one(stock, tmp_path):
    base = body("roberta")
    fc.export(base, tmp_path / "m") if stock else fc.save(base, tmp_path / "m")
    ask = functools.partial(fc.load, tmp_path / "m", head="sequence_classification")
    with pytest.raises(ValueError, match="'sequence_classification' needs classes="):
        ask(key=KEY)
    with pytest.raises(ValueError, match=r"give a random key for new ones: key=jax.random.key\(0\)"):
        ask(classes=3)
    model = ask(classes=3, key=KEY)
    same_body(model, fc.load(tmp_path / "m"))
    config = model.config
    assert (config.classes, config.head_activation) == (3, "tanh")  # as RoBERTa's head is made
    assert config.classifier.transform and config.classifier.pooling == "first"
    kernel = model.params["head"]["output"]["kernel"]
    assert kernel.shape == (12, 3) and 0.5 < float(kernel.std()) / config.initializer_range < 2
    assert model(IDS, MASK).logits.shape == (2, 3)
    other = ask(classes=3, key=jax.random.key(2))
    assert not np.array_equal(other.params["head"]["output"]["kernel"], kernel)


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_load_keeps_a_head_that_fits_and_makes_one_that_does_not(stock, tmp_path):
    model = fc.with_head(body("roberta"), "sequence_classification", classes=3, key=KEY)
    fc.export(model, tmp_path / "m") if stock else fc.save(model, tmp_path / "m")
    want = np.asarray(model(IDS, MASK).logits)
    for options in ({}, {"head": "sequence_classification"}, {"head": "sequence_classification", "classes": 3}):
        again = fc.load(tmp_path / "m", **options)
        np.testing.assert_allclose(again(IDS, MASK).logits, want, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="give a random key"):
        fc.load(tmp_path / "m", head="sequence_classification", classes=4)
    assert fc.load(tmp_path / "m", head="sequence_classification", classes=4, key=KEY)(IDS).logits.shape == (2, 4)
    assert fc.load(tmp_path / "m", head="none").config.head == "none"
    with pytest.raises(ValueError, match=r"roberta models have no head 'causal_lm'.*register_head adds one"):
        fc.load(tmp_path / "m", head="causal_lm", key=KEY)
    with pytest.raises(ValueError, match=r"unknown head 'tokn_classification'.*did you mean 'token_classification'"):
        fc.load(tmp_path / "m", head="tokn_classification", key=KEY)


def test_a_decoder_gets_the_head_of_decoders():
    more = {"causal": True, "pooler": False, "segments": 0, "norm": "rms", "norm_place": "pre", "embedding_norm": False}
    config = fc.ModelConfig(
        **SIZES, **more, family="llama", rotary=fc.Rotary(), position_embedding="none", gated=True, norm_bias=False
    )
    model = fc.with_head(fc.Model.init(config, key=KEY), "sequence_classification", classes=2, key=KEY)
    assert model.config.classifier.pooling == "last" and "bias" not in model.params["head"]["output"]
    alone = model(IDS[1:, :3]).logits
    np.testing.assert_allclose(model(IDS, MASK).logits[1:], alone, rtol=0, atol=1e-6)


def test_a_new_head_is_dense_on_a_quantized_body():
    rule = FormatRule(pattern=".*/kernel", spec={"kind": "quantized", "bits": 4})
    base = fc.Model.init(fc.ModelConfig(**SIZES, formats=(rule,)), key=KEY)
    model = fc.with_head(base, "token_classification", classes=3, key=KEY)
    assert isinstance(model.params["head"]["output"]["kernel"], jax.Array)
    assert model.config.format_rule("layers/0/attention/query/kernel") == rule.spec


# ── a frozen body ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_the_head_is_trained():
    model = fc.with_head(body(), "sequence_classification", classes=2, key=KEY)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 30, (8, 6))
    batch = {"input_ids": ids, "labels": (ids[:, 1] % 2).astype(np.int32)}
    losses = []
    after = fit(
        model,
        Classification(dropout=False),
        StepBatches(lambda step: batch),
        optimizer=optax.adam(0.05),
        key=KEY,
        steps=30,
        trainable="head/.*",
        watch=lambda step, values: losses.append(values["loss"]),
    )
    same_body(after, model)  # bit for bit
    for address, node in tree.flatten(after.params).items():
        if address.startswith("head/"):
            assert not np.array_equal(node, tree.flatten(model.params)[address]), address
    assert losses[-1] < 0.9 * losses[0]


def test_a_pattern_that_parts_a_stack_is_refused():
    step = functools.partial(
        fit, body(), Classification(), StepBatches(lambda step: {}), optimizer=optax.sgd(1.0), steps=1, key=KEY
    )
    with pytest.raises(ValueError, match="matches some weight sets of a stack of layers, but not all"):
        step(trainable="layers/1/.*")
    with pytest.raises(ValueError, match=r"trainable: 'haed/.\*' matches no parameter"):
        step(trainable="haed/.*")

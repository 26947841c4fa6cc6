"""Adapters and biases: what they compute, beside transformers with hooks, and what they train."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.compress import Context
from flaxcompress.config import Adapters
from flaxcompress.data.batches import StepBatches
from flaxcompress.train.trainable import partition
from flaxcompress.tuning import Biases, Bottleneck, Prefix, Tuning, bottleneck

EPS = float(np.finfo(np.float32).eps)
KEY = jax.random.key(0)
IDS = np.asarray([[2, 5, 7, 9, 3, 0], [2, 8, 3, 1, 1, 4]])
SMALL = {"vocabulary": 20, "width": 16, "layers": 3, "heads": 2, "feed_forward_width": 24, "positions": 12}
DECODER = {"positions": 12, "causal": True, "pooler": False, "width": 16, "vocabulary": 0, "heads": 2, "layers": 2}


def decoder():
    sharing = fc.Sharing.own(2, cross_attention=True)
    return fc.ModelConfig(**DECODER, feed_forward_width=20, sharing=sharing, segments=0)


STRUCTURES = {
    "bert": {},
    "llama": {"causal": True, "norm": "rms", "norm_place": "pre", "gated": True, "final_norm": True, "segments": 0},
    "sandwich": {"norm_place": "sandwich", "parallel": "none"},
    "parallel": {"norm_place": "pre", "parallel": "two_norms", "causal": True},
    "albert": {"sharing": "all"},
    "cycle": {"sharing": {"name": "cycle", "sets": 2}},
    "seq2seq": {"decoder": decoder(), "head": "seq2seq_lm"},
}


def tiny(**more):
    return fc.Model.init(fc.ModelConfig(**{**SMALL, **more}), key=KEY)


def moved(model, seed=1):
    """Adapters whose last map is no longer zero."""
    rng, flat = np.random.default_rng(seed), tree.flatten(model.params)
    names = [a for a in flat if "_adapter/" in a]
    changes = {a: jnp.asarray(0.3 * rng.normal(size=flat[a].shape), jnp.float32) for a in names}
    return model.replace(params=tree.replace(model.params, changes))


def output(model):
    decodes = {} if model.config.decoder is None else {"decoder_input_ids": IDS}
    return np.asarray(model(IDS, np.ones_like(IDS), **decodes).last_hidden_state)


@pytest.mark.parametrize("name", STRUCTURES)
def test_adapters_begin_by_changing_nothing(name):
    model = tiny(**STRUCTURES[name])
    after = ("attention", "cross_attention", "feed_forward")[:: 1 if name == "seq2seq" else 2]
    adapted = fc.with_adapters(model, width=5, after=after, key=KEY)
    want = output(model)  # the same but for how XLA fuses sums
    np.testing.assert_allclose(output(adapted), want, rtol=0, atol=8 * EPS * np.abs(want).max())
    assert np.abs(output(moved(adapted)) - output(model)).max() > 1e-2
    sets = [c.sharing.sets("norms") for c in (model.config, model.config.decoder) if c is not None]
    places = 2 * sets[0] + (3 * sets[1] if name == "seq2seq" else 0)
    assert adapted.parameters - model.parameters == places * (2 * 16 * 5 + 5 + 16)
    again = fc.ModelConfig.from_json(json.loads(json.dumps(adapted.config.to_json())))
    assert again == adapted.config


def test_adapters_are_what_hooks_on_stock_bert_compute(tmp_path):
    """y + up(gelu(down(y))) behind the projections, before the sum and its norm: Houlsby's place, in float64."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**shape, intermediate_size=24, max_position_embeddings=12, initializer_range=0.2)
    transformers.BertModel(config).eval().save_pretrained(tmp_path)
    ours = moved(fc.with_adapters(fc.load(tmp_path), width=4, key=KEY))
    flat = {a: torch.tensor(np.asarray(x, np.float64)) for a, x in tree.flatten(ours.params).items()}
    net = transformers.BertModel.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager").eval()

    def behind(address):
        def hook(module, inputs, y):
            inner = y @ flat[f"{address}/down_project/kernel"] + flat[f"{address}/down_project/bias"]
            inner = torch.nn.functional.gelu(inner)
            return y + inner @ flat[f"{address}/up_project/kernel"] + flat[f"{address}/up_project/bias"]

        return hook

    for number, layer in enumerate(net.encoder.layer):
        layer.attention.output.dense.register_forward_hook(behind(f"layers/{number}/norms/attention_adapter"))
        layer.output.dense.register_forward_hook(behind(f"layers/{number}/norms/feed_forward_adapter"))
    with torch.no_grad():
        want = net(torch.tensor(IDS)).last_hidden_state.numpy()
    np.testing.assert_allclose(output(ours), want, rtol=0, atol=64 * EPS * np.abs(want).max())


@pytest.mark.parametrize("name", ["bert", "sandwich", "albert", "seq2seq"])
def test_a_saved_folder_computes_the_same_here_and_in_pytorch(name, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = moved(fc.with_adapters(tiny(**STRUCTURES[name]), width=5, key=KEY))
    fc.save(model, tmp_path / "m")
    want = output(model)
    np.testing.assert_array_equal(output(fc.load(tmp_path / "m")), want)
    auto = transformers.AutoModelForSeq2SeqLM if name == "seq2seq" else transformers.AutoModel
    net = auto.from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
    given = {"input_ids": torch.tensor(IDS), "attention_mask": torch.ones(IDS.shape, dtype=torch.long)}
    if name == "seq2seq":
        given |= {"decoder_input_ids": torch.tensor(IDS)}
        want = np.asarray(model(IDS, np.ones_like(IDS), decoder_input_ids=IDS).logits)
    with torch.no_grad():
        found = net(**given)
    found = (found.logits if name == "seq2seq" else found.last_hidden_state).numpy()
    np.testing.assert_allclose(found, want, rtol=0, atol=256 * EPS * np.abs(want).max())


def batches():
    labels = np.asarray([0, 1], np.int32)
    return StepBatches(lambda n: {"input_ids": IDS, "attention_mask": np.ones(IDS.shape, bool), "labels": labels})


KINDS = {"adapters": Bottleneck(width=3), "biases": Biases(), "prefix": Prefix(length=3)}
TUNED = {"adapters": "_adapter/", "biases": "bias", "prefix": "/prefix/"}  # a part of the addresses


@pytest.mark.parametrize("name", KINDS)
def test_training_moves_what_is_tuned_and_nothing_else(name):
    """It learns two labels; all else stays bit for bit and has no optimizer state."""
    tuning = KINDS[name]
    start = tuning(tiny(head="sequence_classification", classes=2, initializer_range=0.3), key=KEY)
    pattern = f"{tuning.trainable}|head/.*"
    losses = []
    watch = lambda step, values: losses.append(values["loss"])  # noqa: E731
    options = {"steps": 40, "trainable": pattern, "optimizer": fc.Optimizer(learning_rate=3e-2), "key": KEY}
    made = fc.fit(start, fc.Classification(dropout=False), batches(), watch=watch, **options)
    assert losses[-1] < 0.2 * losses[0]
    before, after = (tree.flatten(m.params) for m in (start, made))
    tuned = {a for a in before if TUNED[name] in a}
    tuned = {a for a in tuned if tree.place(a)} | {a for a in before if a.startswith("head/")}
    for address, node in before.items():
        same = bool((np.asarray(node) == np.asarray(after[address])).all())
        assert same != (address in tuned) or not np.asarray(node).size, address
    state = jax.eval_shape(optax.adam(1e-3).init, partition(start.params, pattern)[0])
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * sum(np.asarray(before[a]).size for a in tuned)


def test_adapters_are_rounded_like_other_kernels():
    model = fc.with_adapters(tiny(), width=8, key=KEY)
    small = fc.Quantize(bits=8, rounding="mse")(model, Context(original=model), key=KEY)
    view = tree.View(small.params)
    assert view["layers/1/norms/attention_adapter/down_project/kernel"].bits == 8
    assert np.isfinite(output(small)).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"width": 0}, "width must be a positive integer"),
        ({"activation": "swish"}, "unknown activation 'swish'"),
        ({"after": ()}, "after must name some of attention, cross_attention, feed_forward"),
        ({"after": ("norm",)}, "after must name some of"),
        ({"after": ("cross_attention",)}, "the model has no cross_attention"),
    ],
)
def test_adapters_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        fc.with_adapters(tiny(), key=KEY, **options)


def test_adapters_come_once_and_stay_out_of_stock_folders(tmp_path):
    model = fc.with_adapters(tiny(), key=KEY)
    with pytest.raises(ValueError, match="has some already"):
        fc.with_adapters(model, key=KEY)
    with pytest.raises(ValueError, match="stock bert folders have adapters None"):
        fc.export(model, tmp_path / "out", format="torch-dense")
    with pytest.raises(ValueError, match="adapters stand behind cross_attention"):
        fc.ModelConfig(**SMALL, adapters=Adapters(width=2, after=("cross_attention",)))


def test_biases_must_be_there():
    plain = {"attention_bias": False, "output_bias": False, "feed_forward_bias": False, "norm_bias": False}
    with pytest.raises(ValueError, match="the model has none"):
        Biases()(tiny(**plain, norm="rms", embedding_norm=False, pooler=False), key=KEY)
    with pytest.raises(ValueError, match="biases: pattern"):
        Biases(pattern="layers/9/.*")(tiny(), key=KEY)


def test_kinds_are_read_by_name():
    assert Tuning.read("adapters", "x") == Bottleneck()
    assert Tuning.read({"name": "adapters", "width": 3}, "x") == Bottleneck(width=3)
    with pytest.raises(ValueError, match="x: unknown key 'widht'"):
        Tuning.read({"name": "adapters", "widht": 3}, "x")
    assert dataclasses.asdict(Bottleneck()) == {
        "width": 64, "activation": "gelu", "after": ("attention", "feed_forward")
    }  # fmt: skip
    assert Bottleneck().trainable == bottleneck.TRAINABLE

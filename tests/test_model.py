"""Model: equal to transformers' BERT, saved and loaded bit by bit, encoding, and layers that share weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick
from safetensors.numpy import load_file, save_file

from flaxcompress import encoding, tree
from flaxcompress import model as model_file
from flaxcompress.config import ModelConfig, Sets, Sharing
from flaxcompress.encoding import bucket_length, pool
from flaxcompress.folder import load, save
from flaxcompress.formats import Bucketed, LowRank
from flaxcompress.model import Model, init_params
from flaxcompress.nn import Context, Layer, Stack
from flaxcompress.text import Assets, Pooling, read_assets, read_pooling

EPS = float(np.finfo(np.float32).eps)
WORDS = ["the", "cat", "dog", "sat", "on", "mat", "a", "big", "##s", "##ing", "run", "!", ",", "中", "naive", "ö", "o"]
VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *WORDS,
    *"bcdefghijklmnpqrstuvwxyz",
    "##e",
    "##n",
    "é",
    "##é",
]


# ── against transformers ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A random torch model: odd sizes, an activation, a head; norms and biases moved away from 1 and 0."""

    seed: int
    heads: int
    head_width: int
    layers: int
    feed_forward: int
    vocabulary: int
    segments: int
    activation: str
    epsilon: float
    masked_lm: bool

    def build(self):
        transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
        config = transformers.BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.heads * self.head_width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.feed_forward,
            max_position_embeddings=19,
            type_vocab_size=self.segments,
            hidden_act=self.activation,
            layer_norm_eps=self.epsilon,
            initializer_range=0.3,
            attn_implementation="eager",
        )
        torch.manual_seed(self.seed)
        kind = transformers.BertForMaskedLM if self.masked_lm else transformers.BertModel
        made = kind(config).eval()
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "LayerNorm" in name or name.endswith("bias"):
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return made


CHECKPOINTS = [
    Checkpoint(11, 3, 7, 2, 33, 41, 2, "gelu", 1e-12, False),
    Checkpoint(12, 1, 9, 3, 10, 67, 1, "gelu_new", 1e-5, True),
    Checkpoint(13, 5, 3, 1, 17, 29, 3, "relu", 1e-3, True),
    Checkpoint(14, 2, 11, 4, 50, 101, 2, "silu", 1e-7, False),
    Checkpoint(15, 7, 2, 2, 15, 37, 2, "gelu_pytorch_tanh", 1e-12, True),
]
EVERY_CHECKPOINT = pytest.mark.parametrize(
    "checkpoint",
    [pytest.param(c, id=f"torch-seed-{c.seed}", marks=[pytest.mark.slow] * (c.seed > 12)) for c in CHECKPOINTS],
)


def inputs(checkpoint: Checkpoint, *, batch=3, length=13):
    rng = np.random.default_rng(checkpoint.seed)
    ids = rng.integers(0, checkpoint.vocabulary, (batch, length))
    mask = np.arange(length)[None] < np.asarray([length, 5, 1])[:, None]
    mask[0, 4] = False  # a hole, as no tokenizer makes it
    return ids, mask.astype(np.int64), rng.integers(0, checkpoint.segments, (batch, length))


def assert_close(got, want):
    want = np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4 * np.abs(want).max())


def assert_outputs_equal(ours: Model, theirs, checkpoint: Checkpoint):
    import torch

    ids, mask, segments = inputs(checkpoint)
    with torch.no_grad():
        want = theirs(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            token_type_ids=torch.tensor(segments),
            output_hidden_states=True,
            output_attentions=True,
        )
    got = ours(ids, mask, segments, output_hidden_states=True, output_attentions=True)
    assert len(got.hidden_states) == len(want.hidden_states) == checkpoint.layers + 1
    assert len(got.attentions) == len(want.attentions) == checkpoint.layers
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert_close(a, b)
    for a, b in zip(got.attentions, want.attentions, strict=True):
        assert_close(a, b)
    assert_close(got.last_hidden_state, want.hidden_states[-1])
    if checkpoint.masked_lm:
        assert got.pooled is None
        assert_close(got.logits, want.logits)
    else:
        assert got.logits is None
        assert_close(got.pooled, want.pooler_output)


@EVERY_CHECKPOINT
def test_equal_to_transformers(checkpoint, tmp_path):
    theirs = checkpoint.build()
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert_outputs_equal(ours, theirs, checkpoint)
    assert ours.parameters == sum(p.numel() for p in theirs.parameters())
    assert ours.nbytes == 4 * ours.parameters


@functools.cache
def plain_tensors() -> tuple[dict, dict]:
    """(config.json, tensors) of the first checkpoint, for folders of other spellings."""
    theirs = CHECKPOINTS[0].build()
    return theirs.config.to_dict() | {"architectures": ["BertModel"]}, {
        n: t.detach().numpy().copy() for n, t in theirs.named_parameters()
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Model:
    """The first checkpoint, from a folder of today's spelling."""
    folder = tmp_path_factory.mktemp("reference")
    write_folder(folder, plain_tensors()[1])
    return load(folder)


def write_folder(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(plain_tensors()[0] | config))
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / "model.safetensors")


def assert_same_params(got: Model, want: Model):
    assert jax.tree.structure(got.params) == jax.tree.structure(want.params)
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def old_names(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


SPELLINGS = {
    "bert-prefix": lambda n: f"bert.{n}",
    "gamma-beta": old_names,
    "both": lambda n: f"bert.{old_names(n)}",
    "module-prefix": lambda n: f"module.bert.{n}",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_old_and_prefixed_names(name, tmp_path, reference):
    spelled = {SPELLINGS[name](n): t for n, t in plain_tensors()[1].items()}
    write_folder(tmp_path / "m", spelled)
    assert_same_params(load(tmp_path / "m"), reference)


def test_sharded(tmp_path, reference):
    CHECKPOINTS[0].build().save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    assert_same_params(load(tmp_path), reference)


def test_heads_that_nobody_asked_for_are_left_out_with_one_line(tmp_path, caplog):
    tensors = {f"bert.{n}": t for n, t in plain_tensors()[1].items()}
    more = {"cls.seq_relationship.weight": np.ones((2, 21), np.float32), "classifier.bias": np.ones(3, np.float32)}
    write_folder(tmp_path / "m", tensors | more)
    with caplog.at_level(logging.WARNING, "flaxcompress"):
        load(tmp_path / "m")
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1 and "cls.seq_relationship.weight" in lines[0] and "\n" not in lines[0]


def test_buffers_are_ignored_in_silence(tmp_path, caplog):
    tensors = {f"bert.{n}": t for n, t in plain_tensors()[1].items()}
    write_folder(tmp_path / "m", tensors | {"bert.embeddings.position_ids": np.arange(19)[None]})
    with caplog.at_level(logging.WARNING, "flaxcompress"):
        load(tmp_path / "m")
    assert not caplog.records


def test_a_checkpoint_without_pooler_has_none(tmp_path):
    write_folder(tmp_path / "m", {n: t for n, t in plain_tensors()[1].items() if "pooler" not in n})
    ours = load(tmp_path / "m")
    assert not ours.config.pooler and "pooler" not in ours.params


def test_half_precision_checkpoints_are_read_as_float32(tmp_path, reference):
    write_folder(tmp_path / "m", {n: t.astype(np.float16) for n, t in plain_tensors()[1].items()})
    ours, want = load(tmp_path / "m"), reference
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(want.params), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, np.asarray(b).astype(np.float16).astype(np.float32))


# ── models of our own ────────────────────────────────────────────────────────────────────────────────────────────────

TINY = ModelConfig(vocabulary=len(VOCABULARY), width=12, layers=2, heads=2, feed_forward_width=20, positions=32)
INT8 = {"kind": "quantized", "bits": 8}
FORMATS = {
    "dense": TINY.replace(head="masked_lm"),
    "int8": TINY.with_rule(".*/kernel|embedding/token", INT8),
    "int3-groups": TINY.with_rule("layers/.*/kernel", {"kind": "quantized", "bits": 3, "group": 5}),
    "mixed": TINY.with_rule("layers/1/.*/kernel", {"kind": "quantized", "bits": 4, "scale_dtype": "bfloat16"})
    .with_rule("layers/0/feed_forward/.*/kernel", {"kind": "low_rank", "rank": 3, "left": INT8})
    .with_rule("embedding/(position|segment)", {"kind": "dense", "dtype": "bfloat16"})
    .with_rule(".*/(scale|bias)", {"kind": "dense", "dtype": "float16"}),
    "tiers": TINY.with_format(
        "embedding/token",
        {
            "kind": "low_rank",
            "rank": 8,
            "left": {
                "kind": "bucketed",
                "tiers": [
                    {"rows": 10, "format": {"kind": "banded", "bands": [[8, 3]]}},
                    {"rows": len(VOCABULARY) - 10, "format": {"kind": "banded", "bands": [[3, 1], [5, 0]]}},
                ],
            },
            "right": INT8,
        },
    ),
    "shared": TINY.replace(sharing=Sharing(attention=(0, 0), feed_forward=(0, 0), norms=(0, 1)), pooler=False),
}


def assets(**options) -> Assets:
    files = (("vocab.txt", "\n".join(VOCABULARY).encode() + b"\n"),)
    return Assets(**{"files": files, "max_length": 32, **options})


def random_leaf(rng, path, leaf):
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return rng.integers(-127, 128, leaf.shape).astype(np.uint8 if leaf.dtype == np.uint8 else np.int8)
    value = rng.normal(size=leaf.shape) * (0.01 if path and "scale" in str(path[-1]) else 0.3)
    return np.asarray(jnp.asarray(value, jnp.float32).astype(leaf.dtype))


def random_node(rng, node):
    if isinstance(node, LowRank):
        return LowRank(left=random_node(rng, node.left), right=random_node(rng, node.right))
    if isinstance(node, Bucketed):
        numbers = np.repeat(np.arange(len(node.tiers)), [t.shape[0] for t in node.tiers])
        tiers = tuple(random_node(rng, t) for t in node.tiers)
        return Bucketed.from_tiers(tiers, rng.permutation(numbers).astype(np.uint8))
    return jax.tree_util.tree_map_with_path(functools.partial(random_leaf, rng), node)


@functools.cache
def tiny(name: str = "dense", seed: int = 0) -> Model:
    """Random leaves of the right shapes: nothing to compile."""
    rng = np.random.default_rng(seed)
    flat = model_file.abstract_flat(FORMATS[name])
    flat = {a: random_node(rng, node) for a, node in flat.items()}
    flat = {a: n + 1 if a.endswith("/scale") else n for a, n in flat.items()}
    params = jax.tree.map(jnp.asarray, tree.unflatten(flat))
    return Model(params=params, config=FORMATS[name], assets=assets())


@pytest.mark.parametrize("name", quick(FORMATS, ["mixed", "tiers", "shared"]))
def test_save_and_load_are_bit_equal(name, tmp_path):
    model = tiny(name)
    save(model, tmp_path / "m")
    back = load(tmp_path / "m")
    assert back.config == model.config
    assert_same_params(back, model)
    assert (back.nbytes, back.parameters) == (model.nbytes, model.parameters)
    stored = load_file(tmp_path / "m" / "model.safetensors") if name != "mixed" else None
    if stored is not None:
        assert sum(t.nbytes for t in stored.values()) == model.nbytes
    save(back, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "m" / "config.json").read_bytes()
    assert contents(tmp_path / "again") == contents(tmp_path / "m")


def contents(folder):
    """(header, data) of the weights; the library writes the header's metadata in no fixed order."""
    raw = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def test_the_abstract_tree_is_what_init_makes():
    config = FORMATS["tiers"]
    real = jax.eval_shape(functools.partial(init_params, config), jax.random.key(1))
    assert tree.signature(real) == tree.signature(tiny("tiers").params)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_init_runs_and_computes(name):
    model = Model.init(FORMATS[name], key=jax.random.key(0))
    assert tree.signature(model.params) == tree.signature(tiny(name).params)
    out = model(np.ones((1, 3), int))
    assert np.isfinite(out.last_hidden_state).all()
    again = Model.init(FORMATS[name], key=jax.random.key(0))
    assert_same_params(again, model)


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalize", [False, True])
def test_assets_survive_saving(mode, normalize, tmp_path):
    kept = assets(pooling=Pooling(mode, normalize), max_length=17, source="a/b", licence="mit")
    save(tiny().replace(assets=kept), tmp_path / "m")
    back = load(tmp_path / "m").assets
    assert back.pooling == kept.pooling
    assert (back.max_length, back.source, back.licence) == (17, "a/b", "mit")
    assert back.file("vocab.txt") == kept.file("vocab.txt")


def test_leaves_are_params_only():
    model = tiny()
    leaves = jax.tree.leaves(model)
    assert all(a is b for a, b in zip(leaves, jax.tree.leaves(model.params), strict=True))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, model)
    assert isinstance(doubled, Model) and doubled.config == model.config and doubled.assets == model.assets


def test_assets_are_equal_by_content():
    assert assets() == assets() and hash(assets()) == hash(assets())
    for other in ({"max_length": 31}, {"pooling": Pooling()}, {"source": "x"}, {"files": ()}):
        assert assets() != assets(**other)
    assert assets(pooling=Pooling("cls")) != assets(pooling=Pooling("mean"))


def test_loading_twice_does_not_retrace(tmp_path):
    save(tiny(), tmp_path / "m")
    first, second = load(tmp_path / "m"), load(tmp_path / "m")

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(model: Model):
        return model.params["embedding"]["token"].sum()

    assert run(first) == run(second)
    ids = np.ones((1, 4), int)
    first(ids)
    size = model_file._forward._cache_size()
    second(ids)
    assert model_file._forward._cache_size() == size


def test_padding_changes_nothing_and_all_padding_is_finite():
    model = tiny()
    ids = np.random.default_rng(0).integers(0, 20, (3, 9))
    mask = np.zeros((3, 9), int)
    mask[0, :5], mask[1, :9] = 1, 1
    out = model(ids, mask, output_hidden_states=True, output_attentions=True)
    for leaf in jax.tree.leaves(out):
        assert np.isfinite(leaf).all()
    for attention in out.attentions:
        np.testing.assert_array_equal(attention[2], 0)
        np.testing.assert_array_equal(attention[0, ..., 5:], 0)
        np.testing.assert_allclose(attention[0].sum(-1), 1, rtol=8 * EPS)
    other = ids.copy()
    other[0, 5:] = 1
    again = model(other, mask, output_hidden_states=True, output_attentions=True)
    np.testing.assert_array_equal(again.last_hidden_state[0, :5], out.last_hidden_state[0, :5])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"input_ids": [[0, 99]]}, ValueError, r"values 0 … 99 lie outside the vocabulary 0 … \d+"),
        ({"input_ids": [[-1, 3]]}, ValueError, "lie outside the vocabulary"),
        ({"input_ids": np.ones((1, 33), int)}, ValueError, "33 tokens, but the model has 32 positions"),
        ({"input_ids": [1, 2]}, ValueError, r"integers of shape \[B, T\]"),
        ({"input_ids": np.ones((2, 0), int)}, ValueError, r"shape \[2, 0\] has no tokens"),
        ({"input_ids": [[0.5]]}, ValueError, "expected integers"),
        (
            {"attention_mask": [[1, 1, 1]]},
            ValueError,
            r"attention_mask: shape \[1, 3\] differs",
        ),
        ({"segment_ids": [[1]]}, ValueError, "segment_ids: shape"),
        ({"segment_ids": [[0, 5]]}, ValueError, "segment_ids.*5"),
    ],
)
def test_wrong_inputs(change, error, message):
    with pytest.raises(error, match=message):
        tiny()(**{"input_ids": [[1, 2]], **change})


# ── encoding text ────────────────────────────────────────────────────────────────────────────────────────────────────


def sentences(count: int, longest: int) -> list[str]:
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(["the", "cat", "dog", "sat", "big"], 1 + i % longest)) for i in rng.permutation(count)]


@pytest.fixture(scope="module")
def encoded():
    """(model, texts, their vectors): the lengths, 3 to 22 tokens, fall into two buckets, one compiled shape each."""
    traced = jax.jit(chex.assert_max_traces(encoding.sentence_vectors, n=2), static_argnums=(3, 4, 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_sentence_vectors", traced)
        model, texts = tiny().replace(assets=assets(pooling=Pooling("mean", True))), sentences(64, 20)
        vectors = model.encode(texts, batch_size=8)
    return model, texts, vectors


def test_encode_keeps_the_order_and_equals_one_batch(encoded):
    model, texts, vectors = encoded
    assert vectors.shape == (64, 12) and vectors.dtype == np.float32
    rows = model.assets.tokenize(texts).ids
    longest = max(map(len, rows))
    ids = np.asarray([row + [0] * (longest - len(row)) for row in rows])
    mask = np.arange(longest) < np.asarray([[len(row)] for row in rows])
    hidden = np.asarray(model(ids, mask).last_hidden_state, np.float64)
    want = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    layers_of_sums = 8 * model.config.layers * EPS * math.sqrt(longest * model.config.feed_forward_width)
    np.testing.assert_allclose(vectors, want, rtol=0, atol=layers_of_sums)


def test_a_stream_equals_a_list(encoded, monkeypatch):
    model, texts, vectors = encoded
    monkeypatch.setattr(encoding, "_CHUNK", 16)
    drawn = []

    def stream():
        for text in texts:
            drawn.append(text)
            yield text

    parts = model.encode_stream(stream(), batch_size=8)
    first = next(parts)
    assert len(drawn) <= 17 and len(first) == 16  # nothing is read ahead
    got = np.concatenate([first, *parts])
    np.testing.assert_allclose(got, vectors, rtol=0, atol=64 * EPS)


def test_encode_of_one_text_and_of_none(encoded):
    model = encoded[0]
    assert model.encode([]).shape == (0, 12)
    assert model.encode(iter(())).shape == (0, 12)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        model.encode(["a"], batch_size=0)


@pytest.mark.slow
def test_a_single_text_gives_a_single_vector():
    model, text = tiny(), "the cat"
    assert model.encode(text).shape == (12,)
    np.testing.assert_allclose(model.encode(text), model.encode([text])[0])


def test_bucket_lengths():
    assert [bucket_length(n, 512) for n in (1, 8, 9, 33, 257, 400, 512)] == [8, 8, 12, 40, 384, 512, 512]
    assert bucket_length(30, 30) == 30 and bucket_length(3, 5) == 5
    assert len({bucket_length(n, 512) for n in range(1, 513)}) <= 19
    assert [bucket_length(n, 512, texts=9) for n in (1, 8, 17, 33, 257)] == [16, 16, 32, 64, 384]
    assert len({bucket_length(n, 512, texts=9) for n in range(1, 513)}) <= 7


@pytest.mark.parametrize("name", FORMATS)
def test_many_texts_and_few_give_the_same_vectors(name):
    """Few run on the stored formats; many on dequantized kernels and a dense table of the tokens that they hold."""
    model = tiny(name).replace(assets=assets(pooling=Pooling("mean", True)))
    texts = sentences(20, 6)
    few = np.concatenate([model.encode(texts[i : i + 4]) for i in range(0, 20, 4)])
    many = model.encode(texts, batch_size=4)
    np.testing.assert_allclose(many, few, rtol=0, atol=64 * EPS)


def test_truncation_warns_once_with_a_count(monkeypatch, caplog):
    """Over all chunks of a stream."""
    model = tiny().replace(assets=assets(max_length=6))
    monkeypatch.setattr(encoding, "_CHUNK", 4)
    seen = []

    def run(params, ids, mask, *rest):
        seen.append(mask.sum(1).max())
        return np.zeros((len(ids), 12), np.float32)

    monkeypatch.setattr(encoding, "_sentence_vectors", run)
    texts = ["cat " * n for n in (1, 9, 4, 5, 2, 30, 3, 8, 1)]
    with caplog.at_level(logging.WARNING, "flaxcompress"):
        model.encode(texts)
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 1 and messages[0].startswith("4 texts were longer than 6 tokens")
    assert max(seen) == 6
    caplog.clear()
    with caplog.at_level(logging.WARNING, "flaxcompress"):
        model.encode(["cat", "dog"])
    assert not caplog.records


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pooling(mode, normalize):
    x = np.random.default_rng(2).normal(size=(3, 5, 4)).astype(np.float32)
    mask = np.asarray([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    got = np.asarray(pool(jnp.asarray(x), jnp.asarray(mask), Pooling(mode, normalize)))
    for row in range(2):
        real = x[row][mask[row]].astype(np.float64)
        want = {"mean": real.mean(0), "cls": real[0], "max": real.max(0)}[mode]
        want = want / np.linalg.norm(want) if normalize else want
        np.testing.assert_allclose(got[row], want, rtol=0, atol=16 * EPS * np.abs(x).max())
    np.testing.assert_array_equal(got[2], 0)


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_gradients_of_padding_rows_are_zero(mode):
    """Calibration and healing fill their last batch with rows of padding; one NaN would spoil every gradient."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, 4)), jnp.float32)
    mask = jnp.asarray([[True, True, False], [False, False, False]])
    gradient = jax.grad(lambda x: (pool(x, mask, Pooling(mode, True)) * jnp.arange(4.0)).sum())(x)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[1], 0)
    assert np.abs(gradient[0]).max() > 0


def write_modules(folder, *kinds, pooling=None):
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{k}" if i else "", "type": f"sentence_transformers.models.{k}"}
        for i, k in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    "kinds, options, want",
    [
        (("Transformer", "Pooling"), {"pooling_mode_cls_token": True}, Pooling("cls", False)),
        (
            ("Transformer", "Pooling", "Normalize"),
            {"word_embedding_dimension": 12, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
            Pooling("mean", True),
        ),
        (("Transformer", "Pooling"), {"pooling_mode_max_tokens": True}, Pooling("max", False)),
        (("Transformer", "Pooling"), {"pooling_mode": "max"}, Pooling("max", False)),
        (("Transformer",), None, Pooling("mean", False)),
    ],
)
def test_pooling_is_read_from_modules(kinds, options, want, tmp_path):
    write_modules(tmp_path, *kinds, pooling=options)
    assert read_pooling(tmp_path) == want


@pytest.mark.parametrize(
    "kinds, options, message",
    [
        (("Transformer", "Pooling"), {"pooling_mode_mean_sqrt_len_tokens": True}, "is not supported"),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
            "not supported",
        ),
        (("Transformer", "Dense"), None, "module 'Dense' is not supported"),
    ],
)
def test_pooling_that_is_not_supported(kinds, options, message, tmp_path):
    write_modules(tmp_path, *kinds, pooling=options)
    with pytest.raises(ValueError, match=message):
        read_pooling(tmp_path)


def test_the_length_limit(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    assert read_assets(tmp_path, positions=32, source="x").max_length == 32
    for given, want in ((7, 7), (99, 32), (None, 32)):
        (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": given}))
        assert read_assets(tmp_path, positions=32, source="x").max_length == want


# ── tokenizers ───────────────────────────────────────────────────────────────────────────────────────────────────────

TRICKY = [
    "The cat's running!",
    "Naïve naive NAÏVE",
    "é É e\u0301 ÖÖ",
    "中文 the中cat",
    "a [MASK] cat [SEP] dog [CLS][PAD]",
    "[mask] [UNK]",
    "dogs,cats;!?...",
    "tab\tnewline\r\n zero\u200bwidth \x00 control \ufffd",
    "emoji 😀 cat",
    "İstanbul ß ﬁ Ａ",
    "",
    "   ",
    "x" * 200 + " cat",
    "a\u00a0b\u2028c\u3000d",
]


@pytest.mark.parametrize("lower", [True, False, None])
def test_vocab_txt_alone_equals_bert_tokenizer(lower, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", "utf-8")
    options = {} if lower is None else {"do_lower_case": lower}
    if lower is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path, **options)
    ours = read_assets(tmp_path, positions=512, source="x").tokenize(TRICKY)
    assert ours.truncated == 0
    for text, ids in zip(TRICKY, ours.ids, strict=True):
        assert ids == theirs(text)["input_ids"], text


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_vocab_txt_lines_end_only_at_newlines(newline, tmp_path):
    """Vocabularies hold characters that str.splitlines takes for line ends; every later id would be off by one."""
    odd = ["\u2028", "\x85", "\x1c"]
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *odd, "cat"]
    (tmp_path / "vocab.txt").write_bytes((newline.join(lines) + newline).encode())
    ids = read_assets(tmp_path, positions=9, source="x").tokenize(["cat"]).ids[0]
    assert ids == [2, 8, 3]


def test_truncation_and_padding_inside_tokenizer_json_are_ignored(tmp_path):
    from flaxcompress.tokenizer import make_tokenizer

    tokenizer = make_tokenizer((("vocab.txt", "\n".join(VOCABULARY).encode()),), 32)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = read_assets(tmp_path, positions=20, source="x").tokenize(["the " * 10, "cat"])
    assert [len(ids) for ids in found.ids] == [12, 3] and found.truncated == 0


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_very_small_limits_hold(limit):
    """Whatever is left of the text, no more tokens come out than the model has positions."""
    found = assets(max_length=limit).tokenize(["the cat sat"])
    assert len(found.ids[0]) <= limit and found.truncated == 1


# ── layers that share weights ────────────────────────────────────────────────────────────────────────────────────────

FOUR = ModelConfig(vocabulary=9, width=6, layers=4, heads=2, feed_forward_width=10, positions=8, norm_epsilon=1e-6)
EACH, ONE = (0, 1, 2, 3), (0, 0, 0, 0)
MAPS = {
    "own": (EACH, EACH, EACH),
    "all": (ONE, ONE, ONE),
    "cycle": ((0, 1, 0, 1), (0, 1, 0, 1), EACH),
    "sequence": ((0, 0, 1, 1), (0, 0, 1, 1), (0, 0, 1, 1)),
    "attention-only": (ONE, EACH, EACH),
    "cycle-rev": ((0, 1, 1, 0), (0, 1, 1, 0), (0, 1, 1, 0)),
    "feed-forward-only": (EACH, ONE, EACH),
    "uneven": ((0, 1, 1, 2), (0, 1, 2, 0), ONE),
}


def stacked(config: ModelConfig, seed=0):
    """Random `params["layers"]`."""
    rng = np.random.default_rng(seed)
    flat = {a: n for a, n in model_file.abstract_flat(config).items() if a.startswith("layers/")}
    flat = {a: jnp.asarray(rng.normal(size=n.shape) * 0.4, jnp.float32) for a, n in flat.items()}
    return tree.unflatten(flat)["layers"]


def batch(config: ModelConfig):
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(2, 5, config.width)), jnp.float32)
    return x, jnp.asarray([[True] * 5, [True, True, False, False, False]]), jnp.asarray(rng.normal(size=x.shape))


def per_layer(config: ModelConfig, layers) -> list[dict]:
    """The parameters of every layer, each a copy of its own, from the flat addresses."""
    flat = tree.flatten({"layers": layers})
    out = []
    for layer in range(config.layers):
        params = {}
        for part in FOUR.sharing.parts:
            prefix = f"layers/{getattr(config.sharing, part)[layer]}/{part}/"
            params[part] = tree.nest({a.removeprefix(prefix): n for a, n in flat.items() if a.startswith(prefix)})
        out.append(params)
    return out


@jax.jit
def unrolled(copies: list[dict], x, mask, c):
    def loss(copies):
        y = x
        for params in copies:
            y, *_ = Layer(FOUR, Sets()).apply({"params": params}, y, Context(mask=mask))
        return (y * c).sum(), y

    (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(copies)
    return y, gradients


@pytest.mark.parametrize("name", quick(MAPS, ["cycle-rev", "uneven"]))
def test_gradient_of_a_shared_set_is_the_sum_over_its_uses(name):
    config = FOUR.replace(sharing=Sharing(**dict(zip(FOUR.sharing.parts, MAPS[name], strict=True))))
    layers = stacked(config)
    x, mask, c = batch(config)

    @jax.jit
    def scanned(layers):
        def loss(layers):
            y = Stack(config).apply({"params": layers}, x, Context(mask=mask)).x
            return (y * c).sum(), y

        (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(layers)
        return y, gradients

    y, gradients = scanned(layers)
    want_y, want = unrolled(per_layer(config, layers), x, mask, c)
    # Sums of D and F terms, four layers deep, each layer enlarging what came before by about its norm's scale.
    rounding = 64 * config.layers * EPS * math.sqrt(config.feed_forward_width)
    np.testing.assert_allclose(y, want_y, rtol=0, atol=rounding * np.abs(want_y).max())
    found = tree.flatten({"layers": gradients})
    for address, gradient in found.items():
        _, number, part, rest = address.split("/", 3)
        uses = [i for i, s in enumerate(getattr(config.sharing, part)) if s == int(number)]
        parts = [functools.reduce(lambda node, key: node[key], rest.split("/"), want[i][part]) for i in uses]
        size = max(np.abs(p).max() for p in parts)
        atol = rounding * max(size, np.abs(c).max())
        np.testing.assert_allclose(gradient, sum(parts), rtol=0, atol=atol, err_msg=address)


@pytest.mark.parametrize("name", MAPS)
def test_a_shared_set_is_one_leaf(name):
    config = FOUR.replace(sharing=Sharing(**dict(zip(FOUR.sharing.parts, MAPS[name], strict=True))))
    layers = stacked(config)
    for part, sets in zip(config.sharing.parts, MAPS[name], strict=True):
        assert list(layers[part]) == ["000"]
        assert {leaf.shape[0] for leaf in jax.tree.leaves(layers[part])} == {len(set(sets))}
    counted = sum(leaf.size for leaf in jax.tree.leaves(layers))
    everything = sum(leaf.size for leaf in jax.tree.leaves(stacked(FOUR)))
    assert (counted < everything) == (name != "own")


@pytest.mark.parametrize("name", ["split", pytest.param("split-and-shared", marks=pytest.mark.slow)])
def test_runs_of_different_formats_equal_the_loop(name):
    """Layers whose formats differ are scanned in pieces."""
    config = FOUR.with_format("layers/1/feed_forward/up/kernel", {"kind": "low_rank", "rank": 3})
    if name == "split-and-shared":
        config = config.replace(sharing=Sharing(attention=(0, 1, 0, 1), feed_forward=(0, 0, 1, 1), norms=ONE))
    rng = np.random.default_rng(0)
    flat = {a: n for a, n in model_file.abstract_flat(config).items() if a.startswith("layers/")}
    flat = jax.tree.map(lambda n: jnp.asarray(rng.normal(size=n.shape) * 0.4, jnp.float32), flat)
    layers = tree.unflatten(flat)["layers"]
    assert len(layers["feed_forward"]) > 1
    x, mask, c = batch(config)
    dense = [jax.tree.map(_dense, p, is_leaf=lambda n: isinstance(n, LowRank)) for p in per_layer(config, layers)]
    out = jax.jit(
        lambda layers: Stack(config).apply({"params": layers}, x, Context(mask=mask), need_hidden_states=True)
    )(layers)
    want, _ = unrolled(dense, x, mask, c)
    rounding = 64 * config.layers * EPS * math.sqrt(config.feed_forward_width)
    np.testing.assert_allclose(out.x, want, rtol=0, atol=rounding * np.abs(want).max())
    assert out.hidden_states.shape == (4, *x.shape)
    np.testing.assert_array_equal(out.hidden_states[0], x)


def _dense(node):
    return node.materialize() if isinstance(node, LowRank) else node


@pytest.mark.slow
def test_dropout_of_layer_l_draws_from_the_folded_key():
    config = FOUR.replace(dropout=0.3, attention_dropout=0.2)
    layers = stacked(config)
    x, mask, _ = batch(config)
    key = jax.random.key(3)

    @jax.jit
    def scanned(layers):
        return (
            Stack(config).apply({"params": layers}, x, Context(mask=mask), deterministic=False, rngs={"dropout": key}).x
        )

    @jax.jit
    def loop(copies, key):
        y = x
        for number, params in enumerate(copies):
            rngs = {"dropout": jax.random.fold_in(key, number)}
            y, *_ = Layer(config, Sets()).apply(
                {"params": params}, y, Context(mask=mask), deterministic=False, rngs=rngs
            )
        return y

    got = scanned(layers)
    assert not np.allclose(got, jax.jit(lambda p: Stack(config).apply({"params": p}, x, Context(mask=mask)).x)(layers))
    # Linen derives the module's key from its path: ask it for the one that the scan folds.
    derived = Stack(config).apply({"params": layers}, rngs={"dropout": key}, method=lambda m: m.make_rng("dropout"))
    want = loop(per_layer(config, layers), derived)
    rounding = 64 * config.layers * EPS * math.sqrt(config.feed_forward_width)
    np.testing.assert_allclose(got, want, rtol=0, atol=rounding * np.abs(want).max())

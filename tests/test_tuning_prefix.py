"""Prefix tuning: what it computes, beside a naive forward pass and PEFT, with caches, masks and kinds of models."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from quick import quick

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.config import Latent, Linformer, Nystrom, Rotary
from flaxcompress.tuning import Prefix, Tuning

EPS = float(np.finfo(np.float32).eps)
KEY = jax.random.key(0)
P = 3
IDS = np.asarray([[2, 5, 7, 9, 3, 1], [2, 8, 3, 0, 0, 0]])
MASK = np.asarray([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
SMALL = {"vocabulary": 20, "width": 16, "layers": 3, "heads": 4, "feed_forward_width": 24, "positions": 12}
LLAMA = {"causal": True, "norm": "rms", "norm_place": "pre", "gated": True, "final_norm": True, "segments": 0}
LLAMA |= {"position_embedding": "none", "embedding_norm": False, "pooler": False, "rotary": Rotary()}
DECODER = {"positions": 12, "causal": True, "pooler": False, "width": 16, "vocabulary": 0, "heads": 2, "layers": 2}
STRUCTURES = {
    "bert": {},
    "roberta": {"position_offset": 2, "pad_token": 0},
    "llama": {**LLAMA, "key_value_heads": 2},
    "norms": {**LLAMA, "query_key_norm": True, "query_key_width": 2},
    "window": {**LLAMA, "window": 2, "local": (True, False, True)},
    "ring": {**LLAMA, "window": 2},
    "bias": {"relative_buckets": 8, "relative_distance": 16},
    "albert": {"sharing": "all"},
    "seq2seq": {
        "decoder": fc.ModelConfig(
            **DECODER, feed_forward_width=20, sharing=fc.Sharing.own(2, cross_attention=True), segments=0
        ),
        "head": "seq2seq_lm",
    },
}
CAUSAL = [name for name, fields in STRUCTURES.items() if fields.get("causal")]


def tiny(**more):
    return fc.Model.init(fc.ModelConfig(**{**SMALL, "initializer_range": 0.3, **more}), key=KEY)


def prefixed(model, length=P):
    return fc.with_prefix(model, length=length, key=jax.random.key(1))


def output(model, ids=IDS, mask=MASK):
    decodes = {} if model.config.decoder is None else {"decoder_input_ids": IDS}
    return np.asarray(model(ids, mask, **decodes).last_hidden_state)


def close(got, want, terms=64):
    np.testing.assert_allclose(got, want, rtol=0, atol=terms * EPS * np.abs(np.asarray(want)).max())


@pytest.mark.parametrize("name", quick(STRUCTURES, {"bert", "seq2seq"}))
def test_there_are_so_many_keys_and_values_and_they_count(name):
    model = tiny(**STRUCTURES[name])
    with_prefix = prefixed(model)
    stacks = [c for c in (with_prefix.config, with_prefix.config.decoder) if c is not None]
    widths = [c.sharing.sets("attention") * c.groups * (c.query_key_dim + c.head_dim) for c in stacks]
    assert with_prefix.parameters - model.parameters == P * sum(widths)
    assert np.abs(output(with_prefix) - output(model)).max() > 1e-2
    assert fc.ModelConfig.from_json(json.loads(json.dumps(with_prefix.config.to_json()))) == with_prefix.config
    assert with_prefix.config.positions == 9
    with pytest.raises(ValueError, match="positions"):
        with_prefix(np.ones((1, 10), int))


def test_attention_is_that_of_a_naive_forward_pass():
    """One layer of a BERT in float64 numpy: softmax over the prefix and the real tokens."""
    model = prefixed(tiny(layers=1))
    flat = {a: np.asarray(x, np.float64) for a, x in tree.flatten(model.params).items()}
    x = flat["embedding/token"][IDS] + flat["embedding/position"][P : P + 6] + flat["embedding/segment"][0]

    def norm(x, at):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * flat[f"{at}/scale"] + flat[f"{at}/bias"]

    def linear(x, at):
        return x @ flat[f"{at}/kernel"] + flat[f"{at}/bias"]

    def heads(y):
        return y.reshape(*y.shape[:-1], 4, 4)

    x, at = norm(x, "embedding/norm"), "layers/0/attention"
    query = heads(linear(x, f"{at}/query"))
    keys, values = (
        np.stack([np.concatenate([heads(flat[f"{at}/prefix/{n}"]), row]) for row in heads(linear(x, f"{at}/{n}"))])
        for n in ("key", "value")
    )
    scores = np.einsum("bthd,bshd->bhts", query, keys) / 2
    seen = np.concatenate([np.ones((2, P)), MASK], 1)[:, None, None] > 0
    p = np.where(seen, np.exp(scores), 0)
    y = np.einsum("bhts,bshd->bthd", p / p.sum(-1, keepdims=True), values).reshape(2, 6, 16)
    x = norm(x + linear(y, f"{at}/output"), "layers/0/norms/attention")
    inner = linear(x, "layers/0/feed_forward/up")
    erf = np.vectorize(__import__("math").erf)
    inner = inner * (1 + erf(inner / np.sqrt(2))) / 2
    want = norm(x + linear(inner, "layers/0/feed_forward/down"), "layers/0/norms/feed_forward")
    got = model(IDS, MASK, output_attentions=True)
    close(np.asarray(got.last_hidden_state)[MASK > 0], want[MASK > 0])
    close(np.asarray(got.attentions[0]), p / p.sum(-1, keepdims=True))


@pytest.mark.parametrize("name", quick(CAUSAL, {"window"}))
def test_decoding_with_a_cache_equals_the_whole(name):
    model = prefixed(tiny(**STRUCTURES[name]))
    want = np.asarray(model(IDS, np.ones_like(IDS)).last_hidden_state)
    cache = model.new_cache(2, 6)
    found = []
    for at in (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 6)):
        out = model(IDS[:, at], cache=cache)
        cache = out.cache
        found.append(np.asarray(out.last_hidden_state))
    close(np.concatenate(found, 1), want)


@pytest.mark.parametrize("name", quick(STRUCTURES, {"roberta", "window", "seq2seq"}))
def test_a_saved_folder_computes_the_same_here_and_in_pytorch(name, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = prefixed(tiny(**STRUCTURES[name]))
    fc.save(model, tmp_path / "m")
    want = output(model)
    np.testing.assert_array_equal(output(fc.load(tmp_path / "m")), want)
    auto = transformers.AutoModelForSeq2SeqLM if name == "seq2seq" else transformers.AutoModel
    net = auto.from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
    given = {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)}
    if name == "seq2seq":
        given |= {"decoder_input_ids": torch.tensor(IDS)}
        want = np.asarray(model(IDS, MASK, decoder_input_ids=IDS).logits)
    with torch.no_grad():
        found = net(**given)
    found = (found.logits if name == "seq2seq" else found.last_hidden_state).numpy()
    real = np.ones_like(MASK) > 0 if name == "seq2seq" else MASK > 0
    close(found[real], want[real], 256)


@pytest.mark.slow
def test_pytorch_generates_the_same(tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = prefixed(tiny(**STRUCTURES["llama"], head="causal_lm"))
    fc.save(model, tmp_path / "m")
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
    prompt = [2, 5, 7]
    want = model.generate([prompt], max_new_tokens=5, return_ids=True)
    with torch.no_grad():
        found = net.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert found[0, 3:].tolist() == list(want[0].ids)


@pytest.mark.parametrize(
    "kind",
    [
        Latent(key_value_rank=4, rotary_width=2, plain_width=2, value_width=4),
        Linformer(length=4),
        Nystrom(landmarks=2),
    ],
    ids=lambda kind: kind.kind,
)
def test_kinds_of_attention_without_a_place_for_it_are_refused(kind):
    model = tiny(attention=kind)
    with pytest.raises(ValueError, match=f"prefix: {kind.kind} attention has no keys and values beside"):
        prefixed(model)
    with pytest.raises(ValueError, match=r"goes with prefix_length=0 only"):
        fc.ModelConfig(**SMALL, attention=kind, prefix_length=2)


def test_lengths_that_cannot_be():
    model = tiny()
    for length in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="length must be a positive integer"):
            prefixed(model, length)
    with pytest.raises(ValueError, match="length 12 leaves none of the 12 positions"):
        prefixed(model, 12)
    with pytest.raises(ValueError, match="has one already"):
        prefixed(prefixed(model))
    with pytest.raises(ValueError, match="prefix: length must be a positive integer, got 0"):
        Tuning.read({"name": "prefix", "length": 0}, "x")
    assert Tuning.read({"name": "prefix", "length": 4}, "x") == Prefix(length=4)


# ── PEFT's folders ───────────────────────────────────────────────────────────────────────────────────────────────────


def stock(kind, **more):
    """A class of transformers' and a config of random weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
        config = transformers.GPT2Config(vocab_size=20, **{**shape, **more}, initializer_range=0.3)
        return transformers.GPT2LMHeadModel, config
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 24, "max_position_embeddings": 16}
    config = transformers.LlamaConfig(vocab_size=20, **{**shape, **more}, initializer_range=0.3)
    return transformers.LlamaForCausalLM, config


def peft_logits(theirs, ids=IDS, mask=MASK):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()


@pytest.mark.parametrize("kind", quick(["gpt2", "llama"], {"llama"}))
def test_peft_computes_the_same_from_our_folder_and_we_from_theirs(kind, tmp_path):
    peft = pytest.importorskip("peft")
    auto, config = stock(kind)
    auto(config).eval().save_pretrained(tmp_path / "base")
    base = fc.load(tmp_path / "base")
    ours = prefixed(base)
    fc.export(ours, tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "ours").eval()
    real = MASK > 0
    want = peft_logits(theirs)[real]
    assert np.abs(want - np.asarray(base(IDS, MASK).logits)[real]).max() > 0.01
    close(np.asarray(ours(IDS, MASK).logits)[real], want, 256)
    jax.tree.map(np.testing.assert_array_equal, fc.load_adapter(base, tmp_path / "ours").params, ours.params)
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    made = peft.get_peft_model(auto.from_pretrained(tmp_path / "base"), settings).eval()
    made.save_pretrained(tmp_path / "theirs")
    again = fc.load_adapter(base, tmp_path / "theirs")
    close(np.asarray(again(IDS, MASK).logits)[real], peft_logits(made)[real], 256)


@pytest.mark.slow
def test_peft_has_the_head_of_a_classifier_too(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    _, config = stock("llama", num_labels=3, pad_token_id=0)
    auto = transformers.LlamaForSequenceClassification
    auto(config).eval().save_pretrained(tmp_path / "base")
    base = fc.load(tmp_path / "base")
    ours = prefixed(base)
    ours = ours.replace(params=tree.replace(ours.params, {"head/output/kernel": 0.1 * np.ones((16, 3), np.float32)}))
    fc.export(ours, tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "ours").eval()
    want = peft_logits(theirs)
    close(np.asarray(ours(IDS, MASK).logits), want, 256)
    close(np.asarray(fc.load_adapter(base, tmp_path / "ours")(IDS, MASK).logits), want, 256)


def test_what_peft_cannot_have_is_refused(tmp_path):
    auto, config = stock("gpt2")
    auto(config).save_pretrained(tmp_path / "base")
    ours = prefixed(fc.load(tmp_path / "base"))
    fc.export(ours, tmp_path / "ours", format="peft")
    for name, more in (("deep", {"n_layer": 3}), ("wide", {"n_embd": 24})):
        auto(stock("gpt2", **more)[1]).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=r"made for another model: prompt_embeddings is \[3, 64\], for 2 layers"):
            fc.load_adapter(fc.load(tmp_path / name), tmp_path / "ours")
    with pytest.raises(ValueError, match="PEFT has prefixes for causal models alone"):
        fc.export(prefixed(tiny()), tmp_path / "no", format="peft")
    with pytest.raises(ValueError, match="PEFT has prefixes for causal models alone"):
        fc.load_adapter(tiny(), tmp_path / "ours")
    with pytest.raises(ValueError, match="has one already"):
        fc.load_adapter(ours, tmp_path / "ours")
    with pytest.raises(ValueError, match="in PEFT not from beyond a window"):
        fc.export(prefixed(tiny(**STRUCTURES["window"])), tmp_path / "no", format="peft")
    with pytest.raises(ValueError, match="a prefix or adapters, not both"):
        fc.export(fc.with_lora(ours, rank=2, key=KEY), tmp_path / "no", format="peft")
    with pytest.raises(ValueError, match="stock gpt2 folders have prefix_length 0, not 3"):
        fc.export(ours, tmp_path / "no", format="torch-dense")
    assert not (tmp_path / "no").exists()

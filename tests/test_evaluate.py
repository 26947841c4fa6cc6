"""Tasks of `evaluate` against transformers, sacrebleu and naive loops, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import math
import types

import jax
import numpy as np
import pytest
from tiny_models import make_model, make_sentences, words

import flaxcompress as fc
from flaxcompress.config import Classifier, Patches
from flaxcompress.data import Corpus, Images, masked_lm_batches, train_tokenizer, vocabulary_size
from flaxcompress.data.conll import Tagged
from flaxcompress.data.frame import whole_tokenizer
from flaxcompress.data.images import pixel_scale, with_pixel_scale
from flaxcompress.evaluate import TASKS, evaluate
from flaxcompress.evaluate.classes import agreement, macro_f1, matthews
from flaxcompress.evaluate.entities import entity_scores
from flaxcompress.evaluate.tasks.next_tokens import windows_of
from flaxcompress.text import pad_ids

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = words(40)
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
RELATIVE = 2e-5  # float32 through two narrow layers
NAMES = ("good", "bad", "odd")


def perturbed(network, seed=0):
    """Matrices of deviation 1, and no biases: predictions then differ from text to text."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return network.eval()


def bert(kind, folder, *, seed=0, names=NAMES, **more):
    """transformers' BERT with a head, its folder with a tokenizer, and our model of it."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=24, **TINY, **labels, **more)
    network = perturbed(getattr(transformers, f"BertFor{kind}")(config), seed)
    network.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return network, fc.load(folder)


def tokenizer(folder):
    found = transformers.BertTokenizerFast.from_pretrained(folder)
    assert found("aa zz ac").input_ids == [2, 5, 1, 7, 3]
    return found


# ── classification ───────────────────────────────────────────────────────────────────────────────────────────────────


def wanted_classes(network, folder, texts):
    """One text at a time, so without padding."""
    tokenize = tokenizer(folder)
    with torch.no_grad():
        rows = [
            tokenize(*((t,) if isinstance(t, str) else t), return_tensors="pt", truncation=True, max_length=24)
            for t in texts
        ]
        return np.array([network(**row).logits[0].numpy() for row in rows])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    return (*bert("SequenceClassification", folder), folder)


@pytest.mark.parametrize("pairs", [False, True])
def test_classification_equals_transformers(classifier, pairs, tmp_path):
    network, model, folder = classifier
    texts = make_sentences(WORDS, 40)
    texts = list(zip(texts[:20], texts[20:], strict=True)) if pairs else texts
    logits = wanted_classes(network, folder, texts)
    labels = np.random.default_rng(0).integers(0, 3, len(texts))
    rows = [(*((t,) if isinstance(t, str) else t), NAMES[c]) for t, c in zip(texts, labels, strict=True)]
    columns = ("one", "two", "kind") if pairs else ("one", "kind")
    path = tmp_path / "data.tsv"
    path.write_text("\n".join("\t".join(row) for row in (columns, *rows)) + "\n")
    found = evaluate(model, "classification", data=path, columns=columns, batch_size=7)
    assert (found["data"], found["n"]) == ("data.tsv", len(texts))
    assert found["accuracy"] == agreement(labels, logits.argmax(-1)) and len(set(logits.argmax(-1))) > 1
    assert math.isclose(found["macro_f1"], macro_f1(labels, logits.argmax(-1)))
    assert "matthews" not in found and set(found["f1_by_class"]) <= set(NAMES)
    assert evaluate(model, "classification", data=rows) == {**found, "data": "given texts"}


def test_labels_mean_classes_by_name_then_by_number(classifier, tmp_path):
    _, model, _ = classifier
    texts = make_sentences(WORDS, 12)
    ids, mask = pad_ids(model.assets.tokenize(texts).ids, 24, 12, 0)
    own = np.asarray(model(ids, mask).logits).argmax(-1).tolist()
    assert len(set(own)) > 1
    for spell in (NAMES.__getitem__, lambda c: NAMES[c].upper(), str, int):
        rows = [(text, spell(c)) for text, c in zip(texts, own, strict=True)]
        assert evaluate(model, "classification", data=rows)["accuracy"] == 1.0
    rows = [(text, ("x", "y", "z")[c]) for text, c in zip(texts, own, strict=True)]
    assert evaluate(model, "classification", data=rows, labels=("x", "y", "z"))["accuracy"] == 1.0
    assert evaluate(model, "classification", data=rows, labels=("x", "y", "z"), hold_out=5)["n"] == 5
    with pytest.raises(ValueError, match="the model has no class 'x'; known: bad, good, odd"):
        evaluate(model, "classification", data=[(texts[0], "x"), (texts[1], "good")])
    with pytest.raises(ValueError, match="labels must name the model's 3 classes in order, each once; got 2"):
        evaluate(model, "classification", data=rows, labels=("x", "y"))
    stars = model.replace(assets=dataclasses.replace(model.assets, classes=("1", "2", "3")))
    rows = [(text, str(c + 1)) for text, c in zip(texts, own, strict=True)]
    assert evaluate(stars, "classification", data=rows)["accuracy"] == 1.0
    with pytest.raises(ValueError, match="'Good' and 'good' mean the same class"):
        evaluate(model, "classification", data=[(texts[0], "good"), (texts[1], "Good")])
    nameless = model.replace(assets=dataclasses.replace(model.assets, classes=()))
    with pytest.raises(ValueError, match=r"labels are .*z.*does not name its 3 classes.*--labels"):
        evaluate(nameless, "classification", data=[*rows, (texts[0], "z")])
    with pytest.raises(ValueError, match="the model has no class '3'"):
        evaluate(model, "classification", data=[(texts[0], 3), (texts[1], 3)])


def test_agreement_of_models_that_count_classes_differently(classifier):
    _, model, _ = classifier
    texts = make_sentences(WORDS, 30)
    order = np.array([2, 0, 1])  # the reference's class c is ours number order[c]
    output = jax.tree.map(lambda x: x[..., order], model.params["head"]["output"])
    params = {**model.params, "head": {**model.params["head"], "output": output}}
    assets = dataclasses.replace(model.assets, classes=tuple(NAMES[i] for i in order))
    reference = model.replace(params=params, assets=assets)
    rows = [(text, NAMES[i % 3]) for i, text in enumerate(texts)]
    found = evaluate(model, "classification", data=rows, reference=reference)
    assert found["agreement"] == 1.0 and found["reference_accuracy"] == found["accuracy"]
    alone = evaluate(reference, "classification", data=rows)
    assert alone["accuracy"] == found["accuracy"] < 1.0


def test_two_classes_have_matthews_and_one_class_is_a_number(tmp_path):
    network, model = bert("SequenceClassification", tmp_path, names=("no", "yes"))
    texts = make_sentences(WORDS, 20)
    logits = wanted_classes(network, tmp_path, texts)
    labels = np.arange(20) % 2
    found = evaluate(model, "classification", data=[(t, int(c)) for t, c in zip(texts, labels, strict=True)])
    assert math.isclose(found["matthews"], matthews(labels, logits.argmax(-1)))
    (tmp_path / "number").mkdir()
    network, model = bert("SequenceClassification", tmp_path / "number", names=(), num_labels=1)
    scores = np.random.default_rng(0).normal(size=20).astype(np.float32)
    given = wanted_classes(network, tmp_path / "number", texts)[:, 0]
    found = evaluate(model, "classification", data=[(t, s) for t, s in zip(texts, scores, strict=True)])
    assert math.isclose(found["pearson"], np.corrcoef(scores, given)[0, 1], abs_tol=RELATIVE)
    assert math.isclose(found["mean_squared_error"], np.mean((scores - given) ** 2), rel_tol=RELATIVE)


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("sentence\tlabel\n", (), "holds no labelled texts"),
        ("sentence\tkind\na b\tgood\n", (), "no column 'label'"),
        ("sentence\tlabel\na b\tgood\n", ("sentense", "label"), "no column 'sentense'.*did you mean 'sentence'"),
        ("sentence\tlabel\na b\tgood\nc d\n", (), "line 3: 1 columns"),
        ("sentence\tlabel\na b\tgood\n", ("sentence",), "columns are those of text and label"),
        ("", (), "the file is empty"),
    ],
)
def test_labelled_files_that_cannot_be_read(classifier, content, columns, message, tmp_path):
    (tmp_path / "a.tsv").write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate(classifier[1], "classification", data=tmp_path / "a.tsv", columns=columns)


def test_names_of_classes_go_with_a_folder(classifier, tmp_path):
    _, model, _ = classifier
    assert model.assets.classes == NAMES
    fc.save(model, tmp_path / "own")
    fc.export(model, tmp_path / "stock", format="torch-dense")
    for folder in (tmp_path / "own", tmp_path / "stock"):
        assert fc.load(folder).assets.classes == NAMES
        stated = json.loads((folder / "config.json").read_text())
        assert tuple(stated["id2label"].values()) == NAMES and stated["label2id"]["bad"] == 1
    fresh = fc.with_head(model, "sequence_classification", classes=4, key=jax.random.key(0))
    assert fresh.assets.classes == ()


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────

TAGS = ("O", "B-per", "I-per", "B-loc", "I-loc")


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tagger")
    return (*bert("TokenClassification", folder, names=TAGS, seed=5), folder)


def test_tokens_equal_transformers(tagger):
    network, model, folder = tagger
    rng = np.random.default_rng(0)
    sentences = [rng.choice(["aa", "ac", "abx", "zz", "ad"], n).tolist() for n in (3, 9, 1, 6)]  # zz, abx: unknown
    tags = [[TAGS[i] for i in rng.integers(0, 5, len(row))] for row in sentences]
    tokenize, want = tokenizer(folder), []
    for row in sentences:
        batch = tokenize(row, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            best = network(**batch).logits[0].argmax(-1).tolist()
        places = batch.word_ids()
        want.append([TAGS[best[places.index(word)]] for word in range(len(row))])
    found = evaluate(model, "tokens", data=Tagged(sentences, tags), reference=model)
    scores = entity_scores(tags, want)
    assert {name: found[name] for name in scores} == scores and len({tag for row in want for tag in row}) > 2
    assert found["agreement"] == 1.0 and found["reference_f1"] == found["f1"] and found["words"] == 19
    perfect = evaluate(model, "tokens", data=Tagged(sentences, want))
    assert perfect["f1"] == perfect["accuracy"] == 1.0 and len(perfect["f1_by_kind"]) > 0


def test_every_word_of_a_long_sentence_has_a_tag(tagger, caplog):
    network, model, folder = tagger
    row = np.random.default_rng(1).choice(WORDS[5:], 50).tolist()
    tokenize, want = tokenizer(folder), []
    for start in range(0, 50, 22):  # 24 tokens, two of them special
        batch = tokenize(row[start : start + 22], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            want += [TAGS[c] for c in network(**batch).logits[0].argmax(-1).tolist()[1:-1]]
    assert len(set(want)) > 2
    assert evaluate(model, "tokens", data=Tagged([row], [want]))["accuracy"] == 1.0
    assert "over 24 tokens were read in parts" in caplog.text


@pytest.mark.parametrize(
    ("tags", "message"),
    [(["S-per"], "must be O, B-… or I-…"), (["B-thing"], "the model has no class 'B-thing'; known: B-loc, B-per")],
)
def test_unknown_tags_are_refused(tagger, tags, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tagger[1], "tokens", data=Tagged([["aa"]], [tags]))


# ── language models ──────────────────────────────────────────────────────────────────────────────────────────────────

STORY = "the cat sees a small dog . the dog likes the river and the old tree . one bird finds two stones ."


def llama(folder, seed, *, bos=True, positions=48):
    """transformers' Llama with a tokenizer of bytes that puts <s> before a text, or nothing."""
    assets = train_tokenizer([STORY] * 4, "bpe", vocabulary=290, model="decoder")
    config = transformers.LlamaConfig(vocab_size=300, max_position_embeddings=positions, **TINY)
    network = perturbed(transformers.LlamaForCausalLM(config), seed)
    network.save_pretrained(folder)
    for name, content in assets.files:
        if name == "tokenizer.json" and not bos:
            content = json.dumps({**json.loads(content), "post_processor": None}).encode()
        (folder / name).write_bytes(content)
    return network, fc.load(folder)


def stories(count, words_each):
    rng = np.random.default_rng(count)
    return [" ".join(rng.choice(STORY.split(), words_each)) for _ in range(count)]


def token_logits(network, ids):
    with torch.no_grad():
        return torch.log_softmax(network(torch.tensor([ids])).logits[0].double(), -1).numpy()


@pytest.mark.parametrize("bos", [True, False])
def test_loss_and_divergence_equal_transformers(bos, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    network, model = llama(tmp_path / "a", 0, bos=bos)
    other, reference = llama(tmp_path / "b", 1, bos=bos)
    texts = [*stories(3, 8), "é", "at once"]
    found = evaluate(model, "lm", data=texts, reference=reference)
    nats = their_nats = divergence = same = right = count = size = 0.0
    for text in texts:
        ids = model.assets.tokenize([text]).ids[0]
        assert (ids[0] == 1) == bos
        with torch.no_grad():
            nats += float(network(torch.tensor([ids]), labels=torch.tensor([ids])).loss) * (len(ids) - 1)
        ours, theirs = token_logits(network, ids)[:-1], token_logits(other, ids)[:-1]
        their_nats -= theirs[np.arange(len(ids) - 1), ids[1:]].sum()
        divergence += (np.exp(theirs) * (theirs - ours)).sum()
        same += (ours.argmax(-1) == theirs.argmax(-1)).sum()
        right += (ours.argmax(-1) == ids[1:]).sum()
        count += len(ids) - 1
        known = "" if bos else model.assets.detokenize([ids[:1]])[0]
        size += len(text.encode()) - (len(known.encode()) if text != "é" or bos else 2)  # é: two tokens, one character
    assert (found["n"], found["tokens"], found["bytes"]) == (5, count, size)
    for name, want in (
        ("nats_per_token", nats / count),
        ("perplexity", math.exp(nats / count)),
        ("bits_per_byte", nats / math.log(2) / size),
        ("reference_nats_per_token", their_nats / count),
        ("kl_per_token", divergence / count),
    ):
        assert math.isclose(found[name], want, rel_tol=10 * RELATIVE), name
    assert (found["agreement"], found["accuracy"]) == (same / count, right / count)
    assert evaluate(model, "lm", data=texts, reference=model)["kl_per_token"] == pytest.approx(0, abs=1e-5)


def test_long_documents_are_read_in_windows(tmp_path):
    network, model = llama(tmp_path, 0, positions=16)
    text = stories(1, 30)[0]
    ids = whole_tokenizer(model.assets).encode(text).ids
    assert len(ids) > 24
    nats, known = 0.0, 1
    while known < len(ids):  # by the definition: each token once, after at least 8 others but at the document's start
        begin = max(0, known - 8)
        log_p = token_logits(network, ids[begin : begin + 16])
        stop = min(len(ids), begin + 16)
        nats -= sum(log_p[i - begin - 1, ids[i]] for i in range(known, stop))
        known = stop
    found = evaluate(model, "lm", data=[text])
    assert (found["tokens"], found["length"]) == (len(ids) - 1, 16)
    assert math.isclose(found["nats_per_token"], nats / (len(ids) - 1), rel_tol=10 * RELATIVE)


@pytest.mark.parametrize("length", [2, 3, 8, 50])
@pytest.mark.parametrize("count", [1, 2, 9, 40])
def test_windows_count_every_id_but_the_first_once(count, length):
    seen = []
    for window, first in windows_of(range(count), length):
        assert len(window) <= length and (first >= length // 2 or window[0] == 0)
        seen += window[first:]
    assert seen == list(range(1, count))


def test_documents_apart_by_a_separator(tmp_path):
    _, model = llama(tmp_path, 0)
    texts = stories(4, 6)
    path = tmp_path / "text.txt"
    path.write_text("\n<|end|>\n".join(f"{a}\n{a}" for a in texts))
    found = evaluate(model, "lm", data=path, separator="<|end|>")
    want = evaluate(model, "lm", data=[f"{a}\n{a}" for a in texts])
    assert found == {**want, "data": "text.txt"} and found["n"] == 4
    last = evaluate(model, "lm", data=path, separator="<|end|>", hold_out=1)
    assert last == {**evaluate(model, "lm", data=[f"{texts[3]}\n{texts[3]}"]), "data": "text.txt"}
    assert evaluate(model, "lm", data=path, hold_out=2)["n"] == 2


def test_other_vocabularies_are_compared_by_bytes(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    (_, model), (_, reference) = llama(tmp_path / "a", 0), llama(tmp_path / "b", 1, bos=False)
    found = evaluate(model, "lm", data=stories(3, 8), reference=reference)
    alone = evaluate(reference, "lm", data=stories(3, 8))
    assert found["reference_bits_per_byte"] == alone["bits_per_byte"] and found["kl_per_token"] is None


@pytest.mark.parametrize("head", ["masked_lm", "pretraining"])
def test_masked_tokens_equal_a_naive_count(head):
    config = {
        "width": 16,
        "layers": 1,
        "feed_forward_width": 24,
        "positions": 32,
        "head": head,
        "initializer_range": 0.5,
    }
    models = [make_model(WORDS, key=k, **config, **({"classes": 2} if head == "pretraining" else {})) for k in (0, 1)]
    model, reference = models
    texts = [". ".join(a.capitalize() for a in make_sentences(WORDS, 30)[i : i + 3]) for i in range(0, 30, 3)]
    options = {"length": 24, "batch_size": 4, "seed": 3, "mask_rate": 0.3}
    found = evaluate(model, "lm", data=texts, reference=reference, **options)
    batches = masked_lm_batches(
        Corpus(texts), model.assets, sentence_order=head == "pretraining", epochs=1, shuffle=False, **options
    )
    nats, right, count, orders, divergence = 0.0, 0, 0, [], 0.0
    for batch in batches:
        out = [one(batch["input_ids"], batch["attention_mask"], batch["segment_ids"]).logits for one in models]
        logits = [np.asarray(getattr(each, "masked_lm", each), np.float64) for each in out]
        for row, labels in enumerate(batch["labels"]):
            for position, label in zip(batch["label_positions"][row], labels, strict=True):
                if label < 0:
                    continue
                ours, theirs = (x[row, position] - np.log(np.exp(x[row, position]).sum()) for x in logits)
                nats, right, count = nats - ours[label], right + (ours.argmax() == label), count + 1
                divergence += float((np.exp(theirs) * (theirs - ours)).sum())
        if head == "pretraining":
            best = np.asarray(out[0].sentence_order).argmax(-1)
            orders += [a == b for a, b in zip(best, batch["order_labels"], strict=True) if b >= 0]
    assert (found["tokens"], found["n"], found["seed"]) == (count, batches.rows, 3)
    assert found["accuracy"] == right / count and right > 0
    assert math.isclose(found["nats_per_token"], nats / count, rel_tol=RELATIVE)
    assert math.isclose(found["kl_per_token"], divergence / count, rel_tol=10 * RELATIVE)
    assert found.get("sentence_order_accuracy") == (np.mean(orders) if orders else None)
    assert ("reference_sentence_order_accuracy" in found) == (head == "pretraining")


# ── translation, images, zero-shot ───────────────────────────────────────────────────────────────────────────────────

PAIRS = [("b b b", "it is a red house"), ("a", "hello there my friend"), ("c c", "two dogs and a cat sit")]


class Translator:
    """Stands for a model: what it says follows from the number of words."""

    def __init__(self, said):
        self.said, self.calls = said, []
        self.config = types.SimpleNamespace(
            head="seq2seq_lm", decoder=types.SimpleNamespace(positions=64), patches=None
        )
        self.assets = types.SimpleNamespace(max_length=8, tokenize=self.tokenize)

    def tokenize(self, texts):
        return types.SimpleNamespace(ids=[[7] * len(text.split()) for text in texts], truncated=0)

    def generate(self, rows, *, max_new_tokens, beams):
        self.calls.append((len(rows), max_new_tokens, beams))
        return [f" {self.said[len(row)]} " for row in rows]


def test_translation_scores_are_sacrebleus(tmp_path):
    sacrebleu = pytest.importorskip("sacrebleu")
    said = {3: "it is a red house today", 1: "hello there friend", 2: "two dogs and one cat sit"}
    model, reference = Translator(said), Translator({n: "two dogs and a cat" for n in said})
    found = evaluate(model, "translation", data=PAIRS, reference=reference, batch_size=2, beams=3)
    answers, targets = [said[len(a.split())] for a, _ in PAIRS], [b for _, b in PAIRS]
    assert found["bleu"] == sacrebleu.corpus_bleu(answers, [targets]).score > 0
    assert found["chrf"] == sacrebleu.corpus_chrf(answers, [targets]).score
    assert 0 < found["reference_bleu"] < found["bleu"] and "tok:13a" in found["bleu_signature"]
    assert [e["answer"] for e in found["examples"]] == answers and {c[1:] for c in model.calls} == {(63, 3)}
    for name, side in (("a.de", 0), ("a.en", 1)):
        (tmp_path / name).write_text("".join(f"{pair[side]}\n" for pair in PAIRS))
    (tmp_path / "a.tsv").write_text("de\ten\n" + "".join(f"{a}\t{b}\n" for a, b in PAIRS))
    (tmp_path / "b.tsv").write_text("n\ten\tde\n" + "".join(f"1\t{b}\t{a}\n" for a, b in PAIRS))
    for name, more in (("a.de", {"targets": tmp_path / "a.en"}), ("a.tsv", {}), ("b.tsv", {"columns": ("de", "en")})):
        again = evaluate(model, "translation", data=tmp_path / name, **more)
        assert again["data"] == name and (again["bleu"], again["chrf"]) == (found["bleu"], found["chrf"])
    with pytest.raises(ValueError, match=r"a\.de holds a text per line.*--targets"):
        evaluate(model, "translation", data=tmp_path / "a.de")
    (tmp_path / "short.en").write_text("one\n")
    with pytest.raises(ValueError, match=r"has 3 lines, but .* has 1"):
        evaluate(model, "translation", data=tmp_path / "a.de", targets=tmp_path / "short.en")


@pytest.mark.slow
def test_translation_by_a_model_is_what_it_generates():
    sacrebleu = pytest.importorskip("sacrebleu")
    assets = train_tokenizer([STORY] * 4, "unigram", vocabulary=40, model="seq2seq", max_length=16)
    sizes = {"width": 16, "layers": 1, "heads": 2, "feed_forward_width": 16, "positions": 16, "pooler": False}
    sizes |= {"initializer_range": 0.5, "segments": 0}
    sharing = fc.Sharing(attention=(0,), feed_forward=(0,), norms=(0,), cross_attention=(0,))
    decoder = fc.ModelConfig(vocabulary=0, causal=True, sharing=sharing, **sizes)
    config = fc.ModelConfig(vocabulary=vocabulary_size(assets), head="seq2seq_lm", decoder=decoder, **sizes)
    model = fc.Model.init(config, key=jax.random.key(0), assets=assets)
    sources, targets = stories(5, 3), stories(5, 4)
    found = evaluate(model, "translation", data=list(zip(sources, targets, strict=True)), beams=2, batch_size=2)
    answers = [model.generate(source, max_new_tokens=15, beams=2).strip() for source in sources]
    assert found["chrf"] == sacrebleu.corpus_chrf(answers, [targets]).score
    assert found["examples"][1]["answer"] == answers[2]


def test_a_prefix_stands_before_every_text():
    pytest.importorskip("sacrebleu")
    model = Translator({n + 2: "x" for n in (1, 2, 3)})
    assert (
        evaluate(model, "translation", data=PAIRS, prefix="to English: ")["examples"][0]["source"]
        == "to English: b b b"
    )


def image_model(**assets):
    config = fc.ModelConfig(
        family="vit", vocabulary=0, width=16, layers=1, heads=2, feed_forward_width=16, positions=5, segments=0,
        patches=Patches(height=8, width=8, size=4, channels=1), head="sequence_classification", classes=3,
        pooler=False, classifier=Classifier(pooling="mean"), initializer_range=0.5,
    )  # fmt: skip
    return fc.Model.init(config, key=jax.random.key(0), assets=fc.Assets(**assets))


def pixels(count, size=8):
    rng = np.random.default_rng(0)
    return Images(
        rng.integers(0, 256, (count, size, size)).astype(np.uint8), rng.integers(0, 3, count).astype(np.int32)
    )


def scaled(**scale):
    model = image_model()
    return model.replace(assets=with_pixel_scale(model.assets, model.config.patches, **scale))


def test_images_are_scaled_as_the_folder_says(tmp_path):
    model = scaled(mean=0.25, std=0.5)
    assert pixel_scale(model.assets) == ((0.25,), (0.5,))
    data = pixels(21)
    values = (data.images.astype(np.float64) / 255 - 0.25) / 0.5
    best = np.asarray(model(pixel_values=values[:, None].astype(np.float32)).logits).argmax(-1)
    np.savez(tmp_path / "a.npz", images=data.images, labels=data.labels)
    found = evaluate(model, "images", data=tmp_path / "a.npz", batch_size=8)
    assert len(set(best)) > 1 and found["accuracy"] == agreement(data.labels, best) and found["n"] == 21
    assert found == {**evaluate(image_model(), "images", data=data, mean=0.25, std=0.5), "data": "a.npz"}
    right = Images(data.images, best)
    assert evaluate(model, "images", data=right, reference=model)["agreement"] == 1.0
    assert evaluate(model, "images", data=right)["accuracy"] == 1.0
    assert evaluate(model, "images", data=data, hold_out=3)["n"] == 3
    fc.save(model, tmp_path / "model")
    assert evaluate(fc.load(tmp_path / "model"), "images", data=tmp_path / "a.npz") == found
    processor = transformers.ViTImageProcessor.from_pretrained(tmp_path / "model")
    assert (*processor.image_mean, *processor.image_std, processor.size["height"]) == (0.25, 0.5, 8)


def test_pixel_scales_of_other_libraries():
    stated = {"image_mean": [0.5, 0.4, 0.3], "image_std": 0.2, "do_rescale": False}
    assets = fc.Assets(files=(("preprocessor_config.json", json.dumps(stated).encode()),))
    mean, std = pixel_scale(assets)
    x = 100.0  # not rescaled, a pixel stays between 0 and 255
    assert math.isclose((x / 255 - mean[1]) / std[0], (x - 0.4) / 0.2)
    none = fc.Assets(files=(("preprocessor_config.json", b'{"do_normalize": false}'),))
    assert pixel_scale(none) == ((0.0,), (1.0,)) and pixel_scale(fc.Assets()) is None
    with pytest.raises(ValueError, match=r"preprocessor_config.json: does not say how pixels are scaled \(KeyError"):
        pixel_scale(fc.Assets(files=(("preprocessor_config.json", b"{}"),)))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (pixels(4, size=12), {}, "images of 12×12 with 1 channels, but the model was made for 8×8 with 1; resize"),
        (Images(pixels(4).images, np.array([0, 1, 2, 3])), {}, "labels up to 3, but the model has classes 0 to 2"),
        (pixels(4), {"mean": 0.5}, "give both mean and std"),
        (pixels(4), {"mean": (0.5, 0.5), "std": 0.5}, "one for each of 1 channels"),
        (pixels(4), {"mean": 0.5, "std": 0.0}, "std above 0"),
        (pixels(4), {"hold_out": 4}, "hold out fewer"),
        (pixels(4), {"targets": "labels"}, "leave out targets"),
        (None, {}, "images: no data"),
    ],
)
def test_images_that_do_not_fit(data, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(scaled(mean=0.5, std=0.5), "images", data=data, **options)


def test_an_unknown_scale_of_pixels_is_no_guess():
    with pytest.raises(ValueError, match=r"does not say how pixels are scaled.*--mean 0\.5 --std 0\.5"):
        evaluate(image_model(), "images", data=pixels(4))


class Encoder:
    """Stands for a sentence encoder: vectors count the letters."""

    def encode(self, texts):
        return np.array([[text.count(c) for c in "abcdefgh"] for text in texts], np.float32)


@pytest.mark.parametrize("template", ["{}", "a letter {} hh"])
def test_zero_shot_takes_the_nearest_name(template):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh"), 12)) for _ in range(40)]
    names, model = ("aab", "cde", "fgh"), Encoder()
    labels = rng.integers(0, 3, 40)
    found = []
    for text in texts:
        vectors = [np.float64(model.encode([x])[0]) for x in (text, *(template.replace("{}", n) for n in names))]
        unit = [v / np.linalg.norm(v) for v in vectors]
        found.append(int(np.argmax([unit[0] @ u for u in unit[1:]])))
    rows = [(text, names[c]) for text, c in zip(texts, labels, strict=True)]
    got = evaluate(model, "zero-shot", data=rows, template=template, reference=model)
    assert got["accuracy"] == agreement(labels, np.array(found)) == got["reference_accuracy"]
    assert got["agreement"] == 1.0 and len(set(found)) > 1
    numbered = [(text, int(c)) for text, c in zip(texts, labels, strict=True)]
    assert evaluate(model, "zero-shot", data=numbered, template=template, labels=names)["accuracy"] == got["accuracy"]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([("a", "x")], {"template": "no place"}, "has no place {}"),
        ([("a", 0), ("b", 1)], {}, "labels are numbers up to 1.*--labels"),
        ([("a", 0), ("b", 1)], {"labels": ("x",)}, "labels are numbers up to 1"),
        ([("a", "x")], {"labels": ("y",)}, "the data name their classes"),
        ([("a", "b", "x")], {}, "single texts are needed, not pairs"),
        ([("a",)], {}, "item 0 is no"),
        (None, {}, "zero-shot: no data"),
    ],
)
def test_zero_shot_refuses(data, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Encoder(), "zero-shot", data=data, **options)


# ── what all refuse ──────────────────────────────────────────────────────────────────────────────────────────────────

HEADS = {"classification": "sequence_classification", "tokens": "token_classification", "lm": "causal_lm"}
HEADS |= {"translation": "seq2seq_lm", "images": "sequence_classification"}


@pytest.mark.parametrize("task", HEADS)
def test_a_model_without_the_head_is_told_which_one_is_needed(task):
    model = make_model(WORDS, width=16, layers=1, feed_forward_width=16)
    with pytest.raises(ValueError, match=f"{task}: a model with the head '{HEADS[task]}'.* but the model has 'none'"):
        evaluate(model, task, data=["a"])


def test_texts_for_a_model_of_images():
    with pytest.raises(ValueError, match="reads images, not text; evaluate it on the task 'images'"):
        evaluate(image_model(), "classification", data=[("a", 1)])
    with pytest.raises(ValueError, match="read images and give no sentence vectors"):
        evaluate(image_model(), "zero-shot", data=[("a", "x")])


@pytest.mark.parametrize("task", TASKS)
def test_options_of_other_tasks_are_refused(task):
    with pytest.raises(ValueError, match=f"the task '{task}' has no option 'beam'"):
        evaluate(Encoder(), task, data=[], beam=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed: for masked models only"),
        ({"mask_rate": 0.2, "ngram": 1}, "mask_rate, ngram: for masked models only"),
        ({"length": 100}, "windows of 100 tokens, but the models read 48"),
        ({"length": 1}, "length must be 2 or more"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"hold_out": -1}, "hold_out must be 0 or more"),
        ({"data": None}, "lm: no data"),
    ],
)
def test_lm_refuses(options, message, tmp_path):
    _, model = llama(tmp_path, 0)
    with pytest.raises(ValueError, match=message):
        evaluate(model, "lm", **{"data": stories(2, 5), **options})

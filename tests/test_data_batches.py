"""Batches for training: exact resumption, shards that make up the whole, and what each task puts into a batch."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flaxcompress.data import (
    Corpus,
    Images,
    Labelled,
    StepBatches,
    causal_lm_batches,
    classification_batches,
    image_batches,
    masked_lm_batches,
    span_corruption_batches,
    train_tokenizer,
    translation_batches,
    vocabulary_size,
)
from flaxcompress.data.conll import Tagged
from flaxcompress.data.frame import whole_tokenizer
from flaxcompress.data.portion import Portion
from flaxcompress.data.tasks import masked_lm, tagging_batches
from flaxcompress.data.tasks.images import moved
from flaxcompress.data.token_cache import corpus_tokens

WORDS = [f"{a}{b}" for a in ("ba", "ko", "mi", "ru", "te") for b in ("la", "ne", "so", "vi")]
RNG = np.random.default_rng(5)


def sentence(rng):
    return " ".join(rng.choice(WORDS, rng.integers(3, 14))).capitalize() + "."


TEXTS = [" ".join(sentence(RNG) for _ in range(RNG.integers(1, 6))) for _ in range(60)]
PAIRS = ([sentence(RNG) for _ in range(60)], [sentence(RNG) for _ in range(60)])
PIXELS = RNG.integers(0, 256, (50, 6, 5)).astype(np.uint8)
LABELS = RNG.integers(0, 3, 60).astype(np.int32)
ENCODER = train_tokenizer(TEXTS, "wordpiece", vocabulary=80)
DECODER = train_tokenizer(TEXTS, "bpe", vocabulary=300, model="decoder")
SEQ2SEQ = train_tokenizer(TEXTS, "unigram", vocabulary=100, model="seq2seq", sentinels=20)


def classes(**options):
    return classification_batches(Labelled(PAIRS[0], LABELS, ("a", "b", "c")), ENCODER, length=40, **options)


TAGGED = Tagged(
    [text.rstrip(".").split() for text in PAIRS[0]],
    [[("O", "B-a", "I-a")[sum(map(ord, word)) % 3] for word in text.rstrip(".").split()] for text in PAIRS[0]],
)
TAGS = ("O", "B-a", "I-a")

TASKS = {
    "masked": lambda **o: masked_lm_batches(TEXTS, ENCODER, length=48, **o),
    "order": lambda **o: masked_lm_batches(TEXTS, ENCODER, length=48, sentence_order=True, **o),
    "masked, packed": lambda **o: masked_lm_batches(TEXTS, ENCODER, length=64, pack=True, **o),
    "causal": lambda **o: causal_lm_batches(TEXTS, DECODER, length=64, **o),
    "causal, buckets": lambda **o: causal_lm_batches(TEXTS, DECODER, length=64, pack=False, **o),
    "spans": lambda **o: span_corruption_batches(TEXTS, SEQ2SEQ, length=48, **o),
    "translation": lambda **o: translation_batches(*PAIRS, SEQ2SEQ, length=60, **o),
    "classes": classes,
    "tags": lambda **o: tagging_batches(TAGGED, ENCODER, names=TAGS, length=16, **o),
    "images": lambda **o: image_batches(Images(PIXELS, LABELS[:50]), flip=True, shift=2, **o),
}


def same(one, two):
    assert list(one) == list(two)
    for name, value in one.items():
        assert value.dtype == two[name].dtype
        np.testing.assert_array_equal(value, two[name])


def digest(batch):
    return hashlib.sha256(b"".join(value.tobytes() for value in batch.values())).hexdigest()


def take(batches, count):
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize("task", TASKS)
def test_a_saved_position_continues_exactly(task):
    """Cut at random places, with threads that have read ahead; across epochs."""
    make = TASKS[task]
    whole = make(batch_size=8, seed=1, threads=0)
    count = 2 * whole.per_epoch + 5
    want = take(whole, count)
    rng = np.random.default_rng(0)
    cuts = [0, *sorted(rng.choice(np.arange(1, count), 3, replace=False).tolist()), count]
    state, got = None, []
    for start, stop in itertools.pairwise(cuts):
        batches = make(batch_size=8, seed=1, threads=2, prefetch=5)
        if state is not None:
            batches.set_state(json.loads(state))
        got += take(batches, stop - start)
        state = json.dumps(batches.get_state())
        batches.close()
    for one, two in zip(want, got, strict=True):
        same(one, two)
    whole.set_state({"step": 1, **{k: v for k, v in json.loads(state).items() if k != "step"}})  # and back
    same(next(whole), want[1])


@pytest.mark.parametrize("task", TASKS)
def test_shards_make_up_the_whole_whatever_their_number(task):
    make = TASKS[task]
    whole = take(make(batch_size=8, seed=2, process_index=0, process_count=1), 7)
    for count in (2, 4):
        parts = [take(make(batch_size=8, seed=2, process_index=i, process_count=count), 7) for i in range(count)]
        for step, want in enumerate(whole):
            same({k: np.concatenate([part[step][k] for part in parts]) for k in want}, want)
    # A position saved by one process is that of two as well.
    state = {**make(batch_size=8, seed=2).get_state(), "step": 5}
    half = make(batch_size=8, seed=2, process_index=1, process_count=2)
    half.set_state(state)
    same(next(half), {k: v[4:] for k, v in whole[5].items()})


@pytest.mark.parametrize("task", TASKS)
def test_shapes_are_few_and_seeds_differ(task):
    batches = TASKS[task](batch_size=8, seed=1)
    seen = take(batches, 2 * batches.per_epoch)
    assert len({tuple((k, v.shape) for k, v in b.items()) for b in seen}) <= 4
    assert all(len(v) == 8 for b in seen for v in b.values())
    other = take(TASKS[task](batch_size=8, seed=2), 2 * batches.per_epoch)
    assert any(not np.array_equal(a["labels"], b["labels"]) for a, b in zip(seen, other, strict=True))
    first, second = seen[: batches.per_epoch], seen[batches.per_epoch :]
    assert any(not np.array_equal(a["labels"], b["labels"]) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_a_fresh_process_continues_exactly(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n".join(TEXTS))
    code = """
        import json, sys
        import test_data_batches as t
        made = {
            "packed": t.causal_lm_batches(sys.argv[1], t.DECODER, length=64, batch_size=8, seed=3),
            "buckets": t.masked_lm_batches(
                sys.argv[1], t.ENCODER, length=48, batch_size=8, seed=3, sentence_order=True
            ),
        }
        states = json.loads(sys.argv[2])
        out = {}
        for name, batches in made.items():
            if states:
                batches.set_state(states[name])
            out[name] = [[t.digest(next(batches)) for _ in range(4)], batches.get_state()]
        print(json.dumps(out))
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    root = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root.parent}"}

    def run(states):
        command = [sys.executable, "-c", code, str(text), json.dumps(states)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=120)
        return json.loads(done.stdout)

    one = run({})
    two = run({name: state for name, (_, state) in one.items()})
    for name, make in (
        ("packed", lambda: causal_lm_batches(text, DECODER, length=64, batch_size=8, seed=3)),
        ("buckets", lambda: masked_lm_batches(text, ENCODER, length=48, batch_size=8, seed=3, sentence_order=True)),
    ):
        want = [digest(batch) for batch in take(make(), 8)]
        assert one[name][0] + two[name][0] == want and two[name][1]["step"] == 8


@pytest.mark.parametrize("task", TASKS)
def test_a_finite_pass_ends_and_begins_again(task):
    batches = TASKS[task](batch_size=8, seed=0, shuffle=False, epochs=1)
    start = batches.get_state()
    first = list(batches)
    assert len(first) == batches.per_epoch and next(batches, None) is None
    batches.set_state(start)
    for one, two in zip(first, batches, strict=True):
        same(one, two)
    full = [(b["labels"].reshape(8, -1) != -100).any(1).sum() for b in first]
    assert sum(n < 8 for n in full) <= 1 + (
        task in ("masked", "order", "masked, packed")
    )  # a short row may hide nothing


def test_a_position_of_other_data_is_refused():
    batches = causal_lm_batches(TEXTS, DECODER, length=64, batch_size=8)
    state = batches.get_state()
    for other, message in (
        (causal_lm_batches(TEXTS, DECODER, length=64, batch_size=16), "batch_size 8, here 16"),
        (causal_lm_batches(TEXTS, DECODER, length=64, batch_size=8, seed=1), "seed 0, here 1"),
        (causal_lm_batches(TEXTS[:30], DECODER, length=64, batch_size=8), r"rows \d+, here \d+"),
        (causal_lm_batches(TEXTS, DECODER, length=64, batch_size=8, shuffle=False), "shuffle True, here False"),
    ):
        with pytest.raises(ValueError, match=f"the saved position is of other batches .{message}"):
            other.set_state(state)
    with pytest.raises(ValueError, match="position 99 is beyond the last batch"):
        causal_lm_batches(TEXTS, DECODER, length=64, batch_size=8, epochs=1).set_state({**state, "step": 99})


def test_batches_of_a_function_of_the_step():
    batches = StepBatches(lambda step: step * step)
    assert take(batches, 4) == [0, 1, 4, 9] and batches.get_state() == {"step": 4}
    batches.set_state({"step": 2})
    assert take(batches, 2) == [4, 9]


def test_causal_batches_hold_every_target_once_an_epoch():
    tokenizer = whole_tokenizer(DECODER)
    ids = [[1, *tokenizer.encode(text, add_special_tokens=False).ids, 2] for text in TEXTS]
    want = sorted(pair for row in ids for pair in itertools.pairwise(row))
    for pack in (True, False):
        batches = causal_lm_batches(TEXTS, DECODER, length=64, batch_size=8, epochs=2, pack=pack)
        found = list(batches)
        for epoch in (found[: batches.per_epoch], found[batches.per_epoch :]):
            pairs = []
            for b in epoch:
                real = b["packs"] > 0 if pack else b["attention_mask"]
                np.testing.assert_array_equal(b["labels"] != -100, real)
                pairs += zip(b["input_ids"][real].tolist(), b["labels"][real].tolist(), strict=True)
                assert (b["input_ids"][~real] == 0).all()
            assert sorted(pairs) == want


def test_packed_rows_number_their_documents():
    batch = next(causal_lm_batches(TEXTS, DECODER, length=200, batch_size=8, seed=0))
    assert batch["packs"].max() > 1
    for ids, labels, packs in zip(batch["input_ids"], batch["labels"], batch["packs"], strict=True):
        real = packs[packs > 0]
        if not len(real):  # a row that fills up
            continue
        assert (np.diff(real) >= 0).all() and set(real) == set(range(1, real.max() + 1))
        inside = np.flatnonzero((packs[:-1] == packs[1:]) & (packs[1:] > 0))
        np.testing.assert_array_equal(labels[inside], ids[inside + 1])


def unmask(batch, row):
    ids = batch["input_ids"][row].copy()
    real = batch["labels"][row] != -100
    ids[batch["label_positions"][row][real]] = batch["labels"][row][real]
    return ids


@pytest.mark.parametrize("pack", [False, True])
def test_masked_batches_hold_every_document(pack):
    batches = masked_lm_batches(TEXTS, ENCODER, length=64, batch_size=8, epochs=1, pack=pack)
    tokenizer = whole_tokenizer(ENCODER)
    want = sorted(i for text in TEXTS for i in tokenizer.encode(text, add_special_tokens=False).ids)
    found, hidden = [], 0
    for batch in batches:
        assert batch["labels"].shape == batch["label_positions"].shape
        for row in range(8):
            ids = unmask(batch, row)
            real = batch["packs"][row] > 0 if pack else batch["attention_mask"][row]
            found += [i for i in ids[real].tolist() if i not in (2, 3)]
            hidden += int((batch["labels"][row] != -100).sum())
            for number in range(1, int(batch["packs"][row].max()) + 1) if pack else ():
                piece = ids[batch["packs"][row] == number]
                assert piece[0] == 2 and piece[-1] == 3
    assert sorted(found) == want
    assert 0.12 < hidden / len(want) < 0.16


def test_sentence_order_batches_are_pairs_in_either_order():
    text = " ".join(TEXTS)
    tokens = whole_tokenizer(ENCODER).encode(text, add_special_tokens=False).ids
    joined = " ".join(map(str, tokens)) + " "
    counts = np.zeros(2, int)
    for batch in masked_lm_batches(TEXTS, ENCODER, length=64, batch_size=8, epochs=4, sentence_order=True):
        for row, order in enumerate(batch["order_labels"].tolist()):
            real = batch["attention_mask"][row]
            ids, types = unmask(batch, row)[real], batch["segment_ids"][row][real]
            if order == -100:
                assert not types.any()
                continue
            first, second = ids[types == 0], ids[types == 1]
            assert first[0] == 2 and first[-1] == second[-1] == 3
            one, two = first[1:-1].tolist(), second[:-1].tolist()
            whole = one + two if order == 0 else two + one
            assert " ".join(map(str, whole)) + " " in joined
            counts[order] += 1
    n = counts.sum()
    assert n > 100 and abs(counts[1] / n - 0.5) < 5 * np.sqrt(0.25 / n)


def test_masking_is_new_in_every_epoch_and_the_same_for_a_seed():
    def rows(seed):
        batches = masked_lm_batches(TEXTS, ENCODER, length=64, batch_size=8, seed=seed, shuffle=False)
        return [next(batches)["label_positions"].tolist() for _ in range(2 * batches.per_epoch)]

    one, half = rows(0), len(rows(0)) // 2
    assert one == rows(0) and one[:half] != one[half:] and one != rows(1)


def test_span_corruption_batches():
    batches = span_corruption_batches(TEXTS, SEQ2SEQ, length=48, batch_size=8, epochs=1)
    sentinels = [whole_tokenizer(SEQ2SEQ).token_to_id(f"<extra_id_{i}>") for i in range(20)]
    tokens = []
    for batch in batches:
        for row in range(8):
            ids = batch["input_ids"][row][batch["attention_mask"][row]]
            target = batch["labels"][row][batch["decoder_attention_mask"][row]]
            read = batch["decoder_input_ids"][row][batch["decoder_attention_mask"][row]]
            if not len(ids):
                assert (batch["labels"][row] == -100).all()
                continue
            assert ids[-1] == target[-1] == 1 and read[0] == 0  # </s>, and padding begins
            np.testing.assert_array_equal(read[1:], target[:-1])
            assert [i for i in ids if i in sentinels] == [i for i in target if i in sentinels]
            tokens += [i for i in [*ids, *target] if i not in sentinels and i != 1]
    want = corpus_tokens(Corpus(TEXTS), SEQ2SEQ).ids
    assert sorted(tokens) == sorted(want.tolist())


def test_translation_batches():
    tokenizer = whole_tokenizer(SEQ2SEQ)
    want = sorted((tokenizer.encode(a).ids, tokenizer.encode(b).ids) for a, b in zip(*PAIRS, strict=True))
    found = []
    for batch in translation_batches(*PAIRS, SEQ2SEQ, length=90, batch_size=8, epochs=1):
        for row in range(8):
            ids = batch["input_ids"][row][batch["attention_mask"][row]].tolist()
            if ids:
                found.append((ids, batch["labels"][row][batch["decoder_attention_mask"][row]].tolist()))
    assert sorted(found) == want
    cut = next(translation_batches(*PAIRS, SEQ2SEQ, length=6, batch_size=60, target_length=4, epochs=1))
    assert (cut["input_ids"].shape, cut["labels"].shape) == ((60, 6), (60, 4))
    assert (cut["input_ids"][:, 5] == 1).all() and (cut["labels"][:, 3] == 1).all()  # the end token stays


def test_classification_batches():
    tokenizer = whole_tokenizer(ENCODER)
    pairs = list(zip(*PAIRS, strict=True))
    for texts in (PAIRS[0], pairs):
        found = {}
        data = Labelled(texts, LABELS, ("a", "b", "c"))
        for batch in classification_batches(data, ENCODER, length=90, batch_size=16, epochs=1):
            for row, label in enumerate(batch["labels"].tolist()):
                real = batch["attention_mask"][row]
                assert real.any() == (label != -100)
                found[tuple(batch["input_ids"][row][real].tolist())] = (batch["segment_ids"][row][real].tolist(), label)
        assert found.pop(()) == ([], -100)  # 60 examples are 4 batches of 16 but 4
        encodings = tokenizer.encode_batch(texts)
        assert found == {tuple(e.ids): (e.type_ids, n) for e, n in zip(encodings, LABELS.tolist(), strict=True)}
    numbers = Labelled(PAIRS[0], LABELS.astype(np.float32), ())
    batch = next(classification_batches(numbers, ENCODER, length=40, batch_size=64, epochs=1))
    assert batch["labels"].dtype == np.float32 and sorted(batch["labels"])[4:] == sorted(LABELS)


def test_image_batches():
    found = next(image_batches(Images(PIXELS, LABELS[:50]), batch_size=64, epochs=1, shuffle=False))
    assert found["pixel_values"].shape == (64, 1, 6, 5)
    np.testing.assert_allclose(found["pixel_values"][:50, 0], PIXELS / 127.5 - 1, atol=1e-6)
    assert found["labels"].tolist() == [*LABELS[:50].tolist(), *[-100] * 14]
    colour = np.stack([PIXELS] * 3, -1)
    options = {"batch_size": 50, "epochs": 1, "shuffle": False, "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 0.5)}
    found = next(image_batches(Images(colour, LABELS[:50]), **options))["pixel_values"]
    for channel, (mean, std) in enumerate(((0.1, 1.0), (0.2, 2.0), (0.3, 0.5))):
        np.testing.assert_allclose(found[:, channel], (PIXELS / 255 - mean) / std, atol=1e-6)


def test_images_are_mirrored_and_moved():
    image = np.arange(1, 7).reshape(2, 3, 1).astype(np.uint8)
    assert moved(image, 0, 0).tolist() == image.tolist()
    assert moved(image, 1, -1)[..., 0].tolist() == [[0, 0, 0], [2, 3, 0]]
    assert moved(image, -1, 2)[..., 0].tolist() == [[0, 0, 4], [0, 0, 0]]
    one = Images(image[None, ..., 0], np.zeros(1, np.int64))
    batches = image_batches(one, batch_size=1, mean=0.0, std=1 / 255, flip=True, shift=1)
    seen = {tuple(np.rint(next(batches)["pixel_values"]).astype(int).ravel().tolist()) for _ in range(400)}
    flipped = image[:, ::-1]
    want = {tuple(moved(x, d, r).ravel().tolist()) for x in (image, flipped) for d in (-1, 0, 1) for r in (-1, 0, 1)}
    assert seen == want  # all 18, each of likelihood 1/18: one is missed once in 4e8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TASKS["masked"](batch_size=8, vocabulary=40),
            "the tokenizer gives id .*, but the model's vocabulary has 40",
        ),
        (lambda: TASKS["causal"](batch_size=8, vocabulary=40), "the model's vocabulary has 40 entries"),
        (lambda: TASKS["spans"](batch_size=8, vocabulary=10), "the model's vocabulary has 10 entries"),
        (lambda: TASKS["translation"](batch_size=8, vocabulary=30), "the model's vocabulary has 30 entries"),
        (lambda: TASKS["classes"](batch_size=8, vocabulary=30), "the model's vocabulary has 30 entries"),
        (lambda: classes(batch_size=8, classes=2), r"labels are 0 to 2 \(a, b, c\), but the model has classes 0 to 1"),
        (lambda: image_batches(Images(PIXELS, LABELS[:50]), batch_size=8, classes=2), "up to 2, but the model has 2"),
        (lambda: image_batches(Images(PIXELS, LABELS[:50]), batch_size=8, shift=5), "shift must be 0 to 4, got 5"),
        (lambda: image_batches(Images(PIXELS, LABELS), batch_size=8), "50 images, but labels of shape"),
        (lambda: image_batches(Images(PIXELS, LABELS[:50]), batch_size=8, std=0.0), "std must be above 0"),
        (lambda: TASKS["causal"](batch_size=8, process_index=0, process_count=3), "shared evenly by 3 processes"),
        (
            lambda: TASKS["causal"](batch_size=8, process_index=2, process_count=2),
            "process_index must be 0 to 1, got 2",
        ),
        (lambda: TASKS["causal"](batch_size=8, epochs=0), "epochs must be at least 1"),
        (lambda: TASKS["causal"](batch_size=8, seed=-1), "seed must be 0 or more, got -1"),
        (lambda: TASKS["causal"](batch_size=0), "batch_size must be at least 1"),
        (lambda: causal_lm_batches(TEXTS, DECODER, length=0, batch_size=8), "length must be at least 1, got 0"),
        (lambda: masked_lm_batches(TEXTS, ENCODER, length=2, batch_size=8), "leaves no room beside 2 special tokens"),
        (lambda: masked_lm_batches(TEXTS, ENCODER, length=9, batch_size=8, mask_rate=1.0), "between 0 and 1, got 1.0"),
        (lambda: masked_lm_batches(TEXTS, ENCODER, length=9, batch_size=8, ngram=0), "ngram must be at least 1"),
        (lambda: masked_lm_batches(TEXTS, DECODER, length=9, batch_size=8), "needs a mask token"),
        (
            lambda: masked_lm_batches(TEXTS, ENCODER, length=64, batch_size=8, pack=True, sentence_order=True),
            "use pack or sentence_order",
        ),
        (
            lambda: masked_lm_batches(["one two", "three"], ENCODER, length=64, batch_size=8, sentence_order=True),
            "sentence order needs two sentences in a row",
        ),
        (
            lambda: span_corruption_batches(TEXTS, DECODER, length=48, batch_size=8),
            "a tokenizer with the tokens <extra_id_0>",
        ),
        (lambda: span_corruption_batches(TEXTS, SEQ2SEQ, length=512, batch_size=8), "needs 28 sentinels, .* has 20"),
        (lambda: span_corruption_batches(TEXTS, SEQ2SEQ, length=48, batch_size=8, density=0.0), "density must lie"),
        (lambda: translation_batches(*PAIRS, SEQ2SEQ, length=1, batch_size=8), "leaves no room"),
        (lambda: translation_batches(*PAIRS, ENCODER, length=9, batch_size=8, vocabulary=9), "vocabulary has 9"),
        (lambda: causal_lm_batches("nowhere.txt", DECODER, length=9, batch_size=8), "nowhere.txt: no such file"),
    ],
)
def test_mistakes_are_one_clear_line(make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_cache_is_read_again_until_something_changes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS))
    corpus = Corpus(path, cache=tmp_path / "cache")
    plain = corpus_tokens(Corpus(path), ENCODER, words=True)
    one = corpus_tokens(corpus, ENCODER, words=True)
    for a, b in zip(plain, one, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert isinstance(one.ids, np.memmap)
    (folder,) = (tmp_path / "cache").iterdir()
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    corpus_tokens(corpus, ENCODER, words=True)
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    corpus_tokens(corpus, ENCODER)  # other options, other tokenizer, other text
    corpus_tokens(corpus, DECODER, words=True)
    path.write_text("\n".join(TEXTS[:30]))
    assert len(corpus_tokens(corpus, ENCODER, words=True).documents) == 31
    assert len(list((tmp_path / "cache").iterdir())) == 4
    bad = Corpus(path, cache=tmp_path / "other")
    with pytest.raises(ValueError, match="vocabulary has 7"):
        corpus_tokens(bad, ENCODER, vocabulary=7)
    assert list((tmp_path / "other").iterdir()) == []  # nothing half-written is left


def test_what_is_held_out_has_tokens_of_its_own_in_the_cache(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS))
    whole, first, last = (
        corpus_tokens(Corpus(path, cache=tmp_path / "cache", portion=portion), ENCODER)
        for portion in (Portion(), Portion(7), Portion(7, held_out=True))
    )
    np.testing.assert_array_equal(np.concatenate([first.ids, last.ids]), whole.ids)
    assert len(first.documents) == len(TEXTS) - 7 + 1 and len(last.documents) == 7 + 1


def test_a_blank_line_ends_a_sentence():
    """A heading between blank lines has no full stop; it can stand on either side of a pair's border."""
    text = "Bala kone.\n \n = miso = \n\nRula tevi."
    tokens = corpus_tokens(Corpus([text]), ENCODER, masked_lm._sentence_units)
    assert len(tokens.units) - 1 == 3
    batches = masked_lm_batches([text], ENCODER, length=48, batch_size=1, sentence_order=True, epochs=20, threads=0)
    borders = {int(np.flatnonzero(np.diff(batch["segment_ids"][0]))[0]) for batch in batches}
    assert len(borders) > 1


def test_words_are_those_of_the_tokenizer():
    for assets in (ENCODER, SEQ2SEQ, DECODER):
        tokens = corpus_tokens(Corpus(["bala none. koso bala"]), assets, words=True)
        pieces = [whole_tokenizer(assets).id_to_token(i).removeprefix("##").strip("▁Ġ") for i in tokens.ids.tolist()]
        words = np.split(np.array(pieces, object), np.flatnonzero(tokens.words)[1:])
        found = ["".join(word) for word in words]
        # SentencePiece cuts words at blanks alone, the others at full stops too.
        assert found == (
            ["bala", "none.", "koso", "bala"] if assets is SEQ2SEQ else ["bala", "none", ".", "koso", "bala"]
        )


def test_sizes_of_vocabularies():
    for assets, most in ((ENCODER, 80), (DECODER, 300), (SEQ2SEQ, 100)):
        assert vocabulary_size(assets) <= most


def test_a_words_first_token_has_its_tag():
    """Read back from rows: each word once, in sentences longer than a row as well; all other tokens have none."""
    tokenizer, found = whole_tokenizer(ENCODER), []
    batches = tagging_batches(TAGGED, ENCODER, names=TAGS, length=16, batch_size=5, epochs=1, shuffle=False)
    rows = [row for batch in batches for row in zip(*batch.values(), strict=True)]
    for ids, mask, labels in rows:
        assert (labels[~mask] == -100).all() and (labels[mask] == -100).sum() >= 2 * bool(mask.any())
        pieces = [tokenizer.id_to_token(int(i)) for i in ids]
        for place in np.flatnonzero(labels != -100):
            assert not pieces[place].startswith("##")
            found.append((pieces[place][:1], TAGS[labels[place]]))
    every = zip(TAGGED.words, TAGGED.tags, strict=True)
    want = [(w.lower()[0], t) for words, tags in every for w, t in zip(words, tags, strict=True)]
    assert sorted((f[0].lower(), f[1]) for f in found) == sorted(want)


def test_tags_that_do_not_fit():
    options = {"length": 16, "batch_size": 4}
    with pytest.raises(ValueError, match="tags B-a, I-a are not among O"):
        tagging_batches(TAGGED, ENCODER, names=("O",), **options)
    with pytest.raises(ValueError, match=r"3 tags .* the model has 2 classes"):
        tagging_batches(TAGGED, ENCODER, names=TAGS, classes=2, **options)
    with pytest.raises(ValueError, match="leave no room"):
        tagging_batches(TAGGED, ENCODER, names=TAGS, **{**options, "length": 2})

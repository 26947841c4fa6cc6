"""Checkpoints of llama2.c: the two trained ones of the data folder, and damaged ones."""

from __future__ import annotations

import gzip
import re
import struct

import jax
import numpy as np
import pytest

import flaxcompress as fc


@pytest.fixture(scope="module")
def stories(data_dir):
    return fc.load(data_dir / "models" / "stories260K")


@pytest.fixture(scope="module")
def baby(data_dir):
    return fc.load(data_dir / "models" / "babyllama105" / "model5000.bin")


@pytest.fixture(scope="module")
def texts(data_dir):
    with gzip.open(data_dir / "tinystories" / "sample_2mib.txt.gz", "rt", encoding="utf-8") as stream:
        content = stream.read()
    return [story.strip() for story in content.split("<|endoftext|>")[:40]]


def mean_loss(model, texts, limit):
    """Nats per token, the first `limit` tokens of every text."""
    total, count = 0.0, 0
    for row in model.assets.tokenize(texts).ids:
        ids = np.zeros((1, limit), int)
        ids[0, : len(row[:limit])] = row[:limit]
        log_p = np.asarray(jax.nn.log_softmax(model(ids).logits[0]))
        targets = row[1:limit]
        total -= float(log_p[np.arange(len(targets)), targets].sum())
        count += len(targets)
    return total / count


def test_weights_are_counted(stories, baby):
    assert stories.parameters == 260_032 and baby.parameters == 936_448


def test_greedy_text_is_the_published_one(stories):
    answer = stories.generate([[1]], max_new_tokens=60)[0]
    assert answer.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )


def test_the_loss_is_the_published_one(stories, texts):
    assert mean_loss(stories, texts, 512) == pytest.approx(1.2451, abs=1e-4)


def test_the_loss_of_single_characters(baby, texts):
    assert mean_loss(baby, [re.sub(r"\s+", " ", text) for text in texts], 256) == pytest.approx(0.6042, abs=1e-4)


def test_text_survives_its_tokens(stories, baby):
    for model, text in ((stories, "Lily said: “Größe 3!”\n\tTom ran."), (baby, "The cat sat, and ran.")):
        rows = model.assets.tokenize([text]).ids
        assert rows[0][0] == 1
        assert model.assets.detokenize(rows) == [text]


def test_stop_strings_cut_text_and_tokens(stories):
    free = stories.generate("Once upon a time", max_new_tokens=60, return_ids=True)
    answer = stories.generate("Once upon a time", max_new_tokens=60, stop=["Lily", "zebra"], return_ids=True)
    assert answer.finished and answer.text == free.text[: free.text.index("Lily")]
    assert len(answer.ids) < len(free.ids) and free.ids[: len(answer.ids)] == answer.ids


def test_streamed_pieces_make_up_the_text(stories):
    pieces = []
    answer = stories.generate("Lily", max_new_tokens=30, on_token=lambda row, token, text: pieces.append(text))
    assert "".join(pieces) == answer


def test_saved_and_loaded_it_generates_the_same(stories, tmp_path):
    fc.save(stories, tmp_path / "own")
    again = fc.load(tmp_path / "own")
    assert again.assets.end_tokens == (2,)
    assert again.generate("Lily", max_new_tokens=20) == stories.generate("Lily", max_new_tokens=20)


def write(path, header, values):
    path.write_bytes(struct.pack("<7i", *header) + np.asarray(values, "<f4").tobytes())


def test_untied_heads_and_missing_tokenizers(tmp_path):
    """A vocabulary below zero means that the output matrix stands at the end."""
    d, inner, n, heads, groups, vocabulary, positions = 8, 12, 2, 2, 1, 11, 16
    size = vocabulary * d + n * (d + d * d + 2 * d * d // 2 + d * d + d + 3 * d * inner) + d + positions * (d // heads)
    rng = np.random.default_rng(0)
    values, head = rng.normal(size=size), rng.normal(size=(vocabulary, d))
    write(tmp_path / "model.bin", (d, inner, n, heads, groups, -vocabulary, positions), [*values, *head.ravel()])
    model = fc.load(tmp_path / "model.bin")
    np.testing.assert_allclose(model.params["head"]["output"]["kernel"], head.T.astype(np.float32))
    assert not model.config.tied and not model.assets.has_tokenizer
    assert len(model.generate([[1]], max_new_tokens=3, return_ids=True)[0].ids) <= 3


@pytest.mark.parametrize("change", ["short", "long", "text", "pickle"])
def test_other_files_are_refused(change, tmp_path, data_dir):
    content = (data_dir / "models" / "stories260K" / "stories260K.bin").read_bytes()
    damaged = {
        "short": content[:-4],
        "long": content + b"1234",
        "text": b"hello",
        "pickle": b"\x80\x02" + content,
    }
    content = damaged[change]
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        fc.load(tmp_path / "model.bin")
    assert "\n" not in str(error.value)

"""Figures of classes and entities against naive loops, and the reader of tagged words."""

from __future__ import annotations

import gzip
import math

import numpy as np
import pytest

from flaxcompress.data.conll import read_conll
from flaxcompress.evaluate.classes import agreement, f1_by_class, macro_f1, matthews, pearson
from flaxcompress.evaluate.entities import entities, entity_scores

TOLERANCE = 1e-12  # float64, some hundred additions


def naive_f1(labels, found, kind):
    hits = wrong = missed = 0
    for wanted, got in zip(labels, found, strict=True):
        hits += wanted == got == kind
        wrong += got == kind != wanted
        missed += wanted == kind != got
    precision = hits / (hits + wrong) if hits + wrong else 0.0
    recall = hits / (hits + missed) if hits + missed else 0.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(4))
def test_f1_equals_a_naive_count(seed):
    rng = np.random.default_rng(seed)
    labels, found = rng.integers(0, 3, 60), rng.integers(1, 5, 60)  # 0 is never found, 3 and 4 never labelled
    want = {kind: naive_f1(labels.tolist(), found.tolist(), kind) for kind in range(5)}
    got = f1_by_class(labels, found)
    assert got.keys() == want.keys() and got[0] == got[4] == 0.0 < got[1]
    assert all(abs(got[kind] - want[kind]) < TOLERANCE for kind in want)
    assert abs(macro_f1(labels, found) - sum(want.values()) / 5) < TOLERANCE
    assert agreement(labels, found) == sum(a == b for a, b in zip(labels, found, strict=True)) / 60


@pytest.mark.parametrize("seed", range(4))
def test_matthews_is_the_correlation_of_two_series_of_zeros_and_ones(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 50)
    found = np.where(rng.random(50) < 0.7, labels, 1 - labels)
    assert abs(matthews(labels, found) - np.corrcoef(labels, found)[0, 1]) < TOLERANCE
    assert matthews(labels, 1 - labels) == -1.0 and matthews(labels, labels) == 1.0
    assert matthews(labels, np.ones(50, int)) == 0.0


def test_pearson():
    x, y = np.random.default_rng(0).normal(size=(2, 40))
    assert abs(pearson(x, y) - np.corrcoef(x, y)[0, 1]) < TOLERANCE
    with pytest.raises(ValueError, match="values that differ are needed, got 40"):
        pearson(x, np.ones(40))


def test_series_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"got \[3\], \[2\]"):
        agreement(np.zeros(3, int), np.zeros(2, int))
    with pytest.raises(ValueError, match=r"length >= 1"):
        agreement(np.zeros(0, int), np.zeros(0, int))


@pytest.mark.parametrize(
    ("tags", "want"),
    [
        ("O O", []),
        ("B-a I-a O B-a", [("a", 0, 2), ("a", 3, 4)]),
        ("B-a B-a I-a", [("a", 0, 1), ("a", 1, 3)]),  # two neighbours of one kind
        ("I-a I-a O I-b", [("a", 0, 2), ("b", 3, 4)]),  # begun by an I-
        ("B-a I-b I-b", [("a", 0, 1), ("b", 1, 3)]),
        ("B-creative-work I-creative-work", [("creative-work", 0, 2)]),
    ],
)
def test_entities(tags, want):
    assert entities(tags.split()) == want


@pytest.mark.parametrize("tag", ["S-a", "B", "B-", "o", ""])
def test_other_tags_are_refused(tag):
    with pytest.raises(ValueError, match=f"must be O, B-… or I-…, got {tag!r}"):
        entities(["O", tag])


def test_entity_scores_of_a_case_made_by_hand():
    labels = [["B-per", "I-per", "O", "B-loc", "O"], ["B-loc", "I-loc", "I-loc", "O"], ["O", "O"]]
    found = [["B-per", "I-per", "O", "B-per", "O"], ["B-loc", "I-loc", "O", "B-loc"], ["O", "O"]]
    # Right: the first person. Wrong: a place called a person, a place cut short, a place that is none.
    got = entity_scores(labels, found)
    assert (got["entities"], got["precision"], got["recall"]) == (3, 1 / 4, 1 / 3)
    assert math.isclose(got["f1"], 2 / 7)
    assert got["f1_by_kind"] == {"loc": 0.0, "per": 2 / 3}
    none = entity_scores([["O"]], [["O"]])
    assert (none["precision"], none["recall"], none["f1"], none["f1_by_kind"]) == (0.0, 0.0, 0.0, {})


@pytest.mark.parametrize("blank", ["\t", " "])
def test_a_word_and_its_tag_per_line(blank, tmp_path):
    rows = ["-DOCSTART- O", "", "Anna NNP B-per", "sees VB O", blank, " ", "it PRP O", ""]
    path = tmp_path / "a.conll.gz"
    path.write_bytes(gzip.compress("\n".join(row.replace(" ", blank) for row in rows).encode()))
    found = read_conll(path)
    assert found.words == [["Anna", "sees"], ["it"]] and found.tags == [["B-per", "O"], ["O"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "holds no sentence"),
        ("a O\nword\n", "line 2: a word and its tag are expected, got 'word'"),
        ("\tO\n", "line 1: a word and its tag"),
    ],
)
def test_tagged_files_that_cannot_be_read(content, message, tmp_path):
    (tmp_path / "a.conll").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_conll(tmp_path / "a.conll")


def test_entities_of_public_data(data_dir):
    found = read_conll(data_dir / "wnut17/dev.conll.gz")
    assert (len(found.words), sum(map(len, found.words))) == (1009, 15733)
    assert sum(len(entities(tags)) for tags in found.tags) == 836  # as published

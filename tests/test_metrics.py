import math

import numpy as np
import pytest
import scipy.stats

from flaxcompress.evaluate import (
    compare_vectors,
    cosines,
    evaluate,
    mean_cosine,
    metrics,
    neighbour_overlap,
    rank_correlation,
    spearman,
)

EPS = np.finfo(np.float64).eps


def vectors(rows, width=16, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, width))


def tolerance(terms):
    return 8 * EPS * math.sqrt(terms)


@pytest.mark.parametrize("levels", [3, 50, None])
def test_spearman_equals_scipy(levels):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 500))
    y = y + 0.5 * x
    if levels:
        x, y = np.round(x * levels / 4), np.round(y * levels / 4)  # ties
    assert abs(spearman(x, y) - scipy.stats.spearmanr(x, y).statistic) < tolerance(500)
    np.testing.assert_array_equal(metrics.average_ranks(x), scipy.stats.rankdata(x))


def test_spearman_of_extremes():
    x = np.arange(10.0)
    assert spearman(x, np.exp(x)) == 1.0 and spearman(x, -(x**3)) == -1.0
    assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == 1.0


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "all 3 values of the first series are equal"),
        ([1.0, 2.0, 3.0], [4.0, 4.0, 4.0], "all 3 values of the second series are equal"),
        ([1.0, np.nan], [1.0, 2.0], "first series holds values that are not finite"),
        ([1.0], [1.0], "two series of equal length >= 2"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "two series of equal length"),
    ],
)
def test_spearman_refuses(x, y, message):
    with pytest.raises(ValueError, match=message):
        spearman(x, y)


def naive_cosine(u, v):
    return sum(p * q for p, q in zip(u, v, strict=True)) / math.sqrt(sum(p * p for p in u) * sum(q * q for q in v))


def test_mean_cosine_equals_a_loop():
    a, b = vectors(40), vectors(40, seed=1)
    want = [naive_cosine(u, v) for u, v in zip(a, b, strict=True)]
    np.testing.assert_allclose(cosines(a, b), want, rtol=0, atol=tolerance(16))
    assert abs(mean_cosine(a, b) - sum(want) / 40) < tolerance(16)
    assert abs(mean_cosine(a, -3 * a) + 1) < tolerance(16)
    assert mean_cosine(np.zeros((2, 3)), np.ones((2, 3))) == 0.0


def test_float32_vectors_are_measured_in_float64():
    a = vectors(300, 384).astype(np.float32)
    assert abs(1 - mean_cosine(a, a)) < tolerance(384)


def test_rank_correlation_equals_scipy_over_a_loop():
    a = vectors(30)
    b = a + 0.7 * vectors(30, seed=1)
    pairs = [(i, j) for i in range(30) for j in range(i + 1, 30)]
    x, y = ([naive_cosine(v[i], v[j]) for i, j in pairs] for v in (a, b))
    # Equal up to rounding: no two of these 435 similarities are closer than the error of either way to compute them.
    assert abs(rank_correlation(a, b) - scipy.stats.spearmanr(x, y).statistic) < tolerance(435)
    assert rank_correlation(a, 5 * a) == pytest.approx(1.0, abs=tolerance(435))


def test_rank_correlation_of_many_rows_takes_some_of_them():
    a = vectors(700)
    b = a + 0.5 * vectors(700, seed=1)
    chosen = np.linspace(0, 699, 100).round().astype(int)
    assert rank_correlation(a, b, rows=100) == rank_correlation(a[chosen], b[chosen])
    # The standard error of a rank correlation over 100 rows is at most that of 100 independent pairs.
    assert abs(rank_correlation(a, b, rows=100) - rank_correlation(a, b)) < 3 / math.sqrt(100)
    assert metrics._MOST_ROWS == 1500


def test_neighbour_overlap_equals_a_loop(monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", 7)
    a = vectors(40)
    b = a + 0.5 * vectors(40, seed=1)
    shared = 0
    for i in range(40):
        near = []
        for v in (a, b):
            others = sorted((j for j in range(40) if j != i), key=lambda j, v=v: -naive_cosine(v[i], v[j]))
            near.append(set(others[:5]))
        shared += len(near[0] & near[1])
    assert neighbour_overlap(a, b, k=5) == shared / 200
    assert neighbour_overlap(a, 2 * a) == 1.0
    assert neighbour_overlap(a[:11], b[:11], k=10) == 1.0  # everyone is a neighbour


def test_neighbour_overlap_of_unrelated_vectors_is_chance():
    a, b = vectors(600), vectors(600, seed=1)
    chance, draws = 10 / 599, 6000
    assert abs(neighbour_overlap(a, b) - chance) < 5 * math.sqrt(chance / draws)


@pytest.mark.parametrize("metric", [mean_cosine, rank_correlation, neighbour_overlap])
def test_metrics_refuse(metric):
    a = vectors(20)
    with pytest.raises(ValueError, match="with the same N"):
        metric(a, a[:19])
    with pytest.raises(ValueError, match="rows are needed here, got 0"):
        metric(a[:0], a[:0])
    broken = a.copy()
    broken[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 rows of the second array hold values that are not finite"):
        metric(a, broken)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        neighbour_overlap(a, a, k=0)
    with pytest.raises(ValueError, match="widths differ"):
        mean_cosine(a, a[:, :3])


class WordModel:
    """Stands for a model: a text's vector is the sum of fixed vectors of its words, with some noise."""

    def __init__(self, noise=0.0, width=32):
        self.noise, self.width, self.calls = noise, width, []

    def encode(self, texts):
        assert isinstance(texts, list)
        self.calls.append(len(texts))
        out = []
        for text in texts:
            seeds = [sum(map(ord, word)) for word in text.lower().split()]
            words = [np.random.default_rng(seed).normal(size=self.width) for seed in seeds]
            out.append(sum(words) + self.noise * np.random.default_rng(len(text)).normal(size=self.width))
        return np.array(out, np.float32)


TEXTS = [f"the {a} {b} sees {c}" for a in ("red", "old", "tall") for b in ("dog", "man") for c in ("me", "it", "rain")]
PAIRS = [
    ("a b c d", "a b c d", 5.0),
    ("a b c d", "a b c e", 4.0),
    ("a b c d", "a b f g", 2.5),
    ("a b c d", "w x y z", 0),
]


def test_fidelity(tmp_path):
    reference, model = WordModel(), WordModel(noise=0.5)
    found = evaluate(model, "fidelity", data=TEXTS, reference=reference)
    assert list(found) == ["data", "n", "mean_cosine", "rank_correlation", "neighbour_overlap_10"]
    assert (found["data"], found["n"]) == ("given texts", 18)
    assert 0.9 < found["mean_cosine"] < 1 and 0.8 < found["rank_correlation"] < 1
    assert found == compare_vectors(model.encode(TEXTS), reference.encode(TEXTS), data="given texts")
    same = evaluate(reference, "fidelity", data=TEXTS, reference=reference)
    assert same["mean_cosine"] == pytest.approx(1, abs=tolerance(32)) and same["neighbour_overlap_10"] == 1
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS))
    for data in (path, str(path), [path], [str(path)]):
        assert evaluate(model, "fidelity", data=data, reference=reference) == {**found, "data": "a.txt"}
    narrow = evaluate(WordModel(width=8), "fidelity", data=TEXTS, reference=reference)
    assert narrow["mean_cosine"] is None and narrow["rank_correlation"] < 1


@pytest.mark.slow
def test_fidelity_without_data_takes_held_out_docstrings():
    model = WordModel(width=2)
    found = evaluate(model, "fidelity", reference=model)
    assert found["n"] == 600 and found["data"].endswith("standard library, held out")


def test_sts(tmp_path):
    reference, model = WordModel(), WordModel(noise=0.5)
    found = evaluate(reference, "sts", data=PAIRS)
    assert found == {"data": "given pairs", "n": 4, "spearman": 1.0}
    assert reference.calls == [4]  # each distinct sentence once
    both = evaluate(model, "sts", data=PAIRS, reference=reference)
    assert list(both) == ["data", "n", "spearman", "reference_spearman", "mean_cosine"]
    assert both["reference_spearman"] == 1.0 and 0.9 < both["mean_cosine"] < 1
    path = tmp_path / "pairs.tsv"
    path.write_text("score\tsentence1\tsentence2\n" + "".join(f"{s}\t{a}\t{b}\n" for a, b, s in PAIRS))
    assert evaluate(model, "sts", data=path, reference=reference) == {**both, "data": "pairs.tsv"}


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        ("stss", PAIRS, r"unknown task 'stss'; known: classification, .*; did you mean 'sts'\?"),
        ("fidelity", TEXTS, "a reference is needed"),
        ("sts", None, "sts: no data; give a file"),
        ("sts", [], "list of pairs is empty"),
        (
            "sts",
            [("a", "b", 3), ("c", "d", 3.0)],
            "the scores of all 2 pairs are 3; a correlation needs some that differ",
        ),
        ("sts", [("a", "b")], "item 0 is no .sentence1, sentence2, score."),
        ("sts", [("a", "b", 1), ("a", "b", "high")], "item 1 is no"),
        ("sts", [("a", "b", 1), ("a", 3, 2)], "item 1 is no"),
        ("sts", [("a", "b", float("nan"))], "item 0 is no"),
        ("sts", [("a", "a", 1), ("b", "b", 2), ("c", "c", 3)], None),
    ],
)
def test_tasks_refuse(task, data, message):
    if message is None:
        model, message = WordModel(), "the model gives all 3 pairs the similarity 1: it tells nothing apart"
        model.encode = lambda texts: np.ones((len(texts), 4), np.float32)
    else:
        model = WordModel()
    with pytest.raises(ValueError, match=message):
        evaluate(model, task, data=data)


def test_fidelity_of_too_few_texts_or_broken_vectors():
    model = WordModel()
    with pytest.raises(ValueError, match=r"given texts: at least 11 texts are needed, .*; got 10"):
        evaluate(model, "fidelity", data=TEXTS[:10], reference=model)
    broken = WordModel()
    broken.encode = lambda texts: np.full((len(texts), 32), np.nan, np.float32)
    with pytest.raises(ValueError, match="18 rows of the first array hold values that are not finite"):
        evaluate(broken, "fidelity", data=TEXTS, reference=model)
    with pytest.raises(FileNotFoundError, match=r"nowhere.tsv: no such file"):
        evaluate(model, "sts", data="nowhere.tsv")


def test_sts_of_public_data(data_dir):
    found = evaluate(WordModel(), "sts", data=data_dir / "stsb/dev.tsv.gz", reference=WordModel())
    assert found["n"] == 1500 and found["spearman"] == found["reference_spearman"]
    assert 0.3 < found["spearman"] < 0.9  # shared words tell much, not all

"""`flaxcompress search`: trials, what they leave, going on after a stop, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flaxcompress import cli
from flaxcompress.config.yaml_file import dump_yaml, read_yaml
from flaxcompress.folder import load
from flaxcompress.train import search as search_file
from flaxcompress.train.config import TrainConfig
from flaxcompress.train.loop import Stopped
from flaxcompress.train.search import Search, search

pytest.importorskip("optuna")
WORDS = ["red", "blue", "green", "small", "large", "old", "new", "cat", "dog", "tree", "house", "river", "bird"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for name, count in (("train", 64), ("validation", 32)):
        lines = [" ".join(rng.choice(WORDS, 5)) for _ in range(count)]
        rows = "".join(f"{line}\t{'cat' if 'cat' in line else 'other'}\n" for line in lines)
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + rows, "utf-8")
    return folder


def settings(texts: Path, out: Path, **changes: Any) -> dict[str, Any]:
    train = {
        "model": {"config": {"width": 8, "layers": 1, "heads": 2, "feed_forward_width": 16}},
        "tokenizer": {"kind": "wordpiece", "vocabulary": 60, "lowercase": True},
        "task": "classification",
        "data": {
            "train": str(texts / "train.tsv"),
            "validation": str(texts / "validation.tsv"),
            "columns": ["sentence", "label"],
            "threads": 0,
        },
        "training": {"steps": 4, "batch_size": 8, "length": 16, "evaluate_every": 2, "save_every": 2},
        "out": "unused",
    }
    found = {
        "train": train,
        "space": {"optimizer.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}, "training.batch_size": [4, 8]},
        "metric": "cross_entropy",
        "mode": "min",
        "trials": 3,
        "out": str(out),
    }
    return {**found, **changes}


def written(folder: Path, found: dict[str, Any]) -> Path:
    path = folder / "search.yaml"
    path.write_text(dump_yaml(found), "utf-8")
    return path


@pytest.mark.slow
def test_a_bayesian_search_leaves_its_trials_and_the_best_one(texts, tmp_path, capsys):
    path = written(tmp_path, settings(texts, tmp_path / "out"))
    assert cli.main(["search", str(path)]) == 0
    assert "3 trials" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    trials = report["search"]["trials"]
    assert [trial["folder"] for trial in trials] == ["000", "001", "002"]
    rates = [trial["values"]["optimizer.learning_rate"] for trial in trials]
    assert len(set(rates)) == 3 and all(1e-4 <= rate <= 1e-1 for rate in rates)
    for trial in trials:  # what a trial is worth is the best of its own run's evaluations
        own = json.loads((tmp_path / "out" / "trials" / trial["folder"] / "report.json").read_text("utf-8"))
        values = [row["cross_entropy"] for row in own["training"]["evaluations"]]
        assert len(values) == 2 and trial["value"] == min(values)
        held = own["training"]["config"]
        assert held["optimizer"]["learning_rate"] == trial["values"]["optimizer.learning_rate"]
        assert held["training"]["batch_size"] == trial["values"]["training.batch_size"]
    best = min(trials, key=lambda trial: trial["value"])
    assert report["search"]["best"] == best
    config = TrainConfig.from_dict(read_yaml(tmp_path / "out" / "best.yaml"))
    assert config.optimizer.learning_rate == best["values"]["optimizer.learning_rate"]
    assert load(tmp_path / "out" / "trials" / best["folder"] / "model").config.head == "sequence_classification"
    assert b"<svg" in (tmp_path / "out" / "search.svg").read_bytes()
    # Again, and with one more: only that is run.
    before = (tmp_path / "out" / "trials" / "001" / "report.json").stat().st_mtime_ns
    assert cli.main(["search", str(path), "trials=4"]) == 0
    again = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["search"]["trials"]
    assert again[:3] == trials and len(again) == 4
    assert (tmp_path / "out" / "trials" / "001" / "report.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"other settings: seed: 0 -> 1"):
        search(Search.load(path, ["seed=1"]))


class Fake:
    """A training run that only says what it was worth, as far as `search` reads it."""

    def __init__(self, monkeypatch, worth):
        self.seen: list[tuple[str, float]] = []
        self._worth = worth
        monkeypatch.setattr(search_file, "run", self)

    def __call__(self, config: TrainConfig, *, progress: bool) -> Any:
        rate = config.optimizer.learning_rate
        self.seen.append((Path(config.out).name, rate))
        value = self._worth(len(self.seen), rate)
        Path(config.out).mkdir(parents=True, exist_ok=True)
        (Path(config.out) / "report.json").write_text("{}", "utf-8")

        class Report:
            evaluations = ({"step": 2, "loss": 1.0, "accuracy": value - 0.1}, {"step": 4, "accuracy": value})

        return Report()


def plain(texts: Path, out: Path, **changes: Any) -> dict[str, Any]:
    space = {"optimizer.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
    return settings(texts, out, metric="accuracy", mode="max", space=space, **changes)


@pytest.mark.parametrize("sampler", ["bayesian", "random"])
def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(texts, tmp_path, monkeypatch, sampler):
    def worth(number, rate):
        return 1.0 - abs(np.log10(rate) + 2.5)

    whole = Fake(monkeypatch, worth)
    path = written(tmp_path, plain(texts, tmp_path / "whole", trials=14, sampler=sampler))
    want = search(Search.load(path))

    def stopped(number, rate):
        if number == 12:
            raise Stopped("SIGTERM")
        return worth(number, rate)

    first = Fake(monkeypatch, stopped)
    with pytest.raises(Stopped):
        search(Search.load(path, [f"out={tmp_path / 'parts'}"]))
    second = Fake(monkeypatch, worth)
    got = search(Search.load(path, [f"out={tmp_path / 'parts'}"]))
    assert second.seen[0] == first.seen[-1] == whole.seen[11]  # the interrupted trial, in its own folder
    assert [*first.seen[:-1], *second.seen] == whole.seen
    assert got.trials == want.trials and got.best == want.best
    assert got.best.value == max(trial.value or 0 for trial in got.trials)


def test_what_earlier_trials_were_worth_draws_a_bayesian_search(texts, tmp_path, monkeypatch):
    """Of 40 trials, the last 20 lie nearer to the best rate than the first ten, which are drawn at random."""
    fake = Fake(monkeypatch, lambda number, rate: -abs(np.log10(rate) + 3.6))
    search(Search.load(written(tmp_path, plain(texts, tmp_path / "out", trials=40))))
    away = [abs(np.log10(rate) + 3.6) for _, rate in fake.seen]
    assert np.median(away[20:]) < 0.5 * np.median(away[:10])


def test_a_grid_has_every_combination_once(texts, tmp_path, monkeypatch):
    fake = Fake(monkeypatch, lambda number, rate: rate)
    space = {"optimizer.learning_rate": [1e-3, 1e-2], "training.batch_size": [4, 8, 16]}
    found = settings(texts, tmp_path / "out", space=space, sampler="grid", metric="accuracy", mode="max")
    del found["trials"]
    report = search(Search.load(written(tmp_path, found)))
    points = [tuple(trial.values.values()) for trial in report.trials]
    assert points == [(rate, size) for rate in (1e-3, 1e-2) for size in (4, 8, 16)]
    assert len(fake.seen) == 6 and report.best.value == 1e-2


def test_a_trial_whose_loss_is_not_finite_has_no_value(texts, tmp_path, monkeypatch):
    def worth(number, rate):
        if number == 2:
            raise FloatingPointError("the loss is nan")
        return rate

    fake = Fake(monkeypatch, worth)
    report = search(Search.load(written(tmp_path, plain(texts, tmp_path / "out", trials=4))))
    assert [trial.value is None for trial in report.trials] == [False, True, False, False]
    assert report.best.value == max(trial.value or 0 for trial in report.trials)
    assert len(fake.seen) == 4 and [folder for folder, _ in fake.seen] == ["000", "001", "002", "003"]
    assert any("not finite" in str(cell) for cell in report.table().columns[-1].cells)


def test_a_metric_that_is_not_there_is_named_and_may_then_be_put_right(texts, tmp_path, monkeypatch):
    fake = Fake(monkeypatch, lambda number, rate: rate)
    path = written(tmp_path, plain(texts, tmp_path / "out", trials=2))
    with pytest.raises(ValueError, match=r"search/metric: evaluations have no 'acuracy'; they have accuracy, loss"):
        search(Search.load(path, ["metric=acuracy"]))
    assert len(search(Search.load(path)).trials) == 2
    assert fake.seen[0] == fake.seen[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "search/space: names no setting"),
        ({"space": {"optimizer.learningrate": [1e-3]}}, r"learning_rate"),
        ({"space": {"optimizer.learning_rate": [-1.0]}}, r"learning_rate"),
        ({"space": {"optimizer.learning_rate": {"low": 1, "hihg": 2}}}, r"write a list, or \{low"),
        ({"space": {"optimizer.learning_rate": {"low": 2, "high": 1}}}, "numbers low < high"),
        ({"space": {"optimizer.learning_rate": {"low": 0, "high": 1, "log": True}}}, "true for positive numbers"),
        ({"space": {"optimizer.learning_rate": [[1]]}}, "a list of plain values"),
        ({"sampler": "grid"}, "a grid needs a list of values"),
        ({"sampler": "tpe"}, "bayesian"),
        ({"trials": None}, "search/trials: say how many"),
        ({"trials": 0}, "must be at least 1"),
        ({"mode": "maximum"}, "max"),
        ({"train": "nowhere.yaml"}, "nowhere.yaml: no such file"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(texts, tmp_path, changes, message):
    path = written(tmp_path, settings(texts, tmp_path / "out", **changes))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Search.load(path)
    assert not (tmp_path / "out").exists()


def test_a_search_needs_evaluations(texts, tmp_path):
    path = written(tmp_path, settings(texts, tmp_path / "out"))
    with pytest.raises(ValueError, match=r"set training\.evaluate_every"):
        Search.load(path, ["train.training.evaluate_every=0"])

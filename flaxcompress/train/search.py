"""Hyperparameter search: training runs over a space of settings, kept in a folder and gone on with after a stop."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from flaxcompress.config.typed import read_settings
from flaxcompress.config.yaml_file import differences, dump_yaml, read_yaml, with_changes, with_variables
from flaxcompress.progress import progress_bar
from flaxcompress.storage import write_files
from flaxcompress.train.config import TrainConfig
from flaxcompress.train.report import TrainReport
from flaxcompress.train.run import run

FILE, JOURNAL = "search.yaml", "trials.jsonl"
_SAID_FOLDER, _DIVERGED = "folder", "diverged"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What to search.

    Attributes:
      train: the settings of a training run, or a file of them (beside the search's own file where it is relative).
      space: {dotted path of a setting: what it may be}: a list of values, or {low, high} of numbers between two, whole
        where both are; with log: true, even in the logarithm.
      metric: what a run is judged by: the best of its evaluations, a name of its report's, such as "accuracy".
      mode: "max" or "min".
      out: a folder; trials are run in out/trials.
      sampler: "bayesian", a tree-structured Parzen estimator (Bergstra et al. 2011); "random"; or "grid": every
        combination, of lists alone.
      trials: how many; None: all of a grid. A search that is done may be given more.
      seed: of what is drawn.
    """

    train: dict[str, Any] | str
    space: dict[str, Any]
    metric: str
    out: str
    mode: Literal["max", "min"] = "max"
    sampler: Literal["bayesian", "random", "grid"] = "bayesian"
    trials: int | None = None
    seed: int = 0

    def __post_init__(self):
        if not self.space:
            raise ValueError("search/space: names no setting; write one, such as optimizer.learning_rate: [1e-4, 3e-4]")
        for name, values in self.space.items():
            _check_values(name, values)
            if self.sampler == "grid" and not isinstance(values, list):
                raise ValueError(f"search/space/{name}: a grid needs a list of values, got {values!r}")
        if self.sampler != "grid" and self.trials is None:
            raise ValueError(f"search/trials: say how many, for sampler {self.sampler}")
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"search/trials: must be at least 1, got {self.trials}")
        if not self.out:
            raise ValueError("search/out: names no folder")

    @classmethod
    def load(cls, path: str | Path, changes: Sequence[str] = ()) -> Search:
        """Reads a YAML file and changes such as "trials=20"; the training settings are read with it.

        Raises FileNotFoundError, and ValueError for what is unknown, missing, of another type or no such setting.
        """
        settings = with_changes(read_yaml(path), changes)
        if isinstance(named := settings.get("train"), str):
            settings["train"] = read_yaml(Path(path).parent / named)
        found = read_settings(cls, settings, str(path))
        config = found.config({name: _first(values) for name, values in found.space.items()}, "trial")
        if not (config.training.evaluate_every and config.data.validates):
            raise ValueError(f"{path}: a search needs evaluations; set training.evaluate_every, and data.validation")
        return found

    def config(self, values: Mapping[str, Any], folder: str) -> TrainConfig:
        """The training run of one trial, in out/trials/`folder`."""
        assert not isinstance(self.train, str)
        out = {"out": f"{self.out}/trials/{folder}"}
        changes = [f"{name}={json.dumps(value)}" for name, value in {**values, **out}.items()]
        return TrainConfig.from_dict(with_variables(with_changes(self.train, changes)), where="search/train")

    def points(self) -> list[dict[str, Any]]:
        """All combinations of a grid."""
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*self.space.values())]

    @property
    def count(self) -> int:
        """How many trials the search ends with."""
        if self.sampler != "grid":
            return self.trials or 0
        every = len(self.points())
        return every if self.trials is None else min(self.trials, every)


def _check_values(name: str, values: Any) -> None:
    if isinstance(values, list):
        if not values or not all(value is None or isinstance(value, (bool, int, float, str)) for value in values):
            raise ValueError(f"search/space/{name}: needs a list of plain values, got {values!r}")
        return
    keys = set(values) if isinstance(values, Mapping) else set()
    if not {"low", "high"} <= keys <= {"low", "high", "log"}:
        raise ValueError(f"search/space/{name}: write a list, or {{low: …, high: …, log: true}}; got {values!r}")
    low, high, log = values["low"], values["high"], values.get("log", False)
    if not all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in (low, high)) or not low < high:
        raise ValueError(f"search/space/{name}: needs numbers low < high, got {low!r} and {high!r}")
    if not isinstance(log, bool) or (log and not low > 0):
        raise ValueError(f"search/space/{name}: log is true or false, and true for positive numbers; got {values!r}")


def _first(values: Any) -> Any:
    return values[0] if isinstance(values, list) else values["low"]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run: its settings, and what it was judged to be worth; None for one whose loss was not finite."""

    folder: str
    values: Mapping[str, Any]
    value: float | None


@dataclasses.dataclass(frozen=True)
class SearchReport:
    """The trials in order, the best one among them, and its training report."""

    search: Search
    trials: Sequence[Trial]
    best: Trial
    training: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The best run's report.json, with `search` beside it."""
        found = {
            "metric": self.search.metric,
            "mode": self.search.mode,
            "sampler": self.search.sampler,
            "best": dataclasses.asdict(self.best),
            "trials": [dataclasses.asdict(trial) for trial in self.trials],
        }
        return {**self.training, "search": found}

    def table(self) -> Any:
        """A `rich.table.Table` of all trials, the best first."""
        from rich.table import Table

        sign = -1 if self.search.mode == "max" else 1
        table = Table(title=f"{len(self.trials)} trials")
        for name in ("trial", *self.search.space, self.search.metric):
            table.add_column(name, justify="left" if name == "trial" else "right")
        worth = lambda trial: (trial.value is None, sign * (trial.value or 0.0))  # noqa: E731
        for trial in sorted(self.trials, key=worth):
            told = "not finite" if trial.value is None else f"{trial.value:.4f}"
            shown = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in trial.values.values()]
            table.add_row(trial.folder, *shown, told)
        return table

    def to_svg(self) -> bytes:
        """The trials' worth against each setting."""
        from matplotlib.figure import Figure

        from flaxcompress.evaluate.plots import svg

        done = [trial for trial in self.trials if trial.value is not None]
        names = list(self.search.space)
        figure = Figure(figsize=(3.2 * len(names) + 0.6, 3.0), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names, strict=True):
            values = self.search.space[name]
            spread = not isinstance(values, list)
            axes.scatter([t.values[name] if spread else str(t.values[name]) for t in done], [t.value for t in done])
            at = self.best.values[name]
            axes.scatter([at if spread else str(at)], [self.best.value], color="#c2542d")
            axes.set_xscale("log" if spread and values.get("log") else "linear") if spread else None
            axes.set_xlabel(name)
        figure.axes[0].set_ylabel(self.search.metric)
        return svg(figure)


def search(wanted: Search, *, progress: bool = False) -> SearchReport:
    """Runs the trials that are left of a search, and writes out/report.json, search.svg and best.yaml.

    A search that was stopped goes on: finished trials are not run again, and the one that was being trained goes on
    from its own checkpoints. One whose loss is no longer finite counts as a trial without a value.

    Raises:
      ValueError: other settings than those of an earlier search in `out` (more trials are none), a metric that
        evaluations do not have, what a training run refuses, or no trial with a finite loss.
      ModuleNotFoundError: without Optuna, saying how to install it.
    """
    folder = Path(wanted.out)
    study = _begin(wanted, folder)
    with progress_bar("trials", wanted.count, show=progress) as advance:
        for _ in study.done():
            advance()
        while len(study.done()) < wanted.count:
            study.run_one(lambda config: run(config, progress=progress))
            advance()
    trials = study.done()
    finite = [trial for trial in trials if trial.value is not None]
    if not finite:
        raise ValueError(f"{wanted.out}: no trial of {len(trials)} had a finite loss; search lower learning rates")
    best = (max if wanted.mode == "max" else min)(finite, key=lambda trial: trial.value or 0.0)
    told = json.loads((folder / "trials" / best.folder / "report.json").read_text("utf-8"))
    report = SearchReport(wanted, trials, best, told)
    files: dict[str, str | bytes] = {
        "report.json": json.dumps(report.to_json(), indent=2) + "\n",
        "best.yaml": wanted.config(best.values, best.folder).to_yaml(),
        "search.svg": report.to_svg(),
    }
    write_files(folder, files)
    return report


def _begin(wanted: Search, folder: Path) -> _Study:
    """The study in the folder; its settings are compared with those of an earlier search there, and written."""
    settings = {name: value for name, value in dataclasses.asdict(wanted).items() if name != "trials"}
    path, changed = folder / FILE, []
    if path.is_file():
        earlier = {name: value for name, value in read_yaml(path).items() if name != "trials"}
        changed = differences(earlier, json.loads(json.dumps(settings)))
    folder.mkdir(parents=True, exist_ok=True)
    study = _Study(wanted, folder)
    if changed and study.done():
        raise ValueError(
            f"{wanted.out}: the search there has other settings: {'; '.join(changed)}. Only trials may grow; choose "
            "another out"
        )
    if changed:  # nothing is known yet that these settings could contradict
        (folder / JOURNAL).unlink()
        study = _Study(wanted, folder)
    study.take_up()
    write_files(folder, {FILE: dump_yaml({**settings, "trials": wanted.trials})})
    return study


class _Study:
    """Optuna's study, its journal a file of JSON lines in the folder."""

    def __init__(self, wanted: Search, folder: Path):
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ModuleNotFoundError:
            raise ModuleNotFoundError("search needs Optuna: pip install 'flaxcompress[search]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._wanted = optuna, wanted
        kept = optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        direction = "maximize" if wanted.mode == "max" else "minimize"
        self._study = optuna.create_study(study_name="search", storage=kept, direction=direction, load_if_exists=True)

    def take_up(self) -> None:
        """Puts a trial that was interrupted first in the queue, to go on in its folder."""
        states = self._optuna.trial.TrialState
        for left in self._study.get_trials(deepcopy=False, states=[states.RUNNING]):
            held = {_SAID_FOLDER: left.user_attrs[_SAID_FOLDER]} if _SAID_FOLDER in left.user_attrs else {}
            self._study.tell(left.number, state=states.FAIL)
            self._study.enqueue_trial(left.params, user_attrs=held)

    def done(self) -> list[Trial]:
        """The finished trials, in order."""
        found = []
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state.name == "COMPLETE" or trial.user_attrs.get(_DIVERGED):
                value = None if trial.value is None else float(trial.value)
                found.append(Trial(trial.user_attrs[_SAID_FOLDER], dict(trial.params), value))
        return found

    def run_one(self, train: Callable[[TrainConfig], TrainReport]) -> None:
        """Asks for a trial, trains it and tells what it is worth; a trial that is interrupted is told nothing."""
        number, samplers = len(self.done()), self._optuna.samplers
        seed = 10_007 * self._wanted.seed + number  # a search that is gone on with draws what it would have drawn
        self._study.sampler = (
            samplers.TPESampler(seed=seed) if self._wanted.sampler == "bayesian" else samplers.RandomSampler(seed=seed)
        )
        waiting = self._study.get_trials(deepcopy=False, states=[self._optuna.trial.TrialState.WAITING])
        if self._wanted.sampler == "grid" and not waiting:
            self._study.enqueue_trial(self._wanted.points()[number])
        trial = self._study.ask({name: self._distribution(v) for name, v in self._wanted.space.items()})
        folder = trial.user_attrs.get(_SAID_FOLDER, f"{number:03d}")
        trial.set_user_attr(_SAID_FOLDER, folder)
        try:
            report = train(self._wanted.config(trial.params, folder))
        except FloatingPointError:
            trial.set_user_attr(_DIVERGED, True)
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            return
        self._study.tell(trial, self._worth(report))

    def _worth(self, report: TrainReport) -> float:
        """The best of a run's evaluations."""
        metric = self._wanted.metric
        values = [row[metric] for row in report.evaluations if metric in row]
        if not values:
            known = sorted({name for row in report.evaluations for name in row} - {"step"})
            raise ValueError(f"search/metric: evaluations have no {metric!r}; they have {', '.join(known)}")
        return float((max if self._wanted.mode == "max" else min)(values))

    def _distribution(self, values: Any) -> Any:
        distributions = self._optuna.distributions
        if isinstance(values, list):
            return distributions.CategoricalDistribution(values)
        low, high, log = values["low"], values["high"], values.get("log", False)
        if isinstance(low, int) and isinstance(high, int):
            return distributions.IntDistribution(low, high, log=log)
        return distributions.FloatDistribution(low, high, log=log)

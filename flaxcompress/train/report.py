"""The report of a training run: what report.json holds, and the same as a page and a table."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from flaxcompress.config.yaml_file import dump_yaml
from flaxcompress.evaluate import html, plots, versions
from flaxcompress.evaluate.profile import profile
from flaxcompress.model import Model
from flaxcompress.train.metrics import TIMES

_PREFIX = "validation/"
_MOST_ROWS = 2000  # of a curve in report.json; metrics.jsonl has all


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainReport:
    """A run, told by its settings and its metrics.

    Attributes:
      params, bytes, flops_per_token: of the model; training leaves its structure as it is.
      config: all settings, see `TrainConfig.resolved`.
      curve: a row {"step": …, name: value} of every step (of some, evenly, in a long run).
      evaluations: a row {"step": …, name: value} of each, without "validation/".
      steps: that were made.
      refused: of these, how many changed nothing, since loss or gradient were not finite, or a spike.
      seconds: that all steps took, finished parts of an interrupted run included.
      waiting, saving: shares of it spent waiting for data and saving; None where they were not measured.
      devices: what it ran on, "8 × TPU v5 lite".
      source: the model's name.
    """

    params: int
    bytes: int
    flops_per_token: float
    config: Mapping[str, Any]
    curve: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    steps: int
    refused: int
    seconds: float
    waiting: float | None
    saving: float | None
    devices: str
    source: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions)

    @classmethod
    def of(
        cls, model: Model, metrics: Sequence[Mapping[str, Any]], *, config: Mapping[str, Any], devices: str
    ) -> TrainReport:
        """The report of a run from what `read_metrics` gives."""
        found = profile(model, length=min(128, model.config.positions))
        rows = [row for row in metrics if "loss" in row]
        total = _sum(rows, "seconds")
        return cls(
            params=found.params,
            bytes=found.bytes,
            flops_per_token=found.flops_per_token,
            config=dict(config),
            curve=_thinned([{n: v for n, v in row.items() if not n.startswith(_PREFIX)} for row in rows]),
            evaluations=_evaluations(metrics),
            steps=rows[-1]["step"] if rows else 0,
            refused=_refused(rows),
            seconds=total,
            waiting=_share(rows, "waiting", total),
            saving=_share(rows, "saving", total),
            devices=devices,
            source=model.assets.source,
        )

    def to_json(self) -> dict[str, Any]:
        """The object of report.json: sizes before and after, as every report has them, and `training`."""
        same = {name: {"before": getattr(self, name), "after": getattr(self, name)} for name in _SIZES}
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in (*_SIZES, "versions")}
        step = {"name": "train", "params": self.params, "bytes": self.bytes, "seconds": self.seconds}
        return {
            **same,
            "fidelity": None,
            "steps": [step],
            "seconds": self.seconds,
            "training": {name: _plain(value) for name, value in own.items()},
            "versions": dict(self.versions),
        }

    def last(self) -> dict[str, Any]:
        """The values at the end: of the last step, and of the last evaluation."""
        found = {n: v for n, v in (self.curve[-1] if self.curve else {}).items() if n not in (*TIMES, "step")}
        measured = self.evaluations[-1] if self.evaluations else {}
        return found | {f"{_PREFIX}{n}": v for n, v in measured.items() if n != "step"}

    def to_html(self) -> str:
        """A page that needs nothing but itself."""
        return _page(self)

    def table(self) -> Any:
        """A `rich.table.Table` that sums the run up."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(f"{self.config['task']['name']}, {self.steps:,} steps"))
        table.add_column("measure")
        table.add_column("value", justify="right")
        for name, value in self.last().items():
            table.add_row(name.replace("_", " "), figure(name, value))
        table.add_section()
        table.add_row("million weights", f"{self.params / 1e6:,.2f}")
        table.add_row("time", html.duration(self.seconds))
        for name in ("waiting", "saving"):
            if (share := getattr(self, name)) is not None:
                table.add_row(f"of it {_SAID[name]}", f"{share:.1%}")
        if self.refused:
            table.add_row("refused steps", f"{self.refused:,}")
        table.caption = Text(self.devices)
        return table


_SIZES = ("params", "bytes", "flops_per_token")
_SAID = {"waiting": "waiting for data", "saving": "saving"}


def figure(name: str, value: float | None) -> str:
    """A metric's value in words."""
    if value is None:
        return "not finite"
    if name == "tokens_per_second":
        return f"{value:,.0f}"
    return f"{value:.1%}" if name == "mfu" else f"{value:.4g}"


def _sum(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(row.get(name) or 0.0 for row in rows))


def _refused(rows: Sequence[Mapping[str, Any]]) -> int:
    """Steps that changed nothing; a row tells the share of those since the row before that changed something."""
    ends = [0, *(row["step"] for row in rows)]
    counts = [end - start for start, end in itertools.pairwise(ends)]
    return round(sum(n * (1 - row.get("accepted", 1)) for n, row in zip(counts, rows, strict=True)))


def _share(rows: Sequence[Mapping[str, Any]], name: str, total: float) -> float | None:
    return _sum(rows, name) / total if total > 0 and any(name in row for row in rows) else None


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keep = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MOST_ROWS)).round().astype(int)) if rows else []
    return [rows[i] for i in keep]


def _evaluations(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    out = []
    for row in metrics:
        found = {name.removeprefix(_PREFIX): v for name, v in row.items() if name.startswith(_PREFIX)}
        if found:
            out.append({"step": row["step"], **found})
    return out


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _page(report: TrainReport) -> str:
    title = f"{report.source or 'A model'}, trained"
    said = f"{report.config['task']['name']} on {report.devices}, {html.duration(report.seconds)}."
    return html.document(
        title,
        said,
        [
            html.cards(_cards(report)),
            html.section("Loss", _plot(report, _draw_loss, "Loss by step, raw and smoothed, with evaluations")),
            html.section("Evaluations", _evaluation_section(report)),
            html.section("Learning rate", _plot(report, _draw_rate, "Learning rate by step")),
            html.section("At the end", _end(report)),
            html.section("Settings", f"<pre>{escape(dump_yaml(report.config))}</pre>"),
            html.section("Versions", html.table(["", "version"], report.versions.items(), numbers=0)),
        ],
    )


def _cards(report: TrainReport) -> list[tuple[str, str, str]]:
    boxes = [
        ("steps", f"{report.steps:,}", f"{report.refused:,} refused" if report.refused else ""),
        ("weights stored", f"{report.params / 1e6:,.2f} M", f"{report.bytes / 1e6:,.2f} MB"),
        ("FLOPs per token", f"{report.flops_per_token / 1e6:,.2f} M", "of a forward pass"),
    ]
    for name in ("tokens_per_second", "mfu"):
        values = [row[name] for row in report.curve if row.get(name) is not None]
        if values:
            boxes.append((name.replace("_", " "), figure(name, float(np.median(values))), "median"))
    return boxes


def _end(report: TrainReport) -> str:
    rows = [[name.replace("_", " "), figure(name, value)] for name, value in report.last().items()]
    shares = [(name, getattr(report, name)) for name in ("waiting", "saving")]
    rows += [[f"time {_SAID[name]}", f"{share:.2%}"] for name, share in shares if share is not None]
    return html.table(["measure", "value"], rows, numbers=1) if rows else ""


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _plot(report: TrainReport, draw: Any, label: str) -> str:
    name = "learning_rate" if draw is _draw_rate else "loss"
    return html.plot(lambda: draw(report), label) if _points(report.curve, name) else ""


def _draw_loss(report: TrainReport) -> Any:
    figure, axes = plots.figure_of(3.6)
    plots.raw_and_smooth(axes, _points(report.curve, "loss"))
    if measured := _points(report.evaluations, "loss"):
        axes.plot(*zip(*measured, strict=True), "o-", color="#c2542d", markersize=4, label="validation")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    return figure


def _draw_rate(report: TrainReport) -> Any:
    figure, axes = plots.figure_of(2.4)
    axes.plot(*zip(*_points(report.curve, "learning_rate"), strict=True), color="#2563a8", linewidth=2)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    return figure


def _evaluation_section(report: TrainReport) -> str:
    if not report.evaluations:
        return ""
    names = list(dict.fromkeys(name for row in report.evaluations for name in row if name != "step"))
    rows = [[f"{row['step']:,}", *(figure(n, row.get(n)) for n in names)] for row in report.evaluations[-20:]]
    table = html.table(["after step", *(n.replace("_", " ") for n in names)], rows, numbers=len(names))
    pictures = (
        html.plot(lambda n=n: _draw_evaluation(report, n), f"{n} on the validation data, by step")
        for n in names
        if n != "loss" and len(_points(report.evaluations, n)) > 1
    )
    return "".join(pictures) + table


def _draw_evaluation(report: TrainReport, name: str) -> Any:
    figure, axes = plots.figure_of(2.4)
    axes.plot(*zip(*_points(report.evaluations, name), strict=True), "o-", color="#2563a8", markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel(name.replace("_", " "))
    return figure

"""Keeps of finished runs what fits into a repository: settings, final figures, thinned curves, and a picture.

    python experiments/scratch/keep.py multi30k runs/multi30k-shared runs/multi30k-untied --measured shared.json

writes results/multi30k.json and results/multi30k.png beside this file. The curve of the training loss has a point for
each hundredth of the run, the mean over it; evaluations are all there. `--measured` names what
`flaxcompress evaluate … --json FILE` wrote.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
_POINTS = 100
_COLORS = ("#2563a8", "#c2542d", "#3a8f5c", "#8a5aa8")


def kept(run: Path) -> dict[str, Any]:
    """Of a run's report.json."""
    report = json.loads((run / "report.json").read_text("utf-8"))
    training = report["training"]
    evaluations = training["evaluations"]
    return {
        "params": report["params"]["after"],
        "bytes": report["bytes"]["after"],
        "flops_per_token": report["flops_per_token"]["after"],
        "steps": training["steps"],
        "refused": training["refused"],
        "seconds": round(training["seconds"], 1),
        "waiting": training["waiting"],
        "saving": training["saving"],
        "devices": training["devices"],
        "versions": report["versions"],
        "validation": evaluations[-1] if evaluations else None,
        "config": training["config"],
        "evaluations": rounded(evaluations),
        "curve": rounded(thinned(training["curve"])),
    }


def thinned(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean loss of each hundredth of a run, at its last step."""
    rows = [row for row in curve if row.get("loss") is not None]
    parts = [part for part in np.array_split(np.arange(len(rows)), min(_POINTS, len(rows))) if len(part)]
    return [{"step": rows[p[-1]]["step"], "loss": float(np.mean([rows[i]["loss"] for i in p]))} for p in parts]


def rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: float(f"{v:.5g}") if isinstance(v, float) else v for name, v in row.items()} for row in rows]


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Losses in training (thin) and on the validation data (dots), by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, run), color in zip(runs.items(), _COLORS, strict=False):
        axes.plot(*points(run["curve"]), color=color, linewidth=1, label=f"{name}, {run['params']:,} weights")
        axes.plot(*points(run["evaluations"]), "o", color=color, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (line: training; dots: validation)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def points(rows: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    return [row["step"] for row in rows], [row["loss"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--measured", nargs="+", type=Path, default=[], help="what evaluate --json wrote")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    runs = {run.name: kept(run) for run in options.runs}
    measured = [json.loads(file.read_text("utf-8")) for file in options.measured]
    text = json.dumps({"runs": runs, "measured": measured}, indent=1, ensure_ascii=False)
    if folder := os.environ.get("FLAXCOMPRESS_DATA"):  # as the settings had it
        text = text.replace(folder.rstrip("/"), "${FLAXCOMPRESS_DATA}")
    (RESULTS / f"{options.name}.json").write_text(text + "\n", "utf-8")
    draw(runs, RESULTS / f"{options.name}.png")


if __name__ == "__main__":
    main()

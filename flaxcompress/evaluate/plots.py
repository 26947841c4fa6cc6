"""The plots of a report; matplotlib is imported when one is drawn, and its global state is left alone."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxcompress.evaluate.report import Report

_BEFORE, _AFTER, _RAW, _RECIPE = "#b9c3d0", "#2563a8", "#c9d3df", "#c2542d"
_MOST_POINTS = 2000  # of a curve: more cannot be seen
_MOST_SPECTRA = 40


def svg(figure: Any) -> bytes:
    """The figure as SVG, the same bytes every time."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "flaxcompress"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def smooth(values: np.ndarray) -> np.ndarray:
    """An exponential moving average over about a twentieth of the curve, unbiased at its start."""
    decay = 1 - 1 / max(1.0, len(values) / 20)
    total, weight, out = 0.0, 0.0, np.empty(len(values))
    for i, value in enumerate(values):
        total, weight = decay * total + value, decay * weight + 1
        out[i] = total / weight
    return out


def kept_energy(singular_values: Any, rank: int | None) -> float:
    """The share of the squared singular values that the first `rank` hold."""
    energy = np.square(np.asarray(singular_values, np.float64))
    total = float(energy.sum())
    return float(energy[:rank].sum()) / total if total > 0 else 1.0


def parts(report: Report) -> Any:
    """Megabytes of each part before and after, as paired bars."""
    sides = [{p["part"]: p["bytes"] / 1e6 for p in report.parts[side]} for side in ("before", "after")]
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    figure, axes = figure_of(0.55 * len(names) + 1.2)
    for side, label, color, offset in ((sides[0], "before", _BEFORE, -0.2), (sides[1], "after", _AFTER, 0.2)):
        values = [side.get(name, 0.0) for name in names]
        bars = axes.barh(np.arange(len(names)) + offset, values, height=0.38, color=color, label=label)
        axes.bar_label(bars, labels=[f"{value:.3g}" for value in values], padding=3, fontsize=8)
    _name_rows(axes, names)
    axes.margins(x=0.1)
    axes.set_xlabel("MB")
    axes.legend(frameon=False)
    return figure


def spectra(report: Report) -> Any:
    """Singular values against their number, each relative to its largest; a dot at the chosen rank."""
    import matplotlib

    figure, axes = figure_of(4.2)
    shown = report.spectra[:_MOST_SPECTRA]
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, max(len(shown), 1)))
    for spectrum, color in zip(shown, colors, strict=False):
        values = np.array([np.nan if v is None else v for v in spectrum["singular_values"]], np.float64)
        if not len(values) or not np.nanmax(values) > 0:
            continue
        values = np.where(values > 0, values, np.nan) / np.nanmax(values)
        number = np.arange(1, len(values) + 1)
        axes.plot(number, values, color=color, linewidth=1, label=spectrum["address"])
        rank = spectrum["rank"]
        if rank is not None and 1 <= rank <= len(values):
            axes.plot([rank], [values[rank - 1]], "o", color=color, markersize=5)
    axes.set_yscale("log")
    axes.set_xlabel("number of the singular value (a dot marks the last one kept)")
    axes.set_ylabel("relative to the largest")
    if len(axes.lines) and len(shown) <= 10:
        axes.legend(frameon=False, fontsize=8)
    return figure


def healing(report: Report) -> Any:
    """The loss by step: raw, and smoothed over a twentieth of the run."""
    figure, axes = figure_of(3.4)
    raw_and_smooth(axes, [(row["step"], row["loss"]) for row in report.healing if row["loss"] is not None])
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    return figure


def raw_and_smooth(axes: Any, points: Sequence[tuple[int, float]]) -> None:
    """Draws a noisy curve of (step, value): as it is, and smoothed over a twentieth of it."""
    step, value = np.array(points, np.float64).T
    smoothed = smooth(value)
    keep = np.unique(np.linspace(0, len(step) - 1, min(len(step), _MOST_POINTS)).round().astype(int))
    axes.plot(step[keep], value[keep], color=_RAW, linewidth=1, marker="." if len(keep) < 3 else None, label="raw")
    axes.plot(step[keep], smoothed[keep], color=_AFTER, linewidth=2, label="smoothed")
    if value.min() > 0 and value.max() > 20 * value.min():
        axes.set_yscale("log")
    axes.set_xlabel("step")


def steps(report: Report) -> Any:
    """Seconds of each step."""
    return _times([(row["name"], row["seconds"]) for row in report.steps])


def layers(report: Report) -> Any:
    """Seconds of each layer."""
    return _times([(row["layer"], row["seconds"]) for row in report.layers])


def heat_map(curves: Any, which: str) -> Any:
    """Predicted loss by layer (columns) and kind of matrix (rows), a panel for each number of bits, or each rank."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    places = [re.fullmatch(r"layers/(\d+)/(.*)/kernel", m["address"]) for m in curves.matrices]
    layers = sorted({int(p[1]) for p in places if p})
    kinds = list(dict.fromkeys(p[2] for p in places if p))
    panels = range(len(curves.matrices[0][which]))
    grids = np.full((len(panels), len(kinds), len(layers)), np.nan)
    for matrix, place in zip(curves.matrices, places, strict=True):
        if place:
            for panel in panels:
                at = kinds.index(place[2]), layers.index(int(place[1]))
                grids[panel, *at] = max(matrix[which][panel]["loss"], 1e-12)
    figure = Figure(figsize=(8, 0.28 * len(kinds) * -(-len(panels) // 2) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(-(-len(panels) // 2), 2, squeeze=False, sharex=True, sharey=True).ravel()
    norm = LogNorm(np.nanmin(grids), np.nanmax(grids))
    for panel, here in zip(panels, axes, strict=False):
        image = here.imshow(grids[panel], norm=norm, cmap=matplotlib.colormaps["viridis"], aspect="auto")
        first = curves.matrices[0]
        title = f"{first['bits'][panel]['bits']} bits" if which == "bits" else f"rank {first['fractions'][panel]:.0%}"
        here.set_title(title, fontsize=9)
        here.set_yticks(np.arange(len(kinds)), kinds, fontsize=7)
        here.set_xticks(np.arange(len(layers)), [str(layer) for layer in layers], fontsize=7)
    for here in axes[len(panels) :]:
        here.set_axis_off()
    figure.colorbar(image, ax=list(axes), label=curves.unit)
    return figure


def frontier(curves: Any) -> Any:
    """The best choice's predicted loss by size, and recipes as they were measured."""
    figure, axes = figure_of(3.6)
    points = np.array([[p["bytes"] / 1e6, p["loss"]] for p in curves.frontier], np.float64)
    axes.plot(points[:, 0], points[:, 1], color=_AFTER, linewidth=2, label="chosen together (predicted)")
    for recipe in curves.recipes:
        axes.plot([recipe["bytes"] / 1e6], [recipe["loss"]], "o", color=_RECIPE, markersize=5)
        axes.annotate(recipe["name"], (recipe["bytes"] / 1e6, recipe["loss"]), (5, 4), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("MB")
    axes.set_ylabel(curves.unit)
    axes.legend(frameon=False)
    return figure


def figure_of(height: float) -> tuple[Any, Any]:
    """An empty figure 8 inches wide, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _times(rows: Sequence[tuple[str, float]]) -> Any:
    """(name, seconds) as bars."""
    seconds = [value for _, value in rows]
    figure, axes = figure_of(0.4 * len(seconds) + 1.1)
    bars = axes.barh(np.arange(len(seconds)), seconds, height=0.6, color=_AFTER)
    axes.bar_label(bars, labels=[f"{value:.1f}" for value in seconds], padding=3, fontsize=8)
    _name_rows(axes, [name for name, _ in rows])
    axes.margins(x=0.1)
    axes.set_xlabel("seconds")
    return figure


def _name_rows(axes: Any, names: list[str]) -> None:
    # A dollar sign would begin a formula.
    axes.set_yticks(np.arange(len(names)), [name[:40].replace("$", r"\$") for name in names])
    axes.invert_yaxis()

"""A report as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from flaxcompress.evaluate import plots
from flaxcompress.evaluate.report import Report, fidelity_rows

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #f6f7f9; margin: 0; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
p { margin: .25rem 0 .75rem; } .quiet { color: #5b6675; }
section { background: #fff; border: 1px solid #e2e6eb; border-radius: 10px; padding: 1.25rem; margin: 1.25rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem; margin: 1.25rem 0; }
.card { background: #fff; border: 1px solid #e2e6eb; border-radius: 10px; padding: 1rem; }
.card b { display: block; font-size: 1.5rem; line-height: 1.3; } .card span { color: #5b6675; font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
th { text-align: left; font-weight: 600; border-bottom: 2px solid #d5dae1; }
th, td { padding: .35rem .75rem .35rem 0; vertical-align: top; }
tr + tr td { border-top: 1px solid #eceff3; } td.n, th.n { text-align: right; white-space: nowrap; }
img { display: block; max-width: 100%; height: auto; margin: .75rem auto 0; }
pre { background: #f6f7f9; border-radius: 6px; padding: .75rem; overflow-x: auto; font-size: .85rem; }
"""


def render(report: Report) -> str:
    """The page of a report; where matplotlib is missing, the page says so in place of the plots."""
    title = f"{report.source or 'A model'}, compressed"
    sections = [
        _cards(report),
        _section("Fidelity to the original", _fidelity(report)),
        _section("Sizes by part", _parts(report)),
        _section("Singular values and the chosen rank", _spectra(report)),
        _section("Healing", _healing(report)),
        _section("Steps", _steps(report)),
        _section("Recipe", _recipe(report)),
        _section("Versions", _table(["", "version"], report.versions.items(), numbers=0)),
    ]
    calibration = f"Calibrated on {report.calibration}. " if report.calibration else ""
    subtitle = f"{calibration}Took {_seconds(report.seconds)}."
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="quiet">{escape(subtitle)}</p>\n'
        f"{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _cards(report: Report) -> str:
    cards = []
    for name, values, show in (
        ("model.safetensors", report.bytes, lambda v: f"{v / 1e6:,.2f} MB"),
        ("weights stored", report.params, lambda v: f"{v / 1e6:,.2f} M"),
        ("FLOPs per token", report.flops_per_token, lambda v: f"{v / 1e6:,.2f} M"),
    ):
        before, after = values["before"], values["after"]
        ratio = f"{before / after:.2f}× smaller, " if after else ""
        cards.append((name, show(after), f"{ratio}from {show(before)}"))
    boxes = (f'<div class="card"><span>{escape(n)}</span><b>{escape(b)}</b>{escape(s)}</div>\n' for n, b, s in cards)
    return f'<div class="cards">\n{"".join(boxes)}</div>\n'


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n" if body else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: int) -> str:
    """A table whose last `numbers` columns are aligned as numbers."""

    def cells(tag: str, row: Sequence[Any]) -> str:
        kinds = [""] * (len(row) - numbers) + [' class="n"'] * numbers
        return "".join(f"<{tag}{kind}>{escape(str(cell))}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{cells("th", header)}</tr>\n{body}\n</table></div>'


def _fidelity(report: Report) -> str:
    if report.fidelity is None:
        return "<p>Not measured.</p>"
    found = report.fidelity
    table = _table(["on held-out text", "original", "compressed"], fidelity_rows(found), numbers=2)
    return f'{table}\n<p class="quiet">{found["n"]:,} texts: {escape(str(found["data"]))}.</p>'


def _parts(report: Report) -> str:
    if not report.parts:
        return ""
    sides = [{part["part"]: part for part in report.parts[side]} for side in ("before", "after")]
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        before, after = (side.get(name) for side in sides)
        rows.append(
            [
                name,
                after.get("format", "") if after else "left out",
                *(f"{part['weights']:,}" if part else "–" for part in (before, after)),
                *(f"{part['bytes'] / 1e6:,.3f}" if part else "–" for part in (before, after)),
            ]
        )
    header = ["part", "format", "weights before", "after", "MB before", "after"]
    return _plot(plots.parts, report, "Bytes by part, before and after") + _table(header, rows, numbers=4)


def _spectra(report: Report) -> str:
    if not report.spectra:
        return ""
    rows = []
    for spectrum in report.spectra:
        rank = "all" if spectrum["rank"] is None else f"{spectrum['rank']:,}"
        energy = plots.kept_energy(spectrum["singular_values"], spectrum["rank"])
        rows.append([spectrum["address"], f"{len(spectrum['singular_values']):,}", rank, f"{energy:.2%}"])
    table = _table(["matrix", "singular values", "rank kept", "energy kept"], rows, numbers=3)
    return _plot(plots.spectra, report, "Singular values of each factorized matrix, the chosen rank marked") + table


def _healing(report: Report) -> str:
    losses = [row["loss"] for row in report.healing if row["loss"] is not None]
    if not losses:
        return ""
    text = f"<p>{len(report.healing):,} points, loss {losses[0]:.4g} at first, {losses[-1]:.4g} at last.</p>"
    return text + _plot(plots.healing, report, "Loss of the healing, raw and smoothed")


def _steps(report: Report) -> str:
    if not report.steps:
        return ""
    rows = [[s["name"], f"{s['params']:,}", f"{s['bytes'] / 1e6:,.2f}", f"{s['seconds']:,.1f}"] for s in report.steps]
    table = _table(["step", "weights after it", "MB after it", "seconds"], rows, numbers=3)
    return table + _plot(plots.steps, report, "Seconds spent by each step")


def _recipe(report: Report) -> str:
    if report.recipe is None:
        return ""
    return f"<pre>{escape(json.dumps(report.recipe, indent=2, ensure_ascii=False))}</pre>"


def _plot(draw: Callable[[Report], Any], report: Report, label: str) -> str:
    try:
        figure = draw(report)
    except ImportError:
        return '<p class="quiet">No plot: matplotlib is not installed (pip install matplotlib).</p>\n'
    content = base64.b64encode(plots.svg(figure)).decode("ascii")
    return f'<img alt="{escape(label)}" src="data:image/svg+xml;base64,{content}">\n'


def _seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"

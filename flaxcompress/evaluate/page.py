"""A report as one HTML page that needs nothing but itself."""

from __future__ import annotations

import functools
import json
from html import escape

from flaxcompress.evaluate import html, plots
from flaxcompress.evaluate.report import Report, fidelity_rows


def render(report: Report) -> str:
    """The page of a report; where matplotlib is missing, the page says so in place of the plots."""
    title = f"{report.source or 'A model'}, compressed"
    sections = [
        _cards(report),
        html.section("Fidelity to the original", _fidelity(report)),
        html.section("Sizes by part", _parts(report)),
        html.section("What each matrix became", _choices(report)),
        html.section("Singular values and the chosen rank", _spectra(report)),
        html.section("Healing", _healing(report)),
        html.section("Steps", _steps(report)),
        html.section("Layer by layer", _layers(report)),
        html.section("Recipe", _recipe(report)),
        html.section("Versions", html.table(["", "version"], report.versions.items(), numbers=0)),
    ]
    calibration = f"Calibrated on {report.calibration}. " if report.calibration else ""
    subtitle = f"{calibration}Took {html.duration(report.seconds)}."
    return html.document(title, subtitle, sections)


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
    if (rates := report.encoded_per_second) is not None:
        ratio = f"{rates['after'] / rates['before']:.2f}× as many as {rates['before']:,.0f}"
        said = f"{ratio}: these methods make the model slower here" if report.is_slower else ratio
        cards.append(("texts encoded per second", f"{rates['after']:,.0f}", said))
    return html.cards(cards)


def _fidelity(report: Report) -> str:
    if report.fidelity is None:
        return "<p>Not measured.</p>"
    found = report.fidelity
    table = html.table(["on held-out text", "original", "compressed"], fidelity_rows(found), numbers=2)
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
    return html.plot(functools.partial(plots.parts, report), "Bytes by part, before and after") + html.table(
        header, rows, numbers=4
    )


def _choices(report: Report) -> str:
    if not report.choices:
        return ""
    rows = [[c["address"], c["choice"], f"{c['bytes'] / 1e6:,.3f}", f"{c['loss']:.2e}"] for c in report.choices]
    return html.table(["matrix", "stored as", "MB", "predicted loss"], rows, numbers=2)


def _spectra(report: Report) -> str:
    if not report.spectra:
        return ""
    rows = []
    for spectrum in report.spectra:
        rank = "all" if spectrum["rank"] is None else f"{spectrum['rank']:,}"
        energy = plots.kept_energy(spectrum["singular_values"], spectrum["rank"])
        rows.append([spectrum["address"], f"{len(spectrum['singular_values']):,}", rank, f"{energy:.2%}"])
    table = html.table(["matrix", "singular values", "rank kept", "energy kept"], rows, numbers=3)
    return (
        html.plot(
            functools.partial(plots.spectra, report),
            "Singular values of each factorized matrix, the chosen rank marked",
        )
        + table
    )


def _healing(report: Report) -> str:
    losses = [row["loss"] for row in report.healing if row["loss"] is not None]
    if not losses:
        return ""
    text = f"<p>{len(report.healing):,} points, loss {losses[0]:.4g} at first, {losses[-1]:.4g} at last.</p>"
    return text + html.plot(functools.partial(plots.healing, report), "Loss of the healing, raw and smoothed")


def _steps(report: Report) -> str:
    if not report.steps:
        return ""
    rows = [[s["name"], f"{s['params']:,}", f"{s['bytes'] / 1e6:,.2f}", f"{s['seconds']:,.1f}"] for s in report.steps]
    table = html.table(["step", "weights after it", "MB after it", "seconds"], rows, numbers=3)
    return table + html.plot(functools.partial(plots.steps, report), "Seconds spent by each step")


def _layers(report: Report) -> str:
    if not report.layers:
        return ""
    rows = [[row["layer"], f"{row['bytes'] / 1e6:,.2f}", f"{row['seconds']:,.1f}"] for row in report.layers]
    table = html.table(["layer, or matrix outside of layers", "MB at the end", "seconds in all steps"], rows, numbers=2)
    return table + html.plot(functools.partial(plots.layers, report), "Seconds spent on each layer")


def _recipe(report: Report) -> str:
    if report.recipe is None:
        return ""
    return f"<pre>{escape(json.dumps(report.recipe, indent=2, ensure_ascii=False))}</pre>"

"""Pieces of HTML pages that need nothing but themselves: what reports are made of."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from flaxcompress.evaluate import plots

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


def document(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """A whole page."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="quiet">{escape(subtitle)}</p>\n'
        f"{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def cards(boxes: Iterable[tuple[str, str, str]]) -> str:
    """Boxes of (name, figure, what is said of it)."""
    inner = (f'<div class="card"><span>{escape(n)}</span><b>{escape(b)}</b>{escape(s)}</div>\n' for n, b, s in boxes)
    return f'<div class="cards">\n{"".join(inner)}</div>\n'


def section(title: str, body: str) -> str:
    """A titled box; nothing where there is no body."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n" if body else ""


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: int) -> str:
    """A table whose last `numbers` columns are aligned as numbers."""

    def cells(tag: str, row: Sequence[Any]) -> str:
        kinds = [""] * (len(row) - numbers) + [' class="n"'] * numbers
        return "".join(f"<{tag}{kind}>{escape(str(cell))}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{cells("th", header)}</tr>\n{body}\n</table></div>'


def plot(draw: Callable[[], Any], label: str) -> str:
    """A figure of matplotlib as an image inside the page; a line that says so where matplotlib is missing."""
    try:
        figure = draw()
    except ImportError:
        return '<p class="quiet">No plot: matplotlib is not installed (pip install matplotlib).</p>\n'
    content = base64.b64encode(plots.svg(figure)).decode("ascii")
    return f'<img alt="{escape(label)}" src="data:image/svg+xml;base64,{content}">\n'


def duration(seconds: float) -> str:
    """A time span in words."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"

"""How much each matrix minds rank and bits: curves of predicted loss, as JSON, a table and a page."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flaxcompress.evaluate import html, plots
from flaxcompress.evaluate.report import versions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curves:
    """Predicted losses of every matrix alone, and of whole models by size.

    Attributes:
      source: the model's name.
      calibration: the text's name.
      unit: what losses are.
      matrices: [{"address", "shape", "bits": [{"bits", "bytes", "loss"}], "ranks": [{"rank", "bytes", "loss"}]}].
      table: [{"bytes", "loss"}] of the token table in tiers.
      frontier: [{"bytes", "loss"}], what the choice of all together is predicted to lose.
      recipes: [{"name", "bytes", "loss"}], measured on recipes without their healing.
      seconds: that it took.
    """

    source: str
    calibration: str
    unit: str
    matrices: Sequence[Mapping[str, Any]]
    table: Sequence[Mapping[str, Any]] = ()
    frontier: Sequence[Mapping[str, Any]] = ()
    recipes: Sequence[Mapping[str, Any]] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The JSON object of report.json."""
        return {**dataclasses.asdict(self), "versions": versions()}

    def rows(self) -> list[list[str]]:
        """[kind of matrix, the layer that minds most, its loss in 2, 3, 4 and 8 bits, at half of break-even rank]."""
        kinds: dict[str, list[Mapping[str, Any]]] = {}
        for matrix in self.matrices:
            kinds.setdefault(kind_of(matrix["address"]), []).append(matrix)
        out = []
        for kind, matrices in kinds.items():
            worst = max(matrices, key=lambda m: m["bits"][0]["loss"])
            layer = re.search(r"layers/(\d+)", worst["address"])
            bits = [f"{entry['loss']:.2e}" for entry in worst["bits"]]
            middle = worst["ranks"][len(worst["ranks"]) // 2]
            out.append([kind, layer[1] if layer else "", *bits, f"{middle['loss']:.2e} at {middle['rank']}"])
        return out

    def header(self) -> list[str]:
        """Of `rows`."""
        bits = [f"{entry['bits']} bits" for entry in self.matrices[0]["bits"]]
        return ["matrix", "worst layer", *bits, "low rank"]

    def summary(self) -> Any:
        """A `rich.table.Table`."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(f"{self.source}: predicted loss of each kind of matrix alone ({self.unit})"))
        for number, name in enumerate(self.header()):
            table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0)
        for row in self.rows():
            table.add_row(*map(Text, row))
        return table

    def to_html(self) -> str:
        """A page that needs nothing but itself."""
        each = [
            [m["address"], *(f"{e['loss']:.2e}" for e in m["bits"]), *(f"{e['loss']:.2e}" for e in m["ranks"])]
            for m in self.matrices
        ]
        ranks = [f"rank {r:.0%}" for r in self.matrices[0]["fractions"]]
        header = ["matrix", *self.header()[2:-1], *ranks]
        legend = (
            f"Loss: {self.unit}, predicted for the matrix alone. Ranks as shares of the rank at which factors are as "
            "large as the matrix."
        )
        sections = [
            html.section(
                "Bits", html.plot(functools.partial(plots.heat_map, self, "bits"), "Loss by layer and matrix, in bits")
            ),
            html.section(
                "Rank", html.plot(functools.partial(plots.heat_map, self, "ranks"), "Loss by layer and matrix, by rank")
            ),
            html.section("Size against loss", self._frontier()),
            html.section(
                "Every matrix", f'<p class="quiet">{legend}</p>' + html.table(header, each, numbers=len(header) - 1)
            ),
        ]
        subtitle = f"Calibrated on {self.calibration}. Took {html.duration(self.seconds)}."
        return html.document(f"{self.source}: what its matrices mind", subtitle, sections)

    def _frontier(self) -> str:
        if not self.frontier:
            return ""
        rows = [[r["name"], f"{r['bytes'] / 1e6:.2f}", f"{r['loss']:.4f}"] for r in self.recipes]
        table = html.table(["recipe, without healing", "MB", self.unit], rows, numbers=2) if rows else ""
        return html.plot(functools.partial(plots.frontier, self), "Predicted loss of the best choice by size") + table


def kind_of(address: str) -> str:
    """ "layers/3/attention/query/kernel" -> "attention/query"."""
    return re.sub(r"^layers/\d+/|/kernel$", "", address)

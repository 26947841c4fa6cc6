"""The report of a compression: what report.json holds, and the same as a page (`page.py`) and a table."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from flaxcompress.config import reject_unknown

SLOWER = 0.95  # of the original's rate
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "flaxcompress")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that the result depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"  # run from a source tree
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Sizes before and after, fidelity, and how the result was reached; equal to what report.json holds.

    Attributes:
      params: {"before", "after"}, weights stored.
      bytes: {"before", "after"}, of model.safetensors.
      flops_per_token: {"before", "after"}.
      fidelity: {"data", "n", "mean_cosine", "rank_correlation", "neighbour_overlap_10"} on held-out text, or None; of
        causal models also "kl_per_token", the mean divergence of the next token from the original's.
      encoded_per_second: {"before", "after"}, texts that `encode` gets through, of interleaved rounds; or None.
      steps: [{"name", "params", "bytes", "seconds"}], sizes after the step.
      layers: [{"layer", "seconds", "bytes"}] of a run that went layer by layer on disk, sizes at the end; "layer" is
        "layers/0", …, or the address of a matrix outside of layers.
      seconds: of the whole run, finished steps of an interrupted one included.
      parts: {"before": [...], "after": [...]}, the parts of `Profile.to_json`.
      spectra: [{"address", "singular_values", "rank"}] of factorized matrices; rank None where all was kept.
      healing: [{"step", "loss"}].
      choices: [{"address", "choice", "kind", "bytes", "loss"}] of an allocation, losses as predicted.
      recipe: the recipe as JSON.
      calibration: the name of the calibration text.
      source: the name of the original model.

    Raises ValueError on construction for missing keys, TypeError for values that JSON cannot hold.
    """

    params: Mapping[str, int]
    bytes: Mapping[str, int]
    flops_per_token: Mapping[str, float]
    fidelity: Mapping[str, Any] | None = None
    encoded_per_second: Mapping[str, float] | None = None
    steps: Sequence[Mapping[str, Any]] = ()
    layers: Sequence[Mapping[str, Any]] = ()
    seconds: float = 0.0
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions)
    parts: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    spectra: Sequence[Mapping[str, Any]] = ()
    healing: Sequence[Mapping[str, Any]] = ()
    choices: Sequence[Mapping[str, Any]] = ()
    recipe: Any = None
    calibration: str = ""
    source: str = ""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name), f"report: {field.name}"))
        for name in ("params", "bytes", "flops_per_token"):
            _need(getattr(self, name), name, "before", "after")
        if self.fidelity is not None:
            keys = ("data", "n", "mean_cosine", "rank_correlation", "neighbour_overlap_10")
            _need(self.fidelity, "fidelity", *keys)
        if self.encoded_per_second is not None:
            _need(self.encoded_per_second, "encoded_per_second", "before", "after")
        if self.parts:
            _need(self.parts, "parts", "before", "after")
        for side, parts in self.parts.items():
            for part in parts:
                _need(part, f"parts/{side}", "part", "weights", "bytes")
        for name, keys in _ROWS.items():
            for row in getattr(self, name):
                _need(row, name, *keys)

    @property
    def is_slower(self) -> bool:
        """Whether the compressed model was measured to encode slower than the original, beyond noise."""
        rates = self.encoded_per_second
        return rates is not None and rates["after"] < SLOWER * rates["before"]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of report.json; `from_json` is its inverse."""
        return {field.name: _plain(getattr(self, field.name), field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """Reads `to_json`'s object. Raises ValueError for unknown and missing keys."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        reject_unknown("report", data, fields)
        required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [name for name in required if name not in data]:
            raise ValueError(f"report: missing {', '.join(missing)}")
        return cls(**data)

    def to_html(self) -> str:
        """A page that needs nothing but itself: tables, and plots as inline SVG where matplotlib is installed."""
        from flaxcompress.evaluate.page import render

        return render(self)

    def table(self):
        """A `rich.table.Table` that sums the report up."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.source) if self.source else None)
        for header in ("", "before", "after", "smaller by"):
            table.add_column(header, justify="left" if not header else "right")
        for name, values, scale in (
            ("MB", self.bytes, 1e6),
            ("million weights", self.params, 1e6),
            ("million FLOPs per token", self.flops_per_token, 1e6),
        ):
            before, after = values["before"], values["after"]
            ratio = f"{before / after:.2f}x" if after else "–"
            table.add_row(name, f"{before / scale:,.2f}", f"{after / scale:,.2f}", ratio)
        if self.encoded_per_second is not None:
            before, after = self.encoded_per_second["before"], self.encoded_per_second["after"]
            said = f"{after / before:.2f}x as many" + (", slower" if self.is_slower else "")
            table.add_row("texts encoded per second", f"{before:,.0f}", f"{after:,.0f}", said)
        if self.fidelity is not None:
            table.add_section()
            for name, original, value in fidelity_rows(self.fidelity):
                table.add_row(name, original, value, "")
            table.caption = Text(f"fidelity on {self.fidelity['n']:,} texts: {self.fidelity['data']}")
        return table


_ROWS = {
    "steps": ("name", "params", "bytes", "seconds"),
    "layers": ("layer", "seconds", "bytes"),
    "spectra": ("address", "singular_values", "rank"),
    "healing": ("step", "loss"),
    "choices": ("address", "choice", "kind", "bytes", "loss"),
}


def fidelity_rows(fidelity: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(measure, the original, the compressed model) as text; the original agrees with itself perfectly."""
    rows = []
    for name, key in (
        ("mean cosine to the original", "mean_cosine"),
        ("rank correlation of similarities", "rank_correlation"),
        ("overlap of 10 nearest neighbours", "neighbour_overlap_10"),
    ):
        value = fidelity[key]
        rows.append((name, "1.0000", "–" if value is None else f"{value:.4f}"))
    if (divergence := fidelity.get("kl_per_token")) is not None:
        rows.append(("divergence of the next token (nats)", "0.0000", f"{divergence:.4f}"))
    return rows


def _need(value: Any, where: str, *keys: str) -> None:
    missing = [key for key in keys if not isinstance(value, Mapping) or key not in value]
    if missing:
        raise ValueError(f"report: {where}: missing {', '.join(missing)}")


def _plain(value: Any, where: str) -> Any:
    """Values that JSON holds: arrays become lists, numbers that are not finite None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}/{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, where) for v in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "__array__") or isinstance(value, float):
        array = np.asarray(value)
        if array.dtype.kind in "biuf":
            found = array.tolist() if array.dtype.kind != "f" else array.astype(np.float64).tolist()
            return [_plain(v, where) for v in found] if array.ndim else _finite(found)
    raise TypeError(f"{where}: {type(value).__name__} cannot be held in JSON")


def _finite(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return None
    return value

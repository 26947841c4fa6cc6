"""Models written in other tools' formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flaxcompress.config import closest
from flaxcompress.export.peft import export_peft, load_adapter
from flaxcompress.export.torch import check_folder, export_dense
from flaxcompress.model import Model

FORMATS: dict[str, Callable[..., Path]] = {"torch-dense": export_dense, "peft": export_peft}


def export(model: Model, out: str | Path, *, format: str = "torch-dense", overwrite: bool = False) -> Path:
    """Writes `model` to the folder `out` in one of `FORMATS`, whole or not at all.

    Args:
      format: "torch-dense", a stock Hugging Face folder (see `export_dense`), or "peft", its adapters alone (see
        `export_peft`).
      overwrite: replaces a folder that exists and is not empty.

    Raises:
      ValueError: an unknown format, or `out` exists and is not empty, or cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"export: unknown format {format!r}; {closest(str(format), FORMATS)}")
    return FORMATS[format](model, out, overwrite=overwrite)


__all__ = ["FORMATS", "check_folder", "export", "export_dense", "export_peft", "load_adapter"]

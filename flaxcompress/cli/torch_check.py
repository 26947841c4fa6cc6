"""The check in PyTorch of a folder that is about to be written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flaxcompress.cli.command import Failure

if TYPE_CHECKING:
    from flaxcompress.model import Model


class PyTorchCheck:
    """Called on a folder before it is moved into place: it must compute in PyTorch what the model computes here."""

    def __init__(self, model: Model, out: Path):
        self._model, self._out = model, out
        self.difference: float | None = None

    def __call__(self, folder: Path) -> None:
        from flaxcompress.export.torch import check_folder

        try:
            self.difference = check_folder(self._model, folder)
        except ValueError as error:
            message = str(error).replace(str(folder), str(self._out))
            raise Failure(f"{message}; nothing was written") from error

    @property
    def outcome(self) -> str:
        """What came of it, for the line below a table."""
        if self.difference is None:
            return "not checked in PyTorch, which is not installed"
        return f"PyTorch agrees within {self.difference:.0e}"

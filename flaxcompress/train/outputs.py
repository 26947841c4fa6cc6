"""A run's folder: on a disk, or a bucket's address, whose small files are then copied there from a local folder."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from flaxcompress import storage
from flaxcompress.train.config import FILE
from flaxcompress.train.metrics import FILE as METRICS

_EVERY_SECONDS = 60.0
_NEEDED_AGAIN = (FILE, METRICS, "wandb-run", "tokenizer")


class Outputs:
    """Where a run's settings, metrics, report and model go; a context manager.

    Attributes:
      folder: a local folder to write them to.

    Args:
      out: that folder itself, or an address such as "gs://bucket/run". What is written for the latter is copied there
        now and then, and at the end; checkpoints are written there directly.
      writes: whether this process is the one that writes.

    Raises ValueError where the folder cannot be written, or holds something other than a run.
    """

    def __init__(self, out: str, *, writes: bool = True):
        self._remote = out if "://" in out else None
        self._writes = writes
        self._local = None
        self._copied = time.monotonic()
        if self._remote is None and writes:
            self.folder = Path(os.path.abspath(out))
            storage.check_output(self.folder, overwrite=True)
            if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / FILE).is_file():
                raise ValueError(f"out: {out} is not empty and holds no run (no {FILE}); choose another folder")
            self.folder.mkdir(parents=True, exist_ok=True)
        else:
            self._local = tempfile.TemporaryDirectory()
            self.folder = Path(self._local.name)

    def __enter__(self) -> Outputs:
        if self._remote is not None and self._writes:
            there = _path(self._remote)
            for name in _NEEDED_AGAIN:
                _copy(there / name, self.folder / name)
        return self

    def __exit__(self, *_: object) -> None:
        self.copy()
        if self._local is not None:
            self._local.cleanup()

    @property
    def begun(self) -> bool:
        """Whether a run there has left a checkpoint: without one, the next run starts anew."""
        checkpoints = _path(self._remote or self.folder) / "checkpoints"
        return checkpoints.exists() and any(path.name.isdecimal() for path in checkpoints.iterdir())

    def copy_now_and_then(self) -> None:
        """Copies what there is, if the last time was a while ago."""
        if self._remote is not None and time.monotonic() - self._copied > _EVERY_SECONDS:
            self.copy()

    def copy(self) -> None:
        """Copies what there is to the address."""
        if self._remote is not None and self._writes:
            for path in self.folder.iterdir():
                _copy(path, _path(self._remote) / path.name)
            self._copied = time.monotonic()


def _path(address: Any) -> Any:
    from etils import epath

    return epath.Path(address)


def _copy(source: Any, target: Any) -> None:
    """A file, or a folder with all it holds; nothing where there is no such thing."""
    source, target = _path(source), _path(target)
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for inner in source.iterdir():
            _copy(inner, target / inner.name)
    elif source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        source.copy(target, overwrite=True)

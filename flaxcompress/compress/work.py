"""The work folder of a run: its checkpoints, kept for a run of the same identity."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flaxcompress import storage

log = logging.getLogger("flaxcompress")

MARK = "run.json"


def work_folder(work: str | Path, identity: Mapping[str, Any]) -> Path:
    """The folder, made where there is none, and emptied of another run's state.

    Args:
      identity: what decides the run's result, as JSON.

    Raises ValueError for a folder that holds something else, or cannot be written.
    """
    folder = Path(work)
    mark = folder / MARK
    if mark.is_file():
        with contextlib.suppress(ValueError):  # a damaged mark is another run's
            if storage.read_json(mark) == json.loads(json.dumps(identity)):
                return folder
        log.warning("%s belongs to another run; starting afresh", folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is not empty, and not a work folder of an earlier run; name another")
    for old in (mark, *folder.glob("step-*"), folder / "heal"):  # nothing else: a caller's own files stay
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(identity), "utf-8")
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return folder


def leave_unused(folder: Path) -> None:
    """Removes a work folder in which nothing was finished yet."""
    if [p.name for p in folder.iterdir()] == [MARK]:
        shutil.rmtree(folder)

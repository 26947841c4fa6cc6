"""The modelling file in saved folders: only this version's own is ever run."""

from __future__ import annotations

from pathlib import Path

NAME = "modeling_flaxcompress.py"


def own_code() -> Path:
    """This version's modelling file."""
    return Path(__file__).with_name(NAME)


def check_code(folder: Path) -> None:
    """Raises ValueError unless the folder's modelling file is this version's own."""
    if not (folder / NAME).is_file() or (folder / NAME).read_bytes() != own_code().read_bytes():
        raise ValueError(
            f"{folder / NAME}: missing, or not this version's file, and no other code is run from a folder; "
            "save the model again with this version"
        )

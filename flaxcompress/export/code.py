"""The PyTorch code in saved folders: only this version's own is ever run."""

from __future__ import annotations

from pathlib import Path

NAME = "modeling_flaxcompress.py"


def own_code() -> dict[str, bytes]:
    """This version's files, {name: content}."""
    here = Path(__file__).parent
    return {path.name: path.read_bytes() for path in [here / NAME, *sorted(here.glob("flaxcompress_*.py"))]}


def check_code(folder: Path) -> None:
    """Raises ValueError unless the folder's files are this version's own."""
    for name, content in own_code().items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != content:
            raise ValueError(
                f"{folder / name}: missing, or not this version's file, and no other code is run from a folder; "
                "save the model again with this version"
            )

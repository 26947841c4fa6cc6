"""The files that verbs read and write; a written one replaces the old one whole, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any


def absolute(path: Path) -> Path:
    """An absolute path, so that `--out .` and `--out x/..` have a name and a parent."""
    return Path(os.path.abspath(path))


def check_file(path: Path | None) -> None:
    """Raises ValueError when a file cannot be written there, before hours of work and not after."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: {path.parent} is no folder; create it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"{path}: {path.parent} cannot be written to; choose another place")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A temporary sibling that replaces `path` when the block ends well, and vanishes when it does not."""
    check_file(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def write_json(path: Path | None, data: Mapping[str, Any]) -> None:
    """Writes a JSON file, where one is asked for."""
    if path is not None:
        with new_file(path) as file:
            file.write((json.dumps(data, indent=2) + "\n").encode())


def write_vectors(path: Path, parts: Iterator[Any], name: str) -> tuple[int, int]:
    """Writes arrays [n, D] one after the other as one .npy file [N, D], in bounded memory; returns (N, D).

    Raises ValueError when there are none, or the file cannot be written.
    """
    import numpy as np

    rows, width, header = 0, 0, 0
    with new_file(path) as file:
        for part in parts:
            if not rows:
                width = part.shape[1]
                _npy_header(file, 0, width)
                header = file.tell()
            file.write(np.ascontiguousarray(part, np.float32).data)
            rows += len(part)
        if not rows:
            raise ValueError(f"{name}: holds no sentences")
        file.seek(0)
        _npy_header(file, rows, width)  # as long as before: numpy leaves room for the first axis to grow
        assert file.tell() == header
    return rows, width


def _npy_header(file: IO[bytes], rows: int, width: int) -> None:
    import numpy as np

    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})


def sentences(file: str | None) -> tuple[str, Iterator[str]]:
    """What they are called, and the sentences of a file (of stdin for None and "-"), blank lines left out."""
    from flaxcompress.data.readers import decode_lines, read_texts

    if file not in (None, "-"):
        from flaxcompress.data.calibration import source_name

        return source_name([file]), read_texts(file)
    if sys.stdin.isatty():
        print("Type sentences, one on a line; Ctrl-D ends them.", file=sys.stderr)
    name = "standard input"
    return name, (line for _, line in decode_lines(sys.stdin.buffer, name) if line.strip())

"""Tensors on disk: safetensors checked before use, and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS = "model.safetensors"
_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_STRETCH = 1 << 24  # bytes copied at a time
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin")


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises ValueError naming the file when it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, or the shards that its index names.

    Raises FileNotFoundError when there are none (with a conversion hint beside pickles), ValueError when the index is
    damaged or names a file outside the folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        data = read_json(index)
        shards = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{index}: has no weight_map")
        files = []
        for name in sorted({str(s) for s in shards.values()}):
            if Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"{index}: names {name!r}, which lies outside the folder; refused")
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{index}: names {name!r}, which does not exist")
            files.append(folder / name)
        return files
    for name in _PICKLES:
        if (folder / name).exists():
            raise ValueError(
                f"{folder / name}: pickled weights are never read, since unpickling runs code; convert once with "
                "transformers: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)"
            )
    raise FileNotFoundError(f"{folder}: no {WEIGHTS} (or its index) in this folder")


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of one or several safetensors files by name, each read when asked for."""

    def __init__(self, files: list[Path]):
        self._checksums: dict[str, int] = {}
        self._path: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            _check_size(path)
            with _opened(path) as handle:
                metadata = handle.metadata() or {}
                try:
                    self._checksums |= json.loads(metadata.get("flaxcompress.crc32", "{}"))
                except (json.JSONDecodeError, TypeError):
                    raise ValueError(f"{path}: the checksums in its header are damaged, so the file is") from None
                for name in handle.keys():  # noqa: SIM118  (not a dict)
                    self._path[name] = path
                    self._shapes[name] = tuple(handle.get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._path)

    def __len__(self) -> int:
        return len(self._path)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._shapes[name]

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one tensor. Raises ValueError when it is damaged or holds values that are not finite."""
        with _opened(self._path[name]) as handle:
            array = handle.get_tensor(name)
        if name in self._checksums and checksum(array) != self._checksums[name]:
            raise ValueError(f"{self._path[name]}: tensor {name!r} does not match its checksum: the file is damaged")
        return self._finite(name, array)

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Reads some rows of a tensor [V, …], in the order of `ids`; the rest is neither read nor checked."""
        different, places = np.unique(ids, return_inverse=True)
        with _opened(self._path[name]) as handle:
            part = handle.get_slice(name)
            found = np.concatenate([part[int(i) : int(i) + 1] for i in different])
        return self._finite(name, found)[places]

    def _finite(self, name: str, array: np.ndarray) -> np.ndarray:
        if array.dtype.kind not in "iub" and not np.isfinite(array.astype(np.float32, copy=False)).all():
            bad = int((~np.isfinite(array.astype(np.float32))).sum())
            raise ValueError(f"{self._path[name]}: tensor {name!r} holds {bad} values that are not finite")
        return array


def _opened(path: Path) -> Any:
    """An open safetensors file. It is closed after every read: pages of an open one count as the process's memory."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from None


def _check_size(path: Path) -> None:
    """A truncated file is said to be truncated; the library's own message is about an invalid header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) == 8:
            length = struct.unpack("<Q", start)[0]
            if length + 8 > size:
                raise ValueError(
                    f"{path}: truncated or not a safetensors file ({size} bytes, header needs {length + 8})"
                )


def checksum(array: np.ndarray) -> int:
    """crc32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)


def _metadata(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    sums = json.dumps({name: checksum(array) for name, array in arrays.items()})
    return {"format": "pt", "flaxcompress.crc32": sums}


def file_size(tensors: Mapping[str, np.ndarray]) -> int:
    """The size in bytes of the file that `write_tensors` would write."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return len(save(arrays, metadata=_metadata(arrays)))


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file that PyTorch reads, with a checksum of every tensor in its metadata."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    try:
        save_file(arrays, path, metadata=_metadata(arrays))
    except SafetensorError as error:  # what the writer makes of a failed write, such as a full disk
        raise OSError(str(error)) from None


def join_tensors(path: Path, files: Sequence[Path]) -> None:
    """Writes the tensors of several files that `write_tensors` wrote into one, a stretch at a time.

    Raises ValueError where two of them hold a tensor of one name.
    """
    places: list[tuple[str, dict[str, Any], Path, int]] = []
    sums: dict[str, int] = {}
    for file in files:
        with file.open("rb") as source:
            size = struct.unpack("<Q", source.read(8))[0]
            header = json.loads(source.read(size))
        sums |= json.loads(header.pop("__metadata__", {}).get("flaxcompress.crc32", "{}"))
        places += [(name, entry, file, 8 + size + entry["data_offsets"][0]) for name, entry in header.items()]
    places.sort(key=lambda place: (-_WIDTHS.get(place[1]["dtype"], 1), place[0]))  # each aligned to its own width
    joined: dict[str, Any] = {"__metadata__": {"format": "pt", "flaxcompress.crc32": json.dumps(sums)}}
    end = 0
    for name, entry, file, _ in places:
        if name in joined:
            raise ValueError(f"{file}: tensor {name!r} is in another of the files as well")
        start, end = end, end + entry["data_offsets"][1] - entry["data_offsets"][0]
        joined[name] = {**entry, "data_offsets": [start, end]}
    text = json.dumps(joined).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as target:
        target.write(struct.pack("<Q", len(text)) + text)
        for name, _, file, at in places:
            start, end = joined[name]["data_offsets"]
            with file.open("rb") as source:
                source.seek(at)
                for left in range(end - start, 0, -_STRETCH):
                    target.write(source.read(min(left, _STRETCH)))


def file_checksum(path: Path) -> int:
    """crc32 of a file's bytes, read a stretch at a time."""
    found = 0
    with path.open("rb") as file:
        while part := file.read(_STRETCH):
            found = zlib.crc32(part, found)
    return found


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raises ValueError when `path` must not be written: it exists and is not empty, or cannot be created."""
    path = Path(path)
    if path.exists():
        if not path.is_dir():
            raise ValueError(f"{path}: exists and is not a folder; choose another output")
        if any(path.iterdir()) and not overwrite:
            raise ValueError(f"{path}: exists and is not empty; choose another output or add --overwrite")
    parent = next(p for p in [path.absolute().parent, *path.absolute().parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{path}: {parent} cannot be written to; choose another output")


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling of `path` that replaces it when the block ends well, and vanishes when it does not.

    Raises ValueError as `check_output` does, and for a failed write (a full disk) with the system's reason.
    """
    path = Path(path)
    check_output(path, overwrite=overwrite)
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.absolute().parent))
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None
    try:
        yield work
        _finish(work)
        _replace(work, path, overwrite)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` that replaces it when the block ends well, and vanishes when it does not."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _finish(folder: Path) -> None:
    """Gives everything the permissions that new files have here (temporary ones are private) and waits for the disk."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [folder, *folder.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())


def _replace(work: Path, path: Path, overwrite: bool) -> None:
    check_output(path, overwrite=overwrite)
    if not path.exists():
        work.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.absolute().parent))
    old.rmdir()
    path.rename(old)
    try:
        work.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Writes small files, creating sub-folders."""
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            target.write_text(content, "utf-8")


Reader = Callable[[str], np.ndarray]

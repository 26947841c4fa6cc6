"""Statistics in a folder, so that a later run on the same model and the same text need not gather them again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxcompress import storage
from flaxcompress.folder import tensors_of
from flaxcompress.model import Model

log = logging.getLogger("flaxcompress")

_ALONE = "value"  # the name of a statistic that is one array


class KeptStatistics:
    """Statistics by name, model and text, each a safetensors file.

    Args:
      folder: is made when the first one is written.
      rows: the tokens of the text, which decide the statistics beside the model.
    """

    def __init__(self, folder: Path, rows: Sequence[Sequence[int]]):
        self._folder = folder
        digest = hashlib.sha256()
        for row in rows:
            digest.update(np.asarray([len(row), *row], np.int32).tobytes())
        self._text = digest.hexdigest()

    def get(self, name: str, model: Model, measure: Callable[[], Any]) -> Any:
        """The statistic from its file; measured, and written, where there is none.

        An array, or arrays by name; those that were one array come back as one. A damaged file is measured again.
        """
        path = self._folder / f"{name.replace(' ', '-')}-{self._digest(model)}.safetensors"
        if path.is_file():
            try:
                return _read(path)
            except (ValueError, KeyError) as error:
                log.warning("%s: damaged (%s); measuring again", path, error)
        found = measure()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write(path, found)
        except OSError as error:
            log.warning("%s: statistics could not be kept there (%s)", self._folder, error.strerror or error)
        return found

    def _digest(self, model: Model) -> str:
        return hashlib.sha256(f"{self._text} {model_digest(model)}".encode()).hexdigest()[:16]


def model_digest(model: Model) -> str:
    """sha256 of all stored tensors' checksums and of the structure."""
    digest = hashlib.sha256(json.dumps(model.config.to_json(), sort_keys=True).encode())
    for name, array in tensors_of(model).items():
        digest.update(name.encode() + storage.checksum(array).to_bytes(4, "little"))
    return digest.hexdigest()


def _write(path: Path, found: Any) -> None:
    arrays = {_ALONE: found} if isinstance(found, np.ndarray) else found
    names: dict[int, str] = {}
    same = {name: names.setdefault(id(array), name) for name, array in arrays.items()}
    stored = {name: np.asarray(arrays[name]) for name in dict.fromkeys(same.values())}
    stored["same"] = np.frombuffer(json.dumps(same).encode(), np.uint8)
    with storage.new_file(path) as part:
        storage.write_tensors(part, stored)


def _read(path: Path) -> Any:
    tensors = storage.Tensors([path])
    same = json.loads(tensors["same"].tobytes())
    held = {name: np.array(tensors[name]) for name in set(same.values())}
    found = {name: held[first] for name, first in same.items()}
    return found[_ALONE] if list(found) == [_ALONE] else found

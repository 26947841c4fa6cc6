"""A step's result on disk, one folder for each finished layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flaxcompress import storage, tree
from flaxcompress.config import ModelConfig
from flaxcompress.formats import to_tensors
from flaxcompress.model import abstract_flat
from flaxcompress.weights import OwnWeights

_ENTRY = "entry.json"


class LayerStore:
    """The groups (`tree.by_layer`) of a model of this structure, in a folder; each is written whole or not at all.

    Args:
      folder: may hold what an earlier run wrote.
      config: the structure after the step.
    """

    def __init__(self, folder: Path, config: ModelConfig):
        self.folder, self.config = folder, config
        self._abstract = abstract_flat(config)
        self.groups = tree.by_layer(self._abstract)

    def entries(self) -> dict[str, Any]:
        """{group: what was noted of it} of all that are finished."""
        found = {group: self._place(group) / _ENTRY for group in self.groups}
        return {group: storage.read_json(path) for group, path in found.items() if path.is_file()}

    @property
    def files(self) -> list[Path]:
        """The finished groups' safetensors files."""
        return [self._place(group) / storage.WEIGHTS for group in self.entries()]

    def weights(self) -> OwnWeights:
        """{address: matrix} of the groups that are finished now."""
        held = [address for group in self.entries() for address in self.groups[group]]
        return OwnWeights(self.folder, storage.Tensors(self.files), self._abstract, addresses=held)

    def write(self, group: str, matrices: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
        """Writes a group's matrices, all of them.

        Raises ValueError for a matrix that is not what the structure says.
        """
        tensors: dict[str, np.ndarray] = {}
        for address in self.groups[group]:
            node, wanted = matrices[address], self._abstract[address]
            if tree.signature(tree.abstract(node)) != tree.signature(wanted):
                raise ValueError(f"{address}: is {tree.abstract(node)}, where the plan says {wanted}")
            tensors |= {name: np.asarray(leaf) for name, leaf in to_tensors(node, address).items()}
        with storage.new_folder(self._place(group), overwrite=True) as part:
            storage.write_tensors(part / storage.WEIGHTS, tensors)
            (part / _ENTRY).write_text(json.dumps(entry), "utf-8")

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _place(self, group: str) -> Path:
        return self.folder / group.replace("/", "-")

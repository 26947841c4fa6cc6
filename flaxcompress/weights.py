"""A folder's weights by address, each read from its safetensors files when it is asked for, and not kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Integer

from flaxcompress import storage
from flaxcompress.config import ModelConfig
from flaxcompress.encoding import lookup
from flaxcompress.families import FAMILIES
from flaxcompress.families.base import Stored
from flaxcompress.formats import from_tensors, to_tensors
from flaxcompress.model import abstract_flat

log = logging.getLogger("flaxcompress")


class FamilyWeights(Mapping[str, Any]):
    """{address: float32 matrix} of a Hugging Face folder.

    Args:
      places: {address: the tensor's name in the files, and how it lies there}.
    """

    def __init__(self, folder: Path, tensors: storage.Tensors, places: Mapping[str, tuple[str, Stored]]):
        self._folder, self._tensors, self._places = folder, tensors, places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, address: object) -> bool:
        return address in self._places

    def __getitem__(self, address: str) -> np.ndarray:
        name, where = self._places[address]
        return self._read(name, where, self._tensors[name])

    def rows(self, address: str, ids: Integer[np.ndarray, " n"]) -> Float[np.ndarray, "n D"]:
        """Rows of a table, without reading the others."""
        name, where = self._places[address]
        if where.transposed or where.part is not None or where.folded is not None:
            return self[address][ids]
        return self._read(name, where, self._tensors.rows(name, ids))

    def _read(self, name: str, where: Stored, array: np.ndarray) -> np.ndarray:
        if array.dtype.kind in "iub":
            raise ValueError(f"{self._folder}: {name} holds {array.dtype}, not floating-point weights")
        return np.asarray(where.read(array), np.float32)


class OwnWeights(Mapping[str, Any]):
    """{address: matrix in its format} of a folder of ours, or of files that hold some of its tensors.

    Args:
      abstract: {address: abstract matrix} of the structure (`abstract_flat`).
      addresses: those that the files hold; None: all.
    """

    def __init__(
        self,
        folder: Path,
        tensors: storage.Tensors,
        abstract: Mapping[str, Any],
        *,
        addresses: Iterable[str] | None = None,
    ):
        self._folder, self._tensors = folder, tensors
        self._abstract = {a: abstract[a] for a in (abstract if addresses is None else addresses)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._abstract)

    def __len__(self) -> int:
        return len(self._abstract)

    def __contains__(self, address: object) -> bool:
        return address in self._abstract

    def __getitem__(self, address: str) -> Any:
        node = self._abstract[address]
        wanted = to_tensors(node, address)
        return from_tensors(node, address, lambda name: self._read(name, wanted[name]))

    def rows(self, address: str, ids: Integer[np.ndarray, " n"]) -> Float[Array, "n D"]:
        """Rows of a table in any format; of a dense one without reading the others."""
        node = self._abstract[address]
        if isinstance(node, jax.ShapeDtypeStruct):
            return self._tensors.rows(address, ids).astype(np.float32)  # pyright: ignore[reportReturnType]
        return lookup(self[address], ids)

    def _read(self, name: str, leaf: Any) -> np.ndarray:
        array = self._tensors[name]
        if array.shape != tuple(leaf.shape):
            raise ValueError(
                f"{self._folder}: {name} has shape {list(array.shape)}, config.json implies {list(leaf.shape)}"
            )
        if (array.dtype.kind in "iub" and array.dtype != leaf.dtype) or (array.dtype.kind in "iub") != (
            np.dtype(leaf.dtype).kind in "iub"
        ):
            raise ValueError(f"{self._folder}: {name} has dtype {array.dtype}, config.json implies {leaf.dtype}")
        return array.astype(leaf.dtype)


def table_rows(weights: Mapping[str, Any], address: str, ids: Integer[np.ndarray, " n"]) -> Any:
    """Rows [n, D] of a table, float32; where the weights lie in files, only those rows are read."""
    if isinstance(weights, (FamilyWeights, OwnWeights)):
        return weights.rows(address, ids)
    return lookup(weights[address], ids)


def family_weights(folder: Path, config: ModelConfig, tensors: storage.Tensors) -> tuple[ModelConfig, FamilyWeights]:
    """The weights of a Hugging Face folder, and the config with what only the tensors tell.

    Raises ValueError for missing and unexpected tensors, and for shapes that contradict the config.
    """
    family = FAMILIES[config.family]
    stored: dict[str, str] = {}
    for name in tensors:
        canonical = family.canonical(name)
        if canonical in stored:
            raise ValueError(f"{folder}: tensors {stored[canonical]!r} and {name!r} are the same weight")
        stored[canonical] = name
    if config.pooler and not any(n.startswith("pooler.") for n in stored):
        config = config.replace(pooler=False)
    if family.own_head is not None and config.head.endswith("_lm"):
        own, table = stored.get(family.own_head), stored[family.names(config)["embedding/token"].name]
        config = config.replace(tied=own is None or np.array_equal(tensors[own], tensors[table]))
    wanted = family.names(config)
    needed = {where.name for where in wanted.values()}
    missing = [name for name in dict.fromkeys(where.name for where in wanted.values()) if name not in stored]
    if missing:
        raise ValueError(f"{folder}: {_count(missing)} missing: {some(missing)}; is the file complete?")
    rest = [n for n in stored if n not in needed and not any(re.fullmatch(p, n) for p in family.ignored)]
    heads = [n for n in rest if n.startswith(family.head_prefixes)]
    if extra := sorted(set(rest) - set(heads)):
        raise ValueError(f"{folder}: {len(extra)} tensors that a {config.family} model does not have: {some(extra)}")
    if heads:
        log.warning(
            "%s: left out %d tensors of heads that were not asked for: %s", folder.name, len(heads), some(heads)
        )
    shapes = abstract_flat(config)
    for address, where in wanted.items():
        shape, implied = tensors.shape(stored[where.name]), where.shape(shapes[address].shape)
        if shape != implied:
            raise ValueError(f"{folder}: {where.name} has shape {list(shape)}, config.json implies {list(implied)}")
    return config, FamilyWeights(folder, tensors, {a: (stored[where.name], where) for a, where in wanted.items()})


def own_weights(folder: Path, config: ModelConfig, tensors: storage.Tensors, *, other_head: bool = False) -> OwnWeights:
    """The weights of a folder of ours; `other_head`: the head's tensors are left out.

    Raises ValueError for missing and unexpected tensors.
    """
    abstract = abstract_flat(config)
    wanted = dict.fromkeys(n for address, node in abstract.items() for n in to_tensors(node, address))
    missing = [n for n in wanted if n not in tensors]
    extra = [n for n in tensors if n not in wanted and not (other_head and n.startswith("head/"))]
    if missing or extra:
        what = [f"missing {some(missing)}"] if missing else []
        what += [f"unexpected {some(extra)}"] if extra else []
        raise ValueError(f"{folder}: tensors contradict config.json: {'; '.join(what)}")
    return OwnWeights(folder, tensors, abstract)


def _count(names: Sequence[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def some(names: Sequence[str], count: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more

"""What training changes: integer and sparse formats become trainable ones for the time being, and back.

{"embedding/token": LowRank(left=Banded(uint8 …), …)}  ⇄  {"embedding/token": LowRank(left=FakeQuantized(float32 …), …)}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress import tree
from flaxcompress.formats import (
    Adapted,
    Format,
    MaskedRows,
    RowFormat,
    TrainingForm,
    map_parts,
    thaw,
    to_tensors,
    unpacked,
)
from flaxcompress.model import Model


def thaw_model(model: Model, original: Model | None = None, pattern: str = ".*") -> Any:
    """Trainable parameters that compute what `model` does; float storage becomes float32.

    Args:
      original: where it has the same dense matrix, the unrounded weights stay as latents inside their level's interval.
      pattern: what will be trained, as `partition` takes it: other matrices stay in their format, rounded ones too.

    Raises ValueError for a pattern that matches nothing.
    """
    dense = {} if original is None else tree.View(original.params)
    flat, out = tree.flatten(model.params), {}
    tree.select(_names(flat), pattern, where="trainable")
    for address, node in flat.items():
        source = dense.get(address)
        if isinstance(source, Format) or (source is not None and tuple(source.shape) != tuple(node.shape)):
            source = None
        out[address] = thaw_matching(node, address, pattern, None if source is None else np.asarray(source, np.float32))
    return tree.unflatten(out)


def thaw_matching(node: Any, address: str, pattern: str, source: np.ndarray | None = None) -> Any:
    """One matrix of `thaw_model`: as it is where the pattern matches none of it."""
    if not _trains(node, address, pattern):
        return node
    if isinstance(node, Adapted) and not re.fullmatch(pattern, address):  # the base may be large, and stay
        parts = {"base": node.base, "delta": node.delta}
        thawed = (thaw_matrix(n) if _trains(n, f"{address}.{name}", pattern) else n for name, n in parts.items())
        return node.with_parts(list(thawed))
    return thaw_matrix(node, source)


def _names(flat: Mapping[str, Any]) -> list[str]:
    """Addresses, and the names of their tensors."""
    return list(dict.fromkeys(name for a, node in flat.items() for name in (a, *to_tensors(node, a))))


def _trains(node: Any, address: str, pattern: str) -> bool:
    """Whether the pattern matches the address, or the name of one of the matrix's tensors."""
    return any(re.fullmatch(pattern, name) for name in (address, *to_tensors(node, address)))


def thaw_matrix(node: Any, source: np.ndarray | None = None) -> Any:
    """One matrix of `thaw_model`; `source` are its unrounded values."""
    if isinstance(node, MaskedRows) and not isinstance(node.values, Format):
        return unpacked(node)
    if isinstance(node, RowFormat) and not node.parts():
        return thaw(node, source.T if source is not None and node.transposed else source)
    if isinstance(node, Format) and node.parts():
        parts = node.parts()
        targets = [None] * len(parts) if source is None else node.part_targets(source)
        return node.with_parts([thaw_matrix(part.node, dense) for part, dense in zip(parts, targets, strict=True)])
    floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if floating(leaf) else leaf, node)


def _freeze(node: Any, table: bool) -> Any:
    del table
    return node.freeze() if isinstance(node, TrainingForm) else node


def freeze_model(params: Any, model: Model) -> Model:
    """The model with trained parameters in the formats and storage dtypes that it has."""
    flat, stored = {}, tree.View(tree.abstract(model.params))
    for address, node in tree.flatten(params).items():
        frozen = map_parts(node, _freeze, table=False)
        flat[address] = jax.tree.map(lambda new, old: new.astype(old.dtype), frozen, stored[address])
    return model.replace(params=tree.unflatten(flat))  # pyright: ignore[reportAttributeAccessIssue]


def partition(params: Any, pattern: str = ".*") -> tuple[Any, Any]:
    """(trainable, frozen): the float leaves that match, and all others; None where the other tree has one.

    Args:
      pattern: matches the address of a matrix in full, or the names of some of its tensors: `.*\\.delta\\..*` is what
        is added to matrices, not these themselves. Rounded and sparse matrices are trained in another form than they
        are stored in: match their addresses, or what they are part of.

    Raises ValueError for a pattern that matches nothing, or some of the layers that are stacked but not all of them.
    """
    chosen = _matching(params, pattern)
    trains = jax.tree.map(lambda leaf, on: on and jnp.issubdtype(leaf.dtype, jnp.floating), params, chosen)
    trainable = jax.tree.map(lambda leaf, on: leaf if on else None, params, trains)
    frozen = jax.tree.map(lambda leaf, on: None if on else leaf, params, trains)
    return trainable, frozen


def _matching(params: Any, pattern: str) -> Any:
    """Whether each leaf's name, or its matrix's address, matches."""
    view = tree.View(params)
    names = {address: list(to_tensors(view[address], address)) for address in view}
    chosen = set(tree.select(_names(view), pattern, where="trainable"))
    found: dict[int, set[tuple[bool, ...]]] = {}
    for address in view:
        answers = tuple(address in chosen or name in chosen for name in names[address])
        found.setdefault(id(view.stacked(address)), set()).add(answers)
    if any(len(answers) > 1 for answers in found.values()):
        raise ValueError(
            f"trainable: {pattern!r} matches some weight sets of a stack of layers, but not all; layers that are "
            r"stacked train together: write layers/\d+/…"
        )
    is_matrix = lambda node: id(node) in found  # noqa: E731

    def answer(node: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(node), next(iter(found[id(node)])))

    return jax.tree.map(answer, params, is_leaf=is_matrix)


def combine(trainable: Any, frozen: Any) -> Any:
    """The inverse of `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None)

"""What training changes: integer and sparse formats become trainable ones for the time being, and back.

{"embedding/token": LowRank(left=Banded(uint8 …), …)}  ⇄  {"embedding/token": LowRank(left=FakeQuantized(float32 …), …)}
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress import tree
from flaxcompress.formats import Format, MaskedRows, RowFormat, TrainingForm, map_parts, thaw, unpacked
from flaxcompress.model import Model


def thaw_model(model: Model, original: Model | None = None) -> Any:
    """Trainable parameters that compute what `model` does; float storage becomes float32.

    Args:
      original: where it has the same dense matrix, the unrounded weights stay as latents inside their level's interval.
    """
    dense = {} if original is None else tree.View(original.params)
    out = {}
    for address, node in tree.flatten(model.params).items():
        source = dense.get(address)
        if isinstance(source, Format) or (source is not None and tuple(source.shape) != tuple(node.shape)):
            source = None
        out[address] = thaw_matrix(node, None if source is None else np.asarray(source, np.float32))
    return tree.unflatten(out)


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
    """(trainable, frozen): the float leaves whose addresses match, and all others; None where the other tree has one.

    Raises ValueError for a pattern that matches nothing, or some of the layers that are stacked but not all of them.
    """
    chosen = _matching(params, pattern)
    trains = jax.tree.map(lambda leaf, on: on and jnp.issubdtype(leaf.dtype, jnp.floating), params, chosen)
    trainable = jax.tree.map(lambda leaf, on: leaf if on else None, params, trains)
    frozen = jax.tree.map(lambda leaf, on: None if on else leaf, params, trains)
    return trainable, frozen


def _matching(params: Any, pattern: str) -> Any:
    """Whether the address of each leaf's matrix matches."""
    view = tree.View(params)
    chosen = set(tree.select(view, pattern, where="trainable"))
    found: dict[int, set[bool]] = {}
    for address in view:
        found.setdefault(id(view.stacked(address)), set()).add(address in chosen)
    if any(len(answers) > 1 for answers in found.values()):
        raise ValueError(
            f"trainable: {pattern!r} matches some weight sets of a stack of layers, but not all; layers that are "
            r"stacked train together: write layers/\d+/…"
        )
    is_matrix = lambda node: id(node) in found  # noqa: E731
    answer = lambda node: jax.tree.map(lambda _: next(iter(found[id(node)])), node)  # noqa: E731
    return jax.tree.map(answer, params, is_leaf=is_matrix)


def combine(trainable: Any, frozen: Any) -> Any:
    """The inverse of `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None)

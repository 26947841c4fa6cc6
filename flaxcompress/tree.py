"""Parameter addresses: the unstacked names of weights, and the stacked tree that layers are scanned over.

In memory the weight sets of a part are stacked, so that one scan runs over them:

    {"embedding": {"token": …}, "layers": {"attention": {"000": {"query": {"kernel": [3, D, D], …}}}, …}}

Rules, patterns, reports and files use flat, unstacked addresses instead, the number being the weight set:

    {"embedding/token": …, "layers/0/attention/query/kernel": [D, D], "layers/1/attention/query/kernel": …}

Sets whose matrices differ in format or shape cannot share one array: the stack is then split into runs of equal
neighbours, named by their first set ("000", "002"). `flatten` and `unflatten` are each other's inverse.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress.config import closest

Flat = dict[str, Any]


def run_name(first_set: int) -> str:
    """The key of the run that begins with weight set `first_set`."""
    return f"{first_set:03d}"


def run_length(run: Any) -> int:
    """The number of weight sets stacked in `run`."""
    return jax.tree.leaves(run)[0].shape[0]


def walk(tree: Any, prefix: str) -> Iterable[tuple[str, Any]]:
    """(address, matrix) of every matrix of a nested, unstacked dict, the addresses beginning with `prefix`."""
    if isinstance(tree, Mapping):
        for name, child in tree.items():
            yield from walk(child, f"{prefix}/{name}" if prefix else name)
    else:
        yield prefix, tree


def flatten(params: Mapping[str, Any]) -> Flat:
    """Stacked tree -> {address: matrix}; a matrix is an array or a format node."""
    flat: Flat = {}
    for name, child in params.items():
        if name != "layers":
            flat.update(walk(child, name))
            continue
        for part, runs in child.items():
            for first, run in runs.items():
                for i in range(run_length(run)):
                    one = jax.tree.map(lambda leaf, i=i: _index(leaf, i), run)
                    flat.update(walk(one, f"layers/{int(first) + i}/{part}"))
    return flat


def _index(leaf: Any, i: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[i]


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{address: matrix} -> nested dicts, without stacking."""
    tree: dict[str, Any] = {}
    for address, node in flat.items():
        *path, last = address.split("/")
        here = tree
        for name in path:
            here = here.setdefault(name, {})
        here[last] = node
    return tree


def signature(tree: Any) -> Any:
    """What must agree for two trees to be stacked: structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in leaves)


def stack(trees: list[Any]) -> Any:
    """Stacks equal trees along a new leading axis; works on abstract leaves too."""
    if isinstance(jax.tree.leaves(trees[0])[0], jax.ShapeDtypeStruct):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(trees), *leaf.shape), leaf.dtype), trees[0])
    host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(trees))
    return jax.tree.map(lambda *leaves: np.stack(leaves) if host else jnp.stack(leaves), *trees)


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{address: matrix} -> stacked tree. Neighbouring weight sets of equal signature form one run."""
    tree = nest(flat)
    if "layers" not in tree:
        return tree
    by_part: dict[str, dict[int, Any]] = {}
    for number, parts in tree.pop("layers").items():
        for part, node in parts.items():
            by_part.setdefault(part, {})[int(number)] = node
    layers: dict[str, Any] = {}
    for part, sets in by_part.items():
        if sorted(sets) != list(range(len(sets))):
            raise ValueError(f"layers/*/{part}: weight sets {sorted(sets)} are not 0 … {len(sets) - 1}")
        groups: list[list[int]] = []
        for number in sorted(sets):
            if groups and signature(sets[groups[-1][-1]]) == signature(sets[number]):
                groups[-1].append(number)
            else:
                groups.append([number])
        layers[part] = {run_name(g[0]): stack([sets[n] for n in g]) for g in groups}
    return {**tree, "layers": layers}


def select(addresses: Iterable[str], pattern: str, *, where: str = "pattern") -> list[str]:
    """The addresses that `pattern` matches in full.

    Raises ValueError, with the closest address, when the pattern is no regular expression or matches nothing.
    """
    addresses = list(addresses)
    try:
        found = [a for a in addresses if re.fullmatch(pattern, a)]
    except re.error as error:
        raise ValueError(f"{where}: {pattern!r} is not a regular expression: {error}") from None
    if not found:
        shapes = sorted({re.sub(r"/\d+/", r"/0/", a) for a in addresses})
        raise ValueError(f"{where}: {pattern!r} matches no parameter; {closest(pattern, shapes)}")
    return found


def update(params: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Replaces every matrix by `change(address, matrix)`."""
    return unflatten({address: change(address, node) for address, node in flatten(params).items()})

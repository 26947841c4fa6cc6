"""Parameter addresses: the unstacked names of weights, and the stacked tree that layers are scanned over.

In memory the weight sets of a part are stacked, so that one scan runs over them:

    {"embedding": {"token": …}, "layers": {"attention": {"000": {"query": {"kernel": [3, D, D], …}}}, …}}

Rules, patterns, reports and files use flat, unstacked addresses instead, the number being the weight set:

    {"embedding/token": …, "layers/0/attention/query/kernel": [D, D], "layers/1/attention/query/kernel": …}

Sets whose matrices differ in format or shape cannot share one array: the stack is then split into runs of equal
neighbours, named by their first set ("000", "002"). `flatten` and `unflatten` are each other's inverse. A model with a
decoder has a second stack, "decoder/layers/0/…".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress.config import closest

Flat = dict[str, Any]


_LAYER = re.compile(r"((?:[^/]+/)*?)layers/(\d+)/([^/]+)/(.+)")


class Place(NamedTuple):
    """Where in a stack of layers a matrix stands: "decoder/layers/3/attention/query/kernel".

    Attributes:
      stack: "" or "decoder/".
      number: the weight set.
      part: "attention", …
      path: the rest of the address.
    """

    stack: str
    number: int
    part: str
    path: str

    @property
    def address(self) -> str:
        """The inverse of `place`."""
        return f"{self.stack}layers/{self.number}/{self.part}/{self.path}"


def place(address: str) -> Place | None:
    """The place of a layer's matrix; None for matrices outside of layers."""
    found = _LAYER.fullmatch(address)
    return None if found is None else Place(found[1], int(found[2]), found[3], found[4])


def by_layer(addresses: Iterable[str]) -> dict[str, list[str]]:
    """{"layers/3": its addresses}, in order; before them what stands outside of layers, each address by itself."""
    outside: dict[str, list[str]] = {}
    layers: dict[tuple[str, int], list[str]] = {}
    for address in addresses:
        if (at := place(address)) is None:
            outside[address] = [address]
        else:
            layers.setdefault((at.stack, at.number), []).append(address)
    return outside | {f"{stack}layers/{number}": layers[stack, number] for stack, number in sorted(layers)}


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


class View(Mapping[str, Any]):
    """{address: matrix} of a stacked tree, each sliced out when it is asked for: no second copy of the weights."""

    def __init__(self, params: Mapping[str, Any]):
        self._places: dict[str, tuple[Any, int | None]] = {}
        self._add(params, "")

    def _add(self, params: Mapping[str, Any], prefix: str) -> None:
        for name, child in params.items():
            if name == "layers":
                self._add_layers(child, prefix)
            elif isinstance(child, Mapping):
                self._add(child, f"{prefix}{name}/")
            else:
                self._places[f"{prefix}{name}"] = (child, None)

    def _add_layers(self, parts: Mapping[str, Any], prefix: str) -> None:
        for part, runs in parts.items():
            for first, run in runs.items():
                stacked = list(walk(run, ""))
                for i in range(run_length(run)):
                    at = f"{prefix}layers/{int(first) + i}/{part}"
                    self._places.update((f"{at}/{path}", (node, i)) for path, node in stacked)

    def __getitem__(self, address: str) -> Any:
        node, i = self._places[address]
        return node if i is None else jax.tree.map(lambda leaf: _index(leaf, i), node)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def stacked(self, address: str) -> Any:
        """The node in which the matrix at `address` is stacked, or the matrix itself outside of layers."""
        return self._places[address][0]


def flatten(params: Mapping[str, Any]) -> Flat:
    """Stacked tree -> {address: matrix}; a matrix is an array or a format node."""
    return dict(View(params))


def abstract(params: Any) -> Any:
    """The same tree with shapes and dtypes for leaves."""
    return jax.eval_shape(lambda params: params, params)


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
    return _assemble(flat, _runs(flat), lambda addresses: stack([flat[a] for a in addresses]))


def join_runs(runs: list[Any]) -> dict[str, Any]:
    """{run name: stacked trees} of a part; neighbours of equal signature, but for their lengths, become one run."""
    found: dict[str, Any] = {}
    first, before, name = 0, None, ""
    for run in runs:
        signed = signature(jax.tree.map(lambda leaf: _index(leaf, 0), abstract(run)))
        if signed == before:
            found[name] = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), found[name], run)
        else:
            name = run_name(first)
            found[name] = run
        first, before = first + run_length(run), signed
    return found


class _Run(NamedTuple):
    """Weight sets that are stacked together, and the paths of their matrices."""

    numbers: list[int]
    paths: list[str]


def _assemble(flat: Mapping[str, Any], runs: dict[tuple[str, str], list[_Run]], stacked: Callable[[list[str]], Any]):
    """A stacked tree: `stacked(addresses)` of every run's matrices, and what stands outside of layers from `flat`."""
    whole = {address: flat[address] for address in flat if place(address) is None}
    for (prefix, part), groups in runs.items():
        for numbers, paths in groups:
            for path in paths:
                at = f"{prefix}layers/{part}/{run_name(numbers[0])}/{path}"
                whole[at] = stacked([Place(prefix, n, part, path).address for n in numbers])
    return nest(whole)


def lay_out(params: Mapping[str, Any]) -> dict[str, Any]:
    """A stacked tree in which every weight set is a run of its own, for code that takes layers one by one."""
    out: dict[str, Any] = {}
    for name, child in params.items():
        if name == "layers":
            out[name] = {
                part: {
                    run_name(int(first) + i): jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], run)
                    for first, run in runs.items()
                    for i in range(run_length(run))
                }
                for part, runs in child.items()
            }
        else:
            out[name] = lay_out(child) if isinstance(child, Mapping) else child
    return out


def _runs(flat: Mapping[str, Any]) -> dict[tuple[str, str], list[_Run]]:
    """{(stack, part): its runs}."""
    parts: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for address, node in flat.items():
        if (at := place(address)) is not None:
            parts.setdefault((at.stack, at.part), {}).setdefault(at.number, {})[at.path] = node
    found: dict[tuple[str, str], list[_Run]] = {}
    for (prefix, part), sets in parts.items():
        if sorted(sets) != list(range(len(sets))):
            raise ValueError(f"{prefix}layers/*/{part}: weight sets {sorted(sets)} are not 0 … {len(sets) - 1}")
        groups: list[_Run] = []
        before = None
        for number in sorted(sets):
            signed = signature(sets[number])
            if groups and signed == before:
                groups[-1].numbers.append(number)
            else:
                groups.append(_Run([number], list(sets[number])))
            before = signed
        found[prefix, part] = groups
    return found


def replace(params: Mapping[str, Any], changes: Mapping[str, Any], *, drop: Iterable[str] = ()) -> dict[str, Any]:
    """Exchanges the matrices at some addresses, and leaves some out; what stays stacked as it was is not copied."""
    view, gone = View(params), set(drop)
    shapes = {**{a: n for a, n in View(abstract(params)).items() if a not in gone}, **abstract(dict(changes))}
    kept = {tuple(r.numbers) + k for k, runs in _runs(View(abstract(params))).items() for r in runs}
    node = lambda address: changes[address] if address in changes else view[address]  # noqa: E731

    def stacked(addresses: list[str]) -> Any:
        at = [place(a) for a in addresses]
        same = (*(a.number for a in at if a), at[0].stack, at[0].part) in kept  # pyright: ignore[reportOptionalMemberAccess]
        untouched = same and not any(a in changes for a in addresses)
        return view.stacked(addresses[0]) if untouched else stack([node(a) for a in addresses])

    outside = {a: node(a) for a in shapes if place(a) is None}
    return _assemble(outside, _runs(shapes), stacked)


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
    """Replaces every matrix by `change(address, matrix)`; those it returns as they were given are not copied."""
    changed = {}
    for address, node in View(params).items():
        if (new := change(address, node)) is not node:
            changed[address] = new
    return replace(params, changed)

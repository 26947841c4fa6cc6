"""Bases: left factors that low-rank kernels of several layers have in common, a part of layers like any other.

    {"attention": {"query": {"kernel": [n, R]}}}

A kernel on a basis holds its right factor alone (see `formats/basis.py`); the basis of the layer's weight set comes to
it before the layer runs, so that modules see an ordinary low-rank kernel, and one leaf gathers the gradients of all.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxcompress import tree
from flaxcompress.config import ModelConfig
from flaxcompress.formats import Basis, BasisSpec, LowRank, LowRankSpec, Spec, spec_for, spec_of
from flaxcompress.nn.initializer import kernel_initializer

BASES = "bases"


def is_on_basis(node: Any) -> bool:
    """Whether a matrix is a kernel whose left factor stands elsewhere."""
    return isinstance(node, LowRank) and isinstance(node.left, Basis)


def put_on_bases(layer: Mapping[str, Any]) -> dict[str, Any]:
    """One layer's parameters without the part of bases, which stand where its kernels leave them out."""
    bases = dict(tree.walk(layer.get(BASES, {}), ""))
    own = {path: node for part in layer if part != BASES for path, node in tree.walk(layer[part], part)}
    return tree.nest({p: n.replace(left=bases[p]) if p in bases and is_on_basis(n) else n for p, n in own.items()})


def basis_address(config: ModelConfig, address: str) -> str:
    """Where the basis of the kernel at `address` is stored."""
    at = tree.place(address)
    assert at is not None
    sharing = config.decoder.sharing if at.stack and config.decoder else config.sharing
    layer = getattr(sharing, at.part).index(at.number)
    return tree.Place(at.stack, sharing.bases[layer], BASES, f"{at.part}/{at.path}").address


class Whole(Mapping[str, Any]):
    """{address: matrix} of a model without the part of bases: kernels on a basis are put together when asked for."""

    def __init__(self, config: ModelConfig, flat: Mapping[str, Any]):
        self._config, self._flat = config, flat
        self._addresses = [a for a in flat if (at := tree.place(a)) is None or at.part != BASES]

    def __getitem__(self, address: str) -> Any:
        node = self._flat[address]
        return node.replace(left=self._flat[basis_address(self._config, address)]) if is_on_basis(node) else node

    def __iter__(self) -> Iterator[str]:
        return iter(self._addresses)

    def __len__(self) -> int:
        return len(self._addresses)


def merge_bases(config: ModelConfig, params: Mapping[str, Any]) -> tuple[ModelConfig, Mapping[str, Any]]:
    """The same model with a basis of its own in every kernel, for what knows no bases: its config and parameters."""
    stacks = [config, *([] if config.decoder is None else [config.decoder])]
    if not any(stack.sharing.bases for stack in stacks):
        return config, params
    flat = tree.View(params)
    whole = Whole(config, flat)
    kernels = {address: whole[address] for address in whole if is_on_basis(flat[address])}
    without = lambda c: c.replace(sharing=dataclasses.replace(c.sharing, bases=()))  # noqa: E731
    config = without(config)
    if config.decoder is not None:
        config = config.replace(decoder=without(config.decoder))
    for address, node in kernels.items():
        config = config.with_format(address, spec_of(node).to_json())
    return config, tree.replace(params, kernels, drop=[a for a in flat if a not in set(whole)])


def init_bases(config: ModelConfig, key: jax.Array, layers: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The runs of the part, for layers whose other parts are drawn: sets of one structure by one program."""
    view = tree.View({"layers": layers})
    sets = [_structure(config, view, number, prefix) for number in range(config.sharing.sets(BASES))]
    runs = []
    for structure, numbers in itertools.groupby(range(len(sets)), sets.__getitem__):
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(list(numbers)))
        runs.append(jax.vmap(functools.partial(_draw, config, structure))(keys))
    return tree.join_runs(runs)


class _Wanted(NamedTuple):
    """A basis [n, R] for kernels [n, m] at `path`, and its format."""

    path: str
    n: int
    rank: int
    m: int
    spec: Spec


def _structure(config: ModelConfig, view: tree.View, number: int, prefix: str) -> tuple[_Wanted, ...]:
    """What weight set `number` holds, as the kernels of the layers that use it leave room for.

    Raises ValueError for layers that leave different room, a set that no kernel stands on, and a basis on a basis.
    """
    found: dict[str, _Wanted] = {}
    for layer in [layer for layer, used in enumerate(config.sharing.bases) if used == number]:
        for address in (a for a in view if is_on_basis(view.stacked(a))):
            at, node = tree.place(address), view.stacked(address)
            if at is None or getattr(config.sharing, at.part)[layer] != at.number:
                continue
            path = f"{at.part}/{at.path}"
            basis = f"{prefix}layers/{number}/{BASES}/{path}"
            if isinstance(spec := spec_for(config, basis), LowRankSpec) and isinstance(spec.left, BasisSpec):
                raise ValueError(f"{basis}: a basis stands on none itself; let the format's pattern leave it out")
            wanted = _Wanted(path, node.left.rows, node.left.rank, node.shape[1], spec)
            if found.setdefault(path, wanted) != wanted:
                raise ValueError(
                    f"{prefix}{address}: a basis {list(node.left.shape)} for {node.shape[1]} features, but another "
                    f"layer on set {number} of bases wants {list(found[path][1:3])} for {found[path].m}"
                )
    if not found:
        raise ValueError(f"sharing/bases: no kernel of {prefix}layers stands on set {number}")
    return tuple(found[path] for path in sorted(found))


def _draw(config: ModelConfig, structure: Sequence[_Wanted], key: jax.Array) -> dict[str, Any]:
    flat = {}
    for index, (path, n, rank, m, spec) in enumerate(structure):
        draw = kernel_initializer(config, f"layers/0/{path.removesuffix('/kernel')}", n, m)
        flat[path] = spec.init(jax.random.fold_in(key, index), (n, rank), draw, table=False)
    return tree.nest(flat)

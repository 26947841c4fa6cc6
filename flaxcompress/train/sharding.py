"""Where the parts of a training step lie on a mesh: weights, optimizer state, batches.

The rules are those of `nn/logical.py`. Everything is one program for all devices; GSPMD (Xu et al. 2021) adds the
communication.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxcompress import tree
from flaxcompress.config import ModelConfig
from flaxcompress.nn.logical import BATCH, RULES, weight_specs


@contextlib.contextmanager
def within(mesh: Mesh | None) -> Iterator[None]:
    """Inside the block, programs are traced for the mesh, activations cut by the rules; nothing changes for None."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def check_widths(config: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError where the mesh's "model" axis does not divide the heads or a feed-forward width."""
    size = mesh.shape.get("model", 1)
    widths: dict[str, int] = {}
    for where, part in (("", config), ("decoder/", config.decoder)):
        if part is not None:
            inner = part.feed_forward_width
            numbers = [inner] if isinstance(inner, int) else inner
            widths |= {f"{where}heads": part.heads}
            widths |= {f"{where}feed_forward_width" + (f"/{i}" if i else ""): n for i, n in enumerate(numbers)}
    if wrong := {name: width for name, width in widths.items() if width % size}:
        common = math.gcd(*widths.values())
        would = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        given = " and ".join(f"{name} ({width})" for name, width in wrong.items())
        raise ValueError(f"mesh: model={size} does not divide {given}; sizes of the axis model that would: {would}")


def param_shardings(abstract_params: Any, config: ModelConfig, mesh: Mesh) -> Any:
    """A `NamedSharding` in place of every leaf of the parameters, which may be in a trainable form (`thaw_model`).

    Raises ValueError where the mesh cannot cut the model (see `check_widths`).
    """
    check_widths(config, mesh)
    view, found = tree.View(abstract_params), {}
    for address in view:
        node = view.stacked(address)
        if id(node) not in found:
            place = tree.place(address)
            part = config.decoder if place is not None and place.stack else config
            assert part is not None
            specs = weight_specs(part, address, node, mesh.shape)
            found[id(node)] = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.tree.map(lambda node: found[id(node)], abstract_params, is_leaf=lambda node: id(node) in found)


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` in place of every array of a batch (this process's part of it); its first axis is of examples.

    Raises ValueError where the mesh's axes do not divide the number of examples.
    """
    axes = tuple(axis for axis in BATCH if mesh.shape.get(axis, 1) > 1)
    parts = math.prod(mesh.shape[axis] for axis in axes)

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        rows = leaf.shape[0] * jax.process_count()
        if rows % parts:
            sizes = " · ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)}: {rows} examples cannot be cut evenly by the mesh's "
                f"{sizes}; use a multiple of {parts}"
            )
        return NamedSharding(mesh, PartitionSpec(axes or None))

    return jax.tree_util.tree_map_with_path(sharding, batch)


def state_shardings(optimizer: optax.GradientTransformation, abstract_trainable: Any, shardings: Any) -> Any:
    """A `NamedSharding` in place of every array of the optimizer's state: where it goes with a weight, the weight's.

    An array that lacks one of its weight's dimensions (Adafactor's factors) is cut along the others; all else is whole.

    Args:
      shardings: of the trainable parameters, or of all (see `param_shardings`).
    """
    weights = {path: (leaf.shape, sharding) for (path, leaf), sharding in _beside(abstract_trainable, shardings)}
    mesh = next(iter(weights.values()))[1].mesh

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        whole = NamedSharding(mesh, PartitionSpec())
        found = next((weights[path[i:]] for i in range(len(path) + 1) if path[i:] in weights), None)
        if found is None:
            return whole
        shape, own = found
        if leaf.shape == shape:
            return own
        spec = (*own.spec, *(None,) * (len(shape) - len(own.spec)))
        for i in range(len(shape)):
            if leaf.shape == (*shape[:i], *shape[i + 1 :]):
                return NamedSharding(mesh, PartitionSpec(*spec[:i], *spec[i + 1 :]))
        return whole

    state = jax.eval_shape(optimizer.init, abstract_trainable)
    return jax.tree_util.tree_map_with_path(sharding, state)


def _beside(trainable: Any, shardings: Any) -> Iterator[tuple[tuple[Any, Any], NamedSharding]]:
    """((path, leaf), its sharding) of every trainable leaf."""
    by_path = dict(jax.tree_util.tree_flatten_with_path(shardings)[0])
    for path, leaf in jax.tree_util.tree_flatten_with_path(trainable)[0]:
        yield (path, leaf), by_path[path]

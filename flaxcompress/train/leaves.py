"""What an optimizer must know of a parameter: whether it is a matrix, and whether several are stacked in one leaf.

Layers are stacked for the scan, and formats hold a matrix in several leaves:

    {"layers": {"attention": {"000": {"query": {"kernel": LowRank(left [3, n, R], right [3, R, m]), "bias": [3, m]}}}}}

Here are six matrices and three vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

Path = tuple[Any, ...]
_NOT_MATRICES = ("bias", "scale", "log_scale")


class Leaf(NamedTuple):
    """What a leaf of the parameters holds.

    Attributes:
      stacked: its first axis runs over the weight sets of a stack of layers.
      matrix: each set is a matrix (or a core of several axes), not a bias, a norm, or the scales of a format.
      dense_map: it is one that a layer multiplies with its input, [n, m]: no table, taps of a convolution or factors of
        a tensor.
    """

    stacked: bool
    matrix: bool
    dense_map: bool


def describe(path: Path, leaf: Any) -> Leaf:
    """What the leaf at a tree path holds."""
    names = [str(getattr(entry, "name", getattr(entry, "key", getattr(entry, "idx", "")))) for entry in path]
    stacked = "layers" in names
    axes = leaf.ndim - stacked
    matrix = axes >= 2 and names[-1] not in _NOT_MATRICES
    return Leaf(stacked, matrix, stacked and matrix and axes == 2 and not {"taps", "table", "factors"} & set(names))


def matrices(params: Any) -> Any:
    """Which leaves hold matrices: a tree of booleans."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: describe(path, leaf).matrix, params)


def each_set(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `transform` to every weight set by itself, as if layers were not stacked; its state is one per leaf."""

    def init(params: Any) -> Any:
        def one(path: Path, leaf: Any) -> Any:
            return (jax.vmap(transform.init) if describe(path, leaf).stacked else transform.init)(leaf)

        return jax.tree_util.tree_map_with_path(one, params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def one(path: Path, update: Any, state: Any, param: Any) -> tuple[Any, Any]:
            apply = jax.vmap(transform.update) if describe(path, update).stacked else transform.update
            return apply(update, state, param)

        done = jax.tree_util.tree_map_with_path(one, updates, state, params)
        tree = jax.tree.structure(updates)
        pairs = tree.flatten_up_to(done)
        return tree.unflatten([new for new, _ in pairs]), tree.unflatten([kept for _, kept in pairs])

    return optax.GradientTransformation(init, update)

"""How many layers stand above a parameter, and updates that depend on it: layer-wise rates, gradual unfreezing.

The head, and what else is behind the layers, stands at 0; the topmost layer of L at 1, the first at L; the embedding at
L + 1. Layers are weight sets here: one set that all layers share is one layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxcompress.train.leaves import Path

_BEFORE = "embedding"


def depths(params: Any) -> Any:
    """A tree like `params`: each leaf's depth, float32, of a shape that broadcasts against it."""
    highest: dict[tuple[str, ...], int] = {}
    placed = jax.tree_util.tree_flatten_with_path(params)[0]
    for path, leaf in placed:
        names = _names(path)
        if "layers" in names:
            stack, first = _stack(names)
            highest[stack] = max(highest.get(stack, 0), first + leaf.shape[0])

    def depth(path: Path, leaf: Any) -> Any:
        names = _names(path)
        if "layers" in names:
            stack, first = _stack(names)
            sets = np.arange(first, first + leaf.shape[0], dtype=np.float32)
            return jnp.asarray(highest[stack] - sets).reshape(-1, *[1] * (leaf.ndim - 1))
        if _BEFORE in names:
            stack = names[: names.index(_BEFORE)]
            return jnp.float32(highest.get(stack, max(highest.values(), default=0)) + 1)
        return jnp.float32(0)

    return jax.tree_util.tree_map_with_path(depth, params)


def scale_by_depth(decay: float) -> optax.GradientTransformation:
    """Multiplies updates by decay^depth (Clark et al. 2020, appendix A: ELECTRA's rates for fine-tuning)."""

    def update(updates: Any, _: Any = None) -> Any:
        return jax.tree.map(lambda u, d: u * (decay**d).astype(u.dtype), updates, depths(updates))

    return optax.stateless(update)


class UnfreezeState(NamedTuple):
    """The steps done."""

    count: Any


def unfreeze_by_depth(every: int) -> optax.GradientTransformation:
    """Lets what stands at depth d move from step d·`every` on (gradual unfreezing, Howard & Ruder 2018, §3.3)."""

    def init(params: Any) -> UnfreezeState:
        del params
        return UnfreezeState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, UnfreezeState]:
        del params
        moves = jax.tree.map(lambda u, d: jnp.where(state.count >= d * every, u, 0), updates, depths(updates))
        return moves, UnfreezeState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _names(path: Path) -> tuple[str, ...]:
    return tuple(str(getattr(entry, "name", getattr(entry, "key", getattr(entry, "idx", "")))) for entry in path)


def _stack(names: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """Which stack of layers, and the first weight set of the leaf: "layers", part, "000", …"""
    at = names.index("layers")
    return names[:at], int(names[at + 2])

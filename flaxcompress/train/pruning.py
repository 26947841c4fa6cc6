"""Pruning while training: ever more of each map's weights are zero, by a cubic schedule, as an optax transformation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from flaxcompress.train.leaves import describe


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradualPruning:
    """How the maps inside layers lose weights while they are trained; tables, biases and norms lose none.

    Attributes:
      sparsity: the share of each map's weights that is zero in the end.
      begin, end: the shares of the run between which it grows, by 1 - (1 - t)³ (Zhu & Gupta 2017, eq. 1): fast while
        many weights are superfluous. What is left of the run trains at the last mask.
      every: steps between two choices of what is zero.
      by: "magnitude"; or "movement", the sum of w·Δw over the steps so far, which keeps what moves away from zero
        (Sanh et al. 2020; Δw is the optimizer's own step here).
      straight_through: weights that are zero for now go on being moved by their gradient, unseen, and come back when
        they are chosen again (Bengio et al. 2013; JaxPruner's magnitude_ste); else they stay zero, and a weight that is
        gone is gone.

    Raises ValueError for numbers out of range.
    """

    sparsity: float
    begin: float = 0.0
    end: float = 0.7
    every: int = 10
    by: Literal["magnitude", "movement"] = "magnitude"
    straight_through: bool = True

    def __post_init__(self):
        if not 0 < self.sparsity < 1:
            raise ValueError(f"optimizer/prune: sparsity must lie between 0 and 1, got {self.sparsity}")
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f"optimizer/prune: needs 0 <= begin < end <= 1, got {self.begin} and {self.end}")
        if self.every < 1:
            raise ValueError(f"optimizer/prune: every must be at least 1, got {self.every}")

    def schedule(self, steps: int) -> Callable[[Any], Float[Array, ""]]:
        """The share that is zero after a step, counted from 0, of a run of `steps` steps."""
        first, last = self.begin * steps, max(self.begin * steps + 1, self.end * steps - 1)

        def share(step: Any) -> Float[Array, ""]:
            done = jnp.clip((jnp.asarray(step, jnp.float32) - first) / (last - first), 0.0, 1.0)
            return self.sparsity * (1.0 - (1.0 - done) ** 3)

        return share


class PruningState(NamedTuple):
    """What is kept between steps; `optax.MaskedNode` stands in for all but maps, and for what a setting has no need of.

    Attributes:
      count: the steps done.
      kept: which weights are not zero.
      unseen: the weights without the mask.
      scores: Σ w·Δw.
    """

    count: Any
    kept: Any
    unseen: Any
    scores: Any


def prune_gradually(settings: GradualPruning, steps: int) -> optax.GradientTransformation:
    """Turns updates, the last of a chain's, into ones that leave the parameters masked.

    The gradient is then taken at the masked parameters. In the state are the mask, and the weights as they would be
    without it where gradients go straight through.
    """
    share = settings.schedule(steps)

    def init(params: Any) -> PruningState:
        ones = _of_maps(lambda leaf: jnp.ones(leaf.shape, bool), params)
        unseen = _of_maps(jnp.copy, params) if settings.straight_through else optax.MaskedNode()
        zeros = _of_maps(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        scores = zeros if settings.by == "movement" else optax.MaskedNode()
        return PruningState(jnp.zeros((), jnp.int32), ones, unseen, scores)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, PruningState]:
        if params is None:
            raise ValueError("prune_gradually: update needs the parameters")
        before = state.unseen if settings.straight_through else _of_maps(lambda leaf: leaf, params)
        moved = jax.tree.map(lambda w, u: w + u, before, _like(before, updates))
        scores = state.scores
        if settings.by == "movement":
            steps_of = _like(before, updates)
            scores = jax.tree.map(lambda s, w, u: s + w.astype(jnp.float32) * u, state.scores, before, steps_of)
        sparsity = share(state.count)
        due = (state.count % settings.every == 0) | (state.count == steps - 1)
        ranked = scores if settings.by == "movement" else jax.tree.map(jnp.abs, moved)
        alive = None if settings.straight_through else state.kept

        def choose(kept: Any) -> Any:
            held = kept if alive is None else alive
            return jax.tree.map(lambda r, k: _largest(r, k, sparsity, alive is not None), ranked, held)

        kept = jax.lax.cond(due & (sparsity > 0), choose, lambda kept: kept, state.kept)
        masked = jax.tree.map(lambda w, k: jnp.where(k, w, 0.0), moved, kept)
        new = _merge(updates, jax.tree.map(lambda m, w: m - w, masked, _like(masked, params)))
        unseen = moved if settings.straight_through else state.unseen
        return new, PruningState(optax.safe_increment(state.count), kept, unseen, scores)

    return optax.GradientTransformation(init, update)


def _largest(
    scores: Float[Array, "*S n m"], alive: Bool[Array, "*S n m"], sparsity: Any, only_alive: bool
) -> Bool[Array, "*S n m"]:
    """All but the share `sparsity` of each matrix's entries, those of least scores; none twice, ties by place."""
    flat = scores.reshape(*scores.shape[:-2], -1)
    if only_alive:  # what is zero already stays so
        flat = jnp.where(alive.reshape(flat.shape), flat, -jnp.inf)
    places = jnp.argsort(jnp.argsort(flat, axis=-1), axis=-1)  # of each entry in rising order
    kept = places >= jnp.round(sparsity * flat.shape[-1]).astype(jnp.int32)
    if only_alive:
        kept &= alive.reshape(flat.shape)
    return kept.reshape(scores.shape)


def _of_maps(function: Callable[[Any], Any], params: Any) -> Any:
    """The tree with `function` of every map inside layers, and nothing in place of other leaves."""

    def one(path: Any, leaf: Any) -> Any:
        return function(leaf) if describe(path, leaf).dense_map else optax.MaskedNode()

    return jax.tree_util.tree_map_with_path(one, params)


def _is_nothing(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _like(maps: Any, full: Any) -> Any:
    """The leaves of a full tree that are maps."""
    return jax.tree.map(lambda m, leaf: m if _is_nothing(m) else leaf, maps, full, is_leaf=_is_nothing)


def _merge(full: Any, maps: Any) -> Any:
    """A full tree whose maps are exchanged."""
    return jax.tree.map(lambda m, leaf: leaf if _is_nothing(m) else m, maps, full, is_leaf=_is_nothing)

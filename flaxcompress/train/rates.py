"""The optimizer of healing: AdamW from optax, with a learning rate for each kind of parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates at the peak of the schedule.

    Attributes:
      weights: of matrices (dense or latent), relative to their root mean square: Adam's unit step moves a weight by
        this fraction of a typical weight. Factors of very different sizes can then share one rate.
      scales: of the logarithms of quantization scales.
      vectors: of biases, norms and deltas (half of which start at zero), absolute.
    """

    weights: float = 6e-3
    scales: float = 3e-3
    vectors: float = 3e-4


class _SizeState(NamedTuple):
    size: Any


def relative_to_size() -> optax.GradientTransformation:
    """Multiplies each leaf's update by the root mean square that the leaf had at the start."""

    def init(params):
        return _SizeState(jax.tree.map(lambda p: jnp.sqrt(jnp.mean(jnp.square(p)) + 1e-20), params))

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda u, s: u * s, updates, state.size), state

    return optax.GradientTransformation(init, update)


def label(path: tuple[Any, ...], leaf: Any) -> str:
    """ "scales", "vectors" or "weights" for a parameter at a tree path."""
    names = [str(getattr(entry, "name", getattr(entry, "key", getattr(entry, "idx", "")))) for entry in path]
    if names[-1] == "log_scale":
        return "scales"
    if names[-1] in ("bias", "scale") or "deltas" in names:
        return "vectors"
    return "weights"


def make_optimizer(
    rates: Rates, *, steps: int, warmup: int, clip: float = 1.0, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW (β = 0.9, 0.99) after clipping by global norm; linear warm-up, cosine decay to 2 %."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, warmup_steps=max(1, min(warmup, steps // 2)), decay_steps=max(2, steps), end_value=0.02
    )

    def group(rate: float, relative: bool) -> optax.GradientTransformation:
        parts = [optax.scale_by_adam(b1=0.9, b2=0.99)]
        if relative:
            parts.append(relative_to_size())
            if weight_decay:
                parts.append(optax.add_decayed_weights(weight_decay))
        parts.append(optax.scale_by_learning_rate(lambda step: rate * schedule(step)))
        return optax.chain(*parts)

    groups: dict[Hashable, optax.GradientTransformation] = {
        "weights": group(rates.weights, True),
        "scales": group(rates.scales, False),
        "vectors": group(rates.vectors, False),
    }
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)  # noqa: E731
    return optax.chain(optax.clip_by_global_norm(clip), optax.partition(groups, labels))

"""Learning rates over a run: a linear warm-up, then one of several ways down."""

from __future__ import annotations

import jax.numpy as jnp
import optax

SCHEDULES = ("cosine", "linear", "constant", "rsqrt", "wsd")
ENDING = ("cosine", "linear", "wsd")  # those that come to an end with the run


def make_schedule(
    name: str, *, peak: float, steps: int, warmup: int, end: float = 0.0, cooldown: float = 0.1
) -> optax.Schedule:
    """The learning rate by step: from 0 in `warmup` steps to `peak`, then as the name says.

    Args:
      name: "cosine" or "linear" fall to the end of the run, "constant" stays, "rsqrt" falls as √(warmup/step) (Vaswani
        et al. 2017), "wsd" stays and falls linearly at the end (warm-up, stable, decay: Hu et al. 2024, MiniCPM).
      end: what is left of the peak at the end.
      cooldown: the share of the steps in which "wsd" falls.
    """
    rest = max(1, steps - warmup)
    if name == "cosine":
        way = optax.cosine_decay_schedule(peak, rest, alpha=end)
    elif name == "linear":
        way = optax.linear_schedule(peak, end * peak, rest)
    elif name == "constant":
        way = optax.constant_schedule(peak)
    elif name == "rsqrt":
        way = lambda step: peak * jnp.sqrt(warmup / (jnp.maximum(step, 0) + warmup))  # noqa: E731
    else:
        falling = min(rest, max(1, round(cooldown * steps)))
        down = optax.linear_schedule(peak, end * peak, falling)
        way = optax.join_schedules([optax.constant_schedule(peak), down], [rest - falling])
    if not warmup:
        return way
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), way], [warmup])

"""What a training run carries from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Progress(NamedTuple):
    """How the loss has been, float32 scalars.

    Attributes:
      mean, variance: running ones of the accepted losses.
      accepted: how many steps were accepted.
      refused: how many have been refused in a row.
    """

    mean: Any
    variance: Any
    accepted: Any
    refused: Any


class State(NamedTuple):
    """Arrays that a step replaces.

    Attributes:
      trainable: the parameters that learn, float32 (None elsewhere in the tree).
      optimizer: the optimizer's state.
      average: the running average of `trainable`, or None.
    """

    trainable: Any
    optimizer: Any
    average: Any
    progress: Progress


class Report(NamedTuple):
    """What a step says of itself, float32 scalars.

    Attributes:
      loss: on this batch, before the update.
      means: each term's mean.
      gradient_norm: before clipping.
      accepted: whether the update was made.
      refused: how many steps in a row, up to this one, were refused.
      stop: whether any process was asked to stop.
    """

    loss: Any
    means: dict[str, Any]
    gradient_norm: Any
    accepted: Any
    refused: Any
    stop: Any


def start(trainable: Any, optimizer: Any, *, average: bool) -> State:
    """The state before the first step."""
    progress = Progress(*(jnp.zeros((), jnp.float32) for _ in Progress._fields))  # one buffer each: they are donated
    copy = jax.tree.map(jnp.copy, trainable) if average else None
    return State(trainable, optimizer.init(trainable), copy, progress)

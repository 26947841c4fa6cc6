"""The training loop: jitted steps, checkpoints, resumption, and a stop that loses nothing."""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxcompress.progress import progress_bar
from flaxcompress.train.checkpoint import Checkpoints
from flaxcompress.train.trainable import combine, partition

log = logging.getLogger("flaxcompress")

LossFunction = Callable[[Any, Any, Any], jax.Array]  # (trainable parameters, constants, batch) -> loss
_MAX_SKIPPED = 20


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Inside the block, SIGINT and SIGTERM are noted, not raised; yields a function that says whether one came."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []
    before = {s: signal.signal(s, lambda number, _: came.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _train_step(loss_function, optimizer, trainable, state, frozen, constants, batch):
    def loss(trainable):
        return loss_function(combine(trainable, frozen), constants, batch)

    value, gradient = jax.value_and_grad(loss)(trainable)
    updates, new_state = optimizer.update(gradient, state, trainable)
    # A step that is not finite is left out. Selecting leaf by leaf fuses with the update; optax.apply_if_finite's
    # conditional copies the whole state instead and doubles the time of a step (measured on CPU).
    finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(gradient))
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
    return keep(optax.apply_updates(trainable, updates), trainable), keep(new_state, state), value, finite


def train(
    params: Any,
    loss_function: LossFunction,
    constants: Any,
    batches: Callable[[int], Any],
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    trainable: str = ".*",
    checkpoints: Path | None = None,
    save_every: int = 100,
    label: str = "training",
    progress: bool = False,
    on_loss: Callable[[int, float], None] = lambda step, loss: None,
) -> Any:
    """Minimises `loss_function` over float leaves of `params` for `steps` steps; returns the new params.

    Args:
      constants: arrays that the loss needs but that are not trained, such as the teacher's parameters.
      batches: step -> batch; a pure function of the step, so that a resumed run sees what an uninterrupted one would.
      trainable: a pattern of addresses; what it does not match in full stays as it is. "head/.*" trains a head on a
        frozen body.
      checkpoints: a folder; an earlier run's newest state in it is taken up again.
      on_loss: called with every step's loss, in order; a resumed run calls it for the earlier run's steps first.

    Raises:
      KeyboardInterrupt: SIGINT or SIGTERM came; the state was saved first.
      FloatingPointError: the loss or its gradient was not finite in 20 steps running.
    """
    moving, frozen = partition(jax.tree.map(jnp.copy, params), trainable)
    state, losses = optimizer.init(moving), np.zeros(steps, np.float32)
    with contextlib.ExitStack() as stack:
        keeper = stack.enter_context(Checkpoints(checkpoints)) if checkpoints is not None else None
        first = 0
        if keeper is not None and (found := keeper.restore((moving, state, jnp.asarray(losses)))) is not None:
            first, (moving, state, earlier) = found
            losses[:first] = earlier[:first]
            for step in range(first):
                on_loss(step, float(losses[step]))
            if first:
                log.warning("%s goes on from step %d of %d", label, first, steps)
        stopped = stack.enter_context(deferred_interrupts())
        advance = stack.enter_context(progress_bar(label, steps, show=progress))
        advance(first)
        skipped = 0
        smooth: float | None = None
        for step in range(first, steps):
            moving, state, value, finite = _train_step(
                loss_function, optimizer, moving, state, frozen, constants, batches(step)
            )
            losses[step] = loss = float(value)
            on_loss(step, loss)
            skipped = 0 if finite else skipped + 1
            if skipped >= _MAX_SKIPPED:
                raise FloatingPointError(
                    f"{label}: loss or gradient was not finite in {skipped} steps running, at {step + 1}"
                )
            if np.isfinite(loss):
                smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
            advance(1, f"loss {smooth:.4f}" if smooth is not None else "")
            done = step + 1
            if keeper is not None and ((done % save_every == 0 and done < steps) or stopped()):
                keeper.save(done, (moving, state, jnp.asarray(losses)), wait=stopped())
            if stopped():
                raise KeyboardInterrupt(f"{label} stopped after step {done}")
    return combine(moving, frozen)

"""One step of training: gradients of a batch, in microbatches if asked for, and the update, unless it would do harm."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flaxcompress.train.objectives import Terms, mean_of
from flaxcompress.train.state import Progress, Report, State
from flaxcompress.train.trainable import combine

STOP = "_stop"  # beside a batch's own keys: 1 for each device whose process was asked to stop
_MEMORY = 0.98  # of the running mean and variance of the loss
_SETTLED = 100  # steps before a loss can be called a spike


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is the same in every step; hashable, so that a step compiles once.

    Attributes:
      terms: (params, constants, batch, key) -> the terms of the loss.
      accumulate: microbatches per step; the gradient is that of the whole batch.
      average: decay of the running average of the parameters, or None.
      spike: a loss over the running mean by so many standard deviations is refused like one that is not finite; None:
        any finite loss is accepted.
    """

    terms: Callable[[Any, Any, Any, Any], Terms]
    optimizer: optax.GradientTransformation
    accumulate: int = 1
    average: float | None = None
    spike: float | None = None


def train_step(recipe: Recipe, state: State, frozen: Any, constants: Any, batch: Any, key: Any) -> tuple[State, Report]:
    """State and batch -> the next state; a refused step leaves it as it was (apart from the count of refusals).

    A step is refused where the loss or the gradient is not finite, and where the loss is a spike.
    """
    stop = jnp.max(batch[STOP]) if isinstance(batch, dict) and STOP in batch else jnp.zeros((), jnp.float32)
    if isinstance(batch, dict):
        batch = {name: value for name, value in batch.items() if name != STOP}
    loss, means, gradient = _gradient(recipe, state.trainable, frozen, constants, batch, key)
    norm = optax.tree.norm(gradient)
    updates, optimizer = recipe.optimizer.update(gradient, state.optimizer, state.trainable)
    good = jnp.isfinite(loss) & jnp.isfinite(norm) & ~_is_spike(recipe, state.progress, loss)
    # Selecting leaf by leaf fuses with the update; optax.apply_if_finite's conditional copies the whole state instead
    # and doubles the time of a step (measured on CPU).
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)  # noqa: E731
    trainable = keep(optax.apply_updates(state.trainable, updates), state.trainable)
    average = state.average
    if recipe.average is not None:  # early on the average is of the steps so far, not of the start
        decay = jnp.minimum(recipe.average, (1.0 + state.progress.accepted) / (10.0 + state.progress.accepted))
        average = keep(jax.tree.map(lambda a, t: decay * a + (1.0 - decay) * t, average, trainable), average)
    progress = _progress(state.progress, loss, good)
    report = Report(loss, means, norm, good.astype(jnp.float32), progress.refused, stop)
    return State(trainable, keep(optimizer, state.optimizer), average, progress), report


def _gradient(recipe: Recipe, trainable: Any, frozen: Any, constants: Any, batch: Any, key: Any):
    """(loss, means of the terms, gradient) of a whole batch."""

    def terms_of(trainable: Any, batch: Any, key: Any) -> Terms:
        return recipe.terms(combine(trainable, frozen), constants, batch, key)

    if recipe.accumulate == 1:

        def loss(trainable: Any):
            terms = terms_of(trainable, batch, key)
            return mean_of(terms), {name: (term.total, term.weight) for name, term in terms.items()}

        (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
        return value, _means(sums), gradient

    # The weights depend on the labels alone: the network that this seems to run is left out by the compiler.
    weights = {name: term.weight for name, term in terms_of(trainable, batch, key).items()}

    def part(trainable: Any, batch: Any, key: Any):
        terms = terms_of(trainable, batch, key)
        return mean_of(terms, weights), {name: (term.total, term.weight) for name, term in terms.items()}

    def body(carry: Any, step: Any):
        number, batch = step
        (value, sums), gradient = jax.value_and_grad(part, has_aux=True)(
            trainable, batch, None if key is None else jax.random.fold_in(key, number)
        )
        return jax.tree.map(jnp.add, carry, (value, sums, gradient)), None

    batches = jax.tree.map(lambda x: _split(x, recipe.accumulate), batch)
    shapes = jax.eval_shape(lambda: jax.value_and_grad(part, has_aux=True)(trainable, _first(batches), key))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0][0], shapes[0][1], shapes[1]))
    (value, sums, gradient), _ = jax.lax.scan(body, zeros, (jnp.arange(recipe.accumulate), batches))
    return value, _means(sums), gradient


def _split(x: Any, parts: int) -> Any:
    """[B, …] -> [parts, B/parts, …]; every part has rows of every device that the batch is spread over."""
    if x.shape[0] % parts:
        raise ValueError(f"accumulate: {x.shape[0]} rows cannot be split into {parts} microbatches; choose a divisor")
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _first(batches: Any) -> Any:
    return jax.tree.map(lambda x: x[0], batches)


def _means(sums: dict[str, Any]) -> dict[str, Any]:
    return {name: total / jnp.maximum(weight, 1e-12) for name, (total, weight) in sums.items()}


def _is_spike(recipe: Recipe, progress: Progress, loss: Any) -> Any:
    if recipe.spike is None:
        return jnp.asarray(False)
    deviation = jnp.maximum(jnp.sqrt(progress.variance), 0.01 * jnp.abs(progress.mean))
    return (progress.accepted >= _SETTLED) & (loss > progress.mean + recipe.spike * deviation)


def _progress(before: Progress, loss: Any, good: Any) -> Progress:
    """Running mean and variance after a loss (exponentially weighted, West 1979; plain ones at the start)."""
    share = jnp.maximum(1.0 - _MEMORY, 1.0 / (before.accepted + 1.0))
    change = loss - before.mean
    after = Progress(
        before.mean + share * change,
        (1.0 - share) * (before.variance + share * jnp.square(change)),
        before.accepted + 1.0,
        jnp.zeros((), jnp.float32),
    )
    kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
    return kept._replace(refused=jnp.where(good, 0.0, before.refused + 1.0))

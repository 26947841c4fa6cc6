"""The training loop: steps, evaluations and checkpoints; it resumes, and stops without losing anything."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxcompress.data.batches import Batches
from flaxcompress.progress import progress_bar
from flaxcompress.train.checkpoint import Checkpoints
from flaxcompress.train.interrupts import deferred_interrupts
from flaxcompress.train.placement import OneDevice
from flaxcompress.train.state import Report, State
from flaxcompress.train.step import Recipe
from flaxcompress.train.trainable import combine, partition

log = logging.getLogger("flaxcompress")

Watch = Callable[[int, Mapping[str, float]], str | None]
Choose = Callable[..., Recipe]
Evaluation = Callable[[Any], Mapping[str, float]]


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came; the state was saved first where there is a folder for it."""


class Limits(NamedTuple):
    """When a run goes back, and when it gives up.

    Attributes:
      refused: steps refused in a row after which the newest checkpoint is taken up again; the batches are passed over.
      rollbacks: how often that may happen.
    """

    refused: int = 20
    rollbacks: int = 3


class Memory(NamedTuple):
    """What a caller wants kept in checkpoints: `keep()` gives a JSON object, `recall(object)` gets it back."""

    keep: Callable[[], dict[str, Any]]
    recall: Callable[[dict[str, Any]], None]


def train(
    params: Any,
    data: Batches,
    recipe: Recipe,
    *,
    choose: Choose | None = None,
    steps: int,
    constants: Any = (),
    key: jax.Array | None = None,
    trainable: str = ".*",
    place: OneDevice | None = None,
    checkpoints: Checkpoints | None = None,
    save_every: int = 100,
    evaluation: Evaluation | None = None,
    evaluate_every: int = 0,
    best: Callable[[Mapping[str, float]], float] | None = None,
    take_best: bool = False,
    patience: int = 0,
    limits: Limits = Limits(),  # noqa: B008  (a tuple, never changed)
    watch: Watch = lambda step, values: None,
    memory: Memory | None = None,
    label: str = "training",
    progress: bool = False,
) -> Any:
    """Minimises a loss over float leaves of `params` for `steps` steps; returns the new params.

    Args:
      recipe: the loss's terms, the optimizer, and how a step is made.
      choose: (rows of a batch, place, state, frozen, constants, batch, key) -> the recipe that is used instead, once
        the arrays are there.
      constants: arrays that the loss needs but that are not trained, such as the teacher's parameters.
      key: of dropout; step n draws from fold_in(key, n).
      trainable: a pattern of addresses; what it does not match in full stays as it is. "head/.*" trains a head on a
        frozen body.
      checkpoints: an earlier run's newest state in it is taken up again, with the data's position.
      evaluation: params -> metrics, run every `evaluate_every` steps and at the end, on averaged parameters where the
        recipe averages them.
      best: metrics -> a number; checkpoints with the smallest are kept, if `checkpoints` keeps the best.
      take_best: the best checkpoint's parameters are returned, not the last ones.
      patience: the run ends after so many evaluations in a row without a new best; 0: never early.
      watch: called with (steps done, values): every step's loss, terms, gradient_norm, accepted (0 or 1), seconds,
        waiting (seconds that the device waited for data, at most) and saving; and evaluations' values,
        "validation/…". A text that it returns stands beside the progress bar.

    Raises:
      Stopped: SIGINT or SIGTERM came; the state was saved first.
      FloatingPointError: too many steps in a row were refused (see `train_step`), and going back did not help.
    """
    run = _Training(data, recipe, place or OneDevice(), checkpoints, constants, key, limits, watch, memory, label)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.place.context())
        run.begin(params, trainable, steps, choose)
        run.stop = stack.enter_context(deferred_interrupts())
        run.advance = stack.enter_context(progress_bar(label, steps, show=progress and jax.process_index() == 0))
        run.advance(run.done)
        while run.done < steps and not 0 < patience <= run.stale:
            run.one()
            finished = run.done == steps
            due = finished or (evaluate_every > 0 and run.done % evaluate_every == 0)
            if evaluation is not None and due and run.settle():
                run.evaluate(evaluation, best)
            if (run.done % save_every == 0 or finished or run.metric is not None) and run.settle():
                run.save()
            if 0 < patience <= run.stale:
                log.warning("%s ends at step %d: %d evaluations were no better", label, run.done, run.stale)
            if run.is_stopping():
                run.settle()
                run.save(wait=True)
                raise Stopped(f"{label} stopped after step {run.done}")
        return run.result(take_best)


class _Training:
    """A run in progress."""

    def __init__(self, data, recipe, place, checkpoints, constants, key, limits, watch, memory, label):
        self.data: Batches = data
        self.recipe: Recipe = recipe
        self.place: OneDevice = place
        self.checkpoints: Checkpoints | None = checkpoints
        self.key, self.limits, self.watch, self.memory, self.label = key, limits, watch, memory, label
        self.given_constants = constants
        self.stop: Callable[[], bool] = lambda: False
        self.advance: Callable[..., None] = lambda count=1, note="": None
        self.done = 0
        self.rollbacks = 0
        self.saving = 0.0
        self.metric: float | None = None
        self.least: float | None = None  # of the metrics of all evaluations
        self.stale = 0  # evaluations since
        self.pending: tuple[int, Report, dict[str, float]] | None = None
        self.stopping = False
        self.smooth: float | None = None
        self.before = time.perf_counter()

    def begin(self, params: Any, trainable: str, steps: int, choose: Choose | None) -> None:
        """Places the parameters, and takes up an earlier run's state."""
        moving, frozen = partition(params, trainable)
        placed = self.place.params(combine(moving, frozen))
        moving, self.frozen = partition(placed, trainable)
        self.constants = self.place.constants(self.given_constants)
        self.state: State = self.place.start(self.recipe, moving)
        self.position = self.data.get_state()
        if choose is not None:
            batch = next(self.data)
            self.data.set_state(self.position)
            rows = len(jax.tree.leaves(batch)[0]) * jax.process_count()
            given = (self.frozen, self.constants, self.place.batch(batch), self.key)
            self.recipe = choose(rows, self.place, self.state, *given)
        self.step = self.place.step(self.recipe, self.state)
        if self.checkpoints is None or (found := self.checkpoints.restore(self.state)) is None:
            return
        self.done, self.state, extra = found
        self._recall(extra)
        self.data.set_state(extra["data"])
        self.position = extra["data"]
        if self.done:
            log.warning("%s goes on from step %d of %d", self.label, self.done, steps)

    def _recall(self, extra: dict[str, Any]) -> None:
        self.rollbacks, self.smooth = extra["rollbacks"], extra["smooth"]
        self.least, self.stale = extra.get("least"), extra.get("stale", 0)
        if self.memory is not None:
            self.memory.recall(extra["memory"])

    def one(self) -> None:
        """Runs one step. Its loss is read while the next one runs, so that the device does not wait for the host."""
        began = time.perf_counter()
        batch = next(self.data)
        fetched = time.perf_counter()
        idle = self.pending is None or self.pending[1].loss.is_ready()
        key = None if self.key is None else jax.random.fold_in(self.key, self.done)
        placed = self.place.batch(batch, self.stop())
        self.position = self.data.get_state()
        self.state, report = self.step(self.state, self.frozen, self.constants, placed, key)
        self.done += 1
        last, self.pending = self.pending, None
        now = time.perf_counter()
        timing = {"seconds": now - self.before, "waiting": fetched - began if idle else 0.0, "saving": self.saving}
        self.before, self.saving = now, 0.0
        if last is not None and not self._read(*last):
            return  # gone back: this step was made from the state that is given up
        self.pending = (self.done, report, timing)

    def settle(self) -> bool:
        """Reads the last step's report; whether the run is still where it was."""
        last, self.pending = self.pending, None
        return last is None or self._read(*last)

    def _read(self, done: int, report: Report, timing: dict[str, float]) -> bool:
        """Tells the watcher of a step; False where the run went back to a checkpoint."""
        report = jax.device_get(report)
        loss = float(report.loss)
        self.stopping = self.stopping or float(report.stop) > 0
        values = {"loss": loss, **{name: float(mean) for name, mean in report.means.items()}}
        values |= {"gradient_norm": float(report.gradient_norm), "accepted": float(report.accepted), **timing}
        note = self.watch(done, values)
        if report.accepted:
            self.smooth = loss if self.smooth is None else 0.95 * self.smooth + 0.05 * loss
        else:
            log.info("%s: step %d was refused, loss %g", self.label, done, loss)
        shown = [] if self.smooth is None else [f"loss {self.smooth:.4f}"]
        self.advance(1, " ".join([*shown, note or ""]))
        refused = int(report.refused)
        return refused < self.limits.refused or self._go_back(refused)

    def _go_back(self, refused: int) -> bool:
        """Takes up the newest checkpoint again, behind the batches that were refused."""
        what = f"{self.label}: loss or gradient was not finite, or a spike, in {refused} steps running, at {self.done}"
        if self.checkpoints is None or self.rollbacks >= self.limits.rollbacks:
            raise FloatingPointError(what)
        self.checkpoints.wait()
        if (found := self.checkpoints.restore(self.state)) is None:
            raise FloatingPointError(what)
        rollbacks = self.rollbacks + 1
        moved = found[0] - self.done
        self.done, self.state, extra = found
        self._recall(extra)
        self.rollbacks, self.pending = rollbacks, None
        log.warning("%s; going on from step %d with other batches", what, self.done)
        self.advance(moved)
        return False

    def evaluate(self, evaluation: Evaluation, best: Callable[[Mapping[str, float]], float] | None) -> None:
        """Runs an evaluation and tells the watcher."""
        found = dict(evaluation(self.params()))
        self.watch(self.done, {f"validation/{name}": value for name, value in found.items()})
        if best is not None:
            self.metric = best(found)
            better = self.least is None or self.metric < self.least
            self.least, self.stale = (self.metric, 0) if better else (self.least, self.stale + 1)
        self.before = time.perf_counter()

    def params(self) -> Any:
        """The parameters as they are now; averaged, where the recipe says so."""
        moving = self.state.trainable if self.state.average is None else self.state.average
        return combine(moving, self.frozen)

    def save(self, *, wait: bool = False) -> None:
        """Writes a checkpoint in the background."""
        if self.checkpoints is None:
            return
        began = time.perf_counter()
        extra = {"data": self.position, "rollbacks": self.rollbacks, "smooth": self.smooth}
        extra |= {"least": self.least, "stale": self.stale}
        extra["memory"] = None if self.memory is None else self.memory.keep()
        self.checkpoints.save(self.done, self.state, extra, metric=self.metric)
        self.metric = None
        if wait:
            self.checkpoints.wait()
        self.saving += time.perf_counter() - began

    def is_stopping(self) -> bool:
        """Whether the run is to stop now; all processes agree."""
        return self.stopping if jax.process_count() > 1 else self.stop()

    def result(self, take_best: bool) -> Any:
        """The trained parameters."""
        self.settle()
        if take_best and self.checkpoints is not None:
            self.checkpoints.wait()
            if (found := self.checkpoints.restore(self.state, step=self.checkpoints.best())) is not None:
                self.state = found[1]
        return self.place.gather(self.params())


def mean_terms(terms: Callable[..., Any], constants: Any, batches: Any, place: OneDevice) -> Evaluation:
    """An evaluation: the means of a loss's terms, and the loss, over all batches of one pass."""
    run = jax.jit(lambda params, constants, batch: _sums(terms(params, constants, batch, None)))
    scales: dict[str, float] = {}

    def _sums(found: Any) -> Any:
        scales.update({name: term.scale for name, term in found.items()})
        return {name: (term.total, term.weight) for name, term in found.items()}

    def evaluation(params: Any) -> dict[str, float]:
        sums: dict[str, np.ndarray] = {}
        fixed = place.constants(constants)
        one_pass: Any = batches() if callable(batches) else batches
        for batch in one_pass:
            placed = {name: value for name, value in place.batch(batch).items() if not name.startswith("_")}
            for name, value in run(params, fixed, placed).items():
                sums[name] = sums.get(name, np.zeros(2)) + np.asarray([float(v) for v in value])
        if not sums:
            raise ValueError("evaluation: there are no batches")
        means = {name: float(total / max(weight, 1e-12)) for name, (total, weight) in sums.items()}
        return {"loss": sum(scales[name] * mean for name, mean in means.items()), **means}

    return evaluation

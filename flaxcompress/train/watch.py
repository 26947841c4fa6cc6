"""What a run's steps say of themselves, with learning rate and throughput added, on their way to the metrics."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from flaxcompress.config import ModelConfig
from flaxcompress.data.batches import Batches
from flaxcompress.train.metrics import TIMES, Metrics
from flaxcompress.train.throughput import BatchShape, Throughput, step_flops


class ShapedBatches:
    """Batches that remember the shape of the last one."""

    def __init__(self, batches: Batches):
        self._batches = batches
        self.shape: BatchShape | None = None

    def __iter__(self) -> ShapedBatches:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        self.shape = BatchShape.of(batch, jax.process_count())
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position of the batches."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes there."""
        self._batches.set_state(state)


class Watcher:
    """Called with (steps done, values), as `fit` does; writes them to the metrics.

    Args:
      metrics: None on processes that write nothing.
      rates: the learning rate by step.
      steps: of the run; all rates are found at the start, since on a device they would wait for the running step.
      every: steps between lines; the last step and evaluations are always written. A line's values are those of its
        step, but its times are of all steps since the line before, and "accepted" is their mean.
      peak: FLOP/s of one device; None: MFU is not told.
    """

    def __init__(
        self,
        metrics: Metrics | None,
        batches: ShapedBatches,
        model: ModelConfig,
        *,
        rates: optax.Schedule,
        steps: int,
        every: int = 1,
        peak: float | None = None,
        teacher: ModelConfig | None = None,
    ):
        self._metrics, self._batches, self._every = metrics, batches, every
        self._rates = np.broadcast_to(np.asarray(rates(np.arange(steps))), (steps,))
        self._since: list[tuple[int, Mapping[str, float]]] = []  # the steps since the last line
        flops = functools.lru_cache(maxsize=64)(lambda shape: step_flops(model, shape, teacher=teacher))
        self._throughput = Throughput(flops=flops, peak=peak, devices=jax.device_count())

    def __call__(self, step: int, values: Mapping[str, float]) -> str | None:
        found = dict(values)
        if "loss" in values:
            if self._batches.shape is not None and "seconds" in values:
                found |= self._throughput.after(values["seconds"], self._batches.shape)
            self._since = [earlier for earlier in self._since if earlier[0] < step]  # a run may go back
            self._since.append((step, values))
            if step % self._every and step < len(self._rates):
                return _note(found)
            found |= _together([each for _, each in self._since])
            self._since = []
            found["learning_rate"] = float(self._rates[step - 1])
        if self._metrics is not None:
            self._metrics.write(step, found)
        return _note(found)


def _together(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What a line says of several steps."""
    sums = {name: sum(each.get(name, 0.0) for each in steps) for name in TIMES if name in steps[-1]}
    accepted = [each["accepted"] for each in steps if "accepted" in each]
    return sums | ({"accepted": sum(accepted) / len(accepted)} if accepted else {})


def _note(found: Mapping[str, float]) -> str:
    """What stands beside the progress bar."""
    parts = []
    if (rate := found.get("tokens_per_second")) is not None:
        parts.append(f"{rate:,.0f} tokens/s")
    if (rate := found.get("images_per_second")) is not None:
        parts.append(f"{rate:,.0f} images/s")
    if (mfu := found.get("mfu")) is not None:
        parts.append(f"MFU {mfu:.1%}")
    return " ".join(parts)

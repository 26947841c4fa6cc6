"""Interleaved timing: every round times each contestant once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxcompress.bench.energy import Energy

_LATENCY_CALLS = 5  # per round
PAUSE = 0.02  # seconds between contestants: OpenMP's threads spin for a while after PyTorch's work is done


@dataclasses.dataclass
class Timed:
    """Seconds of each contestant's calls, round by round, and the joules of its forward passes."""

    forward: list[list[float]]
    single: list[list[float]]
    joules: list[float] | None


def interleaved(runners: Sequence[Any], inputs: Sequence[Any], rounds: int, advance: Any) -> Timed:
    """Times each runner on its inputs, (a batch, one sentence), `rounds` times in turns."""
    meter = Energy()
    timed = Timed([[] for _ in runners], [[] for _ in runners], [0.0] * len(runners) if meter.readable else None)
    for number in range(rounds):
        for place in range(len(runners)):
            i = (number + place) % len(runners)  # nobody always runs after the same neighbour
            run, (many, one) = runners[i], inputs[i]
            time.sleep(PAUSE)
            before = meter.read()
            start = time.perf_counter()
            run(many)
            timed.forward[i].append(time.perf_counter() - start)
            if timed.joules is not None:
                timed.joules[i] += meter.since(before)
            for _ in range(_LATENCY_CALLS):
                start = time.perf_counter()
                run(one)
                timed.single[i].append(time.perf_counter() - start)
        advance(note="")
    return timed


def quartiles(values: np.ndarray) -> dict[str, float]:
    """{"median", "q1", "q3"}."""
    q1, median, q3 = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "q1": float(q1), "q3": float(q3)}

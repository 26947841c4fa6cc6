"""Batches with a position that can be saved: what training reads."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, Protocol, TypedDict

import numpy as np

from flaxcompress.data.plan import FILLER, Plan

Batch = dict[str, np.ndarray]
IGNORED = -100  # the label of what does not count


class Batches(Protocol):
    """Batches of this process, one after the other; its rows of each global batch."""

    def __iter__(self) -> Batches: ...

    def __next__(self) -> Batch:
        """The next batch; arrays of numpy, with the rows first. Raises StopIteration after the last one."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Where the next batch stands; a JSON object."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes where `get_state` was called. Raises ValueError for a state of other data."""
        ...


class BatchOptions(TypedDict, total=False):
    """How batches are read.

    epochs: None for endless ones.
    shuffle: whether each epoch has an order of its own; default True.
    process_index, process_count: which of how many processes reads; by default JAX's. Each reads its own rows only.
    threads: that make batches ahead; 0 makes each when it is asked for. Default 2.
    prefetch: batches made ahead; default 8.
    """

    epochs: int | None
    shuffle: bool
    process_index: int | None
    process_count: int | None
    threads: int
    prefetch: int


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a batch: its examples, none in a row that only fills up, and its own source of random numbers.

    Attributes:
      seeds: of (seed, epoch); an example's random numbers follow from these and its number.
    """

    examples: np.ndarray
    seeds: tuple[int, int]

    @property
    def example(self) -> int | None:
        """The only example, in rows that are not packed; None in a row that only fills up."""
        return int(self.examples[0]) if len(self.examples) else None

    def rng(self, example: int) -> np.random.Generator:
        """The random numbers of one example in this epoch."""
        return np.random.default_rng([*self.seeds, int(example)])


Make = Callable[[list[Row], int], Batch]  # (this process's rows, bucket) -> batch


class StepBatches:
    """Endless batches from a pure function of the step."""

    def __init__(self, function: Callable[[int], Any]):
        self._function, self._step = function, 0

    def __iter__(self) -> StepBatches:
        return self

    def __next__(self) -> Any:
        batch = self._function(self._step)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        self._step = int(state["step"])


class PlannedBatches:
    """The batches of a plan, made ahead by Grain's threads.

    Batch k is the same whatever number of processes reads it: each takes a stretch of its rows. An epoch's last batch
    is filled up with rows that do not count. After the last epoch `set_state` of an earlier state starts again.
    """

    def __init__(
        self,
        plan: Plan,
        make: Make,
        *,
        epochs: int | None = None,
        process_index: int | None = None,
        process_count: int | None = None,
        threads: int = 2,
        prefetch: int = 8,
    ):
        if epochs is not None and epochs < 1:
            raise ValueError(f"batches: epochs must be at least 1, or None for endless ones, got {epochs}")
        index, count = _process(process_index, process_count)
        if plan.batch_size % count:
            raise ValueError(
                f"batches: the global batch of {plan.batch_size} rows cannot be shared evenly by {count} processes; "
                f"use a multiple of {count}"
            )
        self._plan = plan
        share = plan.batch_size // count
        self._steps = _Steps(plan, make, epochs, slice(index * share, (index + 1) * share))
        self._iterator = _grain_iterator(self._steps, threads, prefetch)

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return self._plan.batches

    @property
    def rows(self) -> int:
        """Rows in an epoch, those that only fill up left out."""
        return self._plan.rows

    def __iter__(self) -> PlannedBatches:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        return {"step": int(self._iterator.get_state()["next_index"]), **self._identity()}

    def set_state(self, state: dict[str, Any]) -> None:
        for name, own in self._identity().items():
            if state.get(name, own) != own:
                raise ValueError(
                    f"training data: the saved position is of other batches ({name} {state[name]}, here {own}): "
                    "training cannot go on from there without losing or repeating examples"
                )
        if not 0 <= (step := int(state["step"])) <= len(self._steps):
            raise ValueError(f"training data: the saved position {step} is beyond the last batch, {len(self._steps)}")
        self._iterator.set_state({"next_index": step})

    def close(self) -> None:
        """Ends the threads."""
        self._iterator.close()

    def _identity(self) -> dict[str, Any]:
        plan = self._plan
        return {"rows": plan.rows, "batch_size": plan.batch_size, "seed": plan.seed, "shuffle": plan.shuffle}


def planned_batches(
    buckets: Any,
    make: Make,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    **options: Any,
) -> PlannedBatches:
    """`PlannedBatches` of a `Plan` of rows in these buckets, or of a `Packing`; `options` are of `BatchOptions`."""
    return PlannedBatches(Plan(buckets, batch_size=batch_size, seed=seed, shuffle=shuffle), make, **options)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Batches by number, as Grain reads them."""

    plan: Plan
    make: Make
    epochs: int | None
    share: slice

    def __len__(self) -> int:
        return sys.maxsize if self.epochs is None else self.epochs * self.plan.batches

    def __getitem__(self, index: int) -> Batch:
        number, k = divmod(int(index), self.plan.batches)
        epoch = self.plan.epoch(number)
        rows = [self._row(epoch.bins, row, number) for row in epoch.rows[k, self.share].tolist()]
        return self.make(rows, int(epoch.buckets[k]))

    def _row(self, bins: Any, row: int, number: int) -> Row:
        seeds = (self.plan.seed, number)
        if row == FILLER:
            return Row(np.zeros(0, np.int64), seeds)
        if bins is None:
            return Row(np.array([row]), seeds)
        return Row(bins.examples[bins.starts[row] : bins.starts[row + 1]], seeds)


def _process(index: int | None, count: int | None) -> tuple[int, int]:
    if index is None or count is None:
        import jax

        index = jax.process_index() if index is None else index
        count = jax.process_count() if count is None else count
    if not 0 <= index < count:
        raise ValueError(f"batches: process_index must be 0 to {count - 1}, got {index}")
    return index, count


def _grain_iterator(steps: _Steps, threads: int, prefetch: int) -> Any:
    try:
        import grain  # takes seconds to import: only when batches are made
    except ImportError:
        raise ValueError("training data is read through grain: pip install 'flaxcompress[train]'") from None

    if not threads or not prefetch:
        threads = prefetch = 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(steps).to_iter_dataset(options))

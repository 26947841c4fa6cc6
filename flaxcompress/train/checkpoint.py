"""Training state on disk: Orbax, asynchronous, the last two kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger("flaxcompress")


class Checkpoints:
    """Saves and restores a pytree of arrays by step. Use as a context manager: leaving it waits for pending writes."""

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(
            logging.CRITICAL
        )  # its threads log whole tracebacks of errors that reach us anyway
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            Path(folder).absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, step: int, state: Any, *, wait: bool = False) -> None:
        """Writes `state` as of `step` in the background."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=self._ocp.args.StandardSave(state))
        if wait:
            self._manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """(step, state) of the newest readable checkpoint, or None; damaged ones are named and passed over."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return step, self._manager.restore(step, args=self._ocp.args.StandardRestore(abstract))
            except Exception as error:  # Orbax raises many kinds for damaged folders
                log.warning("checkpoint %d cannot be read (%s); trying the one before it", step, type(error).__name__)
        return None

"""Training state on disk: Orbax, asynchronous and atomic; the newest and the best are kept, damaged ones set aside."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

log = logging.getLogger("flaxcompress")

_METRIC = "metric"


class Checkpoints:
    """Saves and restores a pytree of arrays, and a small JSON object, by step.

    Orbax notices truncated files but not a flipped bit in an array, so each checkpoint holds a checksum of every leaf.
    Use as a context manager: leaving it waits for pending writes.

    Args:
      folder: a path, or a "gs://…" address.
      keep_last: how many of the newest are kept.
      keep_best: how many of those with the smallest `metric` are kept beside them.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep_last: int = 2, keep_best: int = 0):
        import orbax.checkpoint as ocp
        from etils import epath
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

        # Its threads log whole tracebacks of errors that reach us anyway.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._ocp = ocp
        self.folder = epath.Path(os.fspath(folder))
        if "://" not in os.fspath(folder):
            self.folder = epath.Path(os.path.abspath(os.fspath(folder)))
        best = BestN(
            get_metric_fn=lambda metrics: -metrics[_METRIC], n=keep_best, keep_checkpoints_without_metrics=False
        )
        policy = AnyPreservationPolicy([LatestN(keep_last), *([best] if keep_best else [])])
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={"state": ocp.StandardCheckpointHandler(), "note": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                create=True,
                preservation_policy=policy,
                best_fn=(lambda metrics: metrics[_METRIC]) if keep_best else None,  # without it none are written
                best_mode="min",
                cleanup_tmp_directories=jax.process_index() == 0,
            ),
        )
        self._failing = False

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        with contextlib.suppress(Exception):  # what went wrong has been said
            self._manager.close()

    def steps(self) -> list[int]:
        """The steps of the checkpoints that there are, oldest first."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step of the checkpoint with the smallest metric; None where none has one."""
        found = {step: (self._manager.metrics(step) or {}).get(_METRIC) for step in self.steps()}
        known = {step: value for step, value in found.items() if value is not None}
        return min(known, key=lambda step: known[step]) if known else None

    def save(self, step: int, state: Any, extra: Mapping[str, Any], *, metric: float | None = None) -> None:
        """Writes `state` as of `step` in the background. Where that fails (a full disk), a warning says so."""
        if step in self._manager.all_steps():
            return
        sums = [int(value) for value in np.asarray(_checksums(jax.tree.leaves(state)))]
        text = json.dumps({"extra": dict(extra), "checksums": sums, "metric": metric})
        note = {"text": text, "checksum": zlib.crc32(text.encode())}
        args = self._ocp.args.Composite(state=self._ocp.args.StandardSave(state), note=self._ocp.args.JsonSave(note))
        metrics = None if metric is None else {_METRIC: metric}
        self._guarded(step, lambda: self._manager.save(step, args=args, metrics=metrics))

    def wait(self) -> None:
        """Returns when what is being written is on disk."""
        self._guarded(None, self._manager.wait_until_finished)

    def _guarded(self, step: int | None, write: Callable[[], Any]) -> None:
        """Runs a write; an error of it, or of an earlier one that ran in the background, becomes a warning."""
        with _quiet_threads():
            try:
                self._manager.check_for_errors()
                write()
            except Exception as error:  # Orbax raises many kinds, also for an earlier step
                if jax.process_count() > 1:
                    raise  # the others would wait for this process at the next checkpoint
                where = "" if step is None else f" {step}"
                kept = self.steps()
                log.warning(
                    "checkpoint%s could not be written to %s (%s); training goes on, the newest one is %s",
                    where,
                    self.folder,
                    _short(error),
                    kept[-1] if kept else "none",
                )

    def restore(self, like: Any, *, step: int | None = None) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, extra) of the newest checkpoint that is whole, or of `step`; None where there is none.

        Arrays come in the shardings and dtypes of `like`'s leaves, whatever they were saved from. A checkpoint that
        cannot be read, or whose checksums differ, is named and renamed, and the one before it is taken.

        Raises ValueError where a whole checkpoint holds other arrays than `like` does.
        """
        for number in [step] if step is not None else sorted(self._manager.all_steps(), reverse=True):
            try:
                return number, *self._read(number, like)
            except _Mismatch as error:
                raise ValueError(f"{self.folder / str(number)}: {error}") from None
            except Exception as error:  # Orbax raises many kinds for damaged folders
                self._set_aside(number, error)
        return None

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        args = self._ocp.args
        restored: Any = self._manager.restore(step, args=args.Composite(note=args.JsonRestore()))
        note = restored.note
        if zlib.crc32(note["text"].encode()) != note["checksum"]:
            raise ValueError("its note is damaged")
        note = json.loads(note["text"])
        wanted, structure = jax.tree.flatten(like)
        stored = self._stored_dtypes(step, like)  # read as stored, for the checksums, and converted afterwards
        abstract = [
            jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
            for leaf, dtype in zip(wanted, stored, strict=True)
        ]
        target = args.StandardRestore(jax.tree.unflatten(structure, abstract))
        with _quiet_threads():
            restored = self._manager.restore(step, args=args.Composite(state=target))
        leaves = jax.tree.leaves(restored.state)
        sums = [int(value) for value in np.asarray(_checksums(leaves))]
        if sums != note["checksums"]:
            raise ValueError("an array differs from its checksum")
        cast = [leaf.astype(want.dtype) for leaf, want in zip(leaves, wanted, strict=True)]
        return jax.tree.unflatten(structure, cast), note["extra"]

    def _stored_dtypes(self, step: int, like: Any) -> list[Any]:
        """The dtypes on disk, in the order of `like`'s leaves; raises `_Mismatch` where the arrays are others."""
        tree = self._manager.item_metadata(step)["state"].tree
        saved = {_plain(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if leaf is not None}
        wanted = {_plain(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
        for path in (saved.keys() | wanted.keys()) - (saved.keys() & wanted.keys()):
            raise _Mismatch(f"{'/'.join(path)} is {'not in it' if path in wanted else 'not part of this run'}")
        for path, leaf in wanted.items():
            if tuple(saved[path].shape) != tuple(leaf.shape):
                raise _Mismatch(f"{'/'.join(path)} is {list(saved[path].shape)} there, {list(leaf.shape)} in this run")
        return [saved[path].dtype for path in wanted]

    def _set_aside(self, step: int, error: Exception) -> None:
        if jax.process_index() == 0:
            where = self.folder / str(step)
            aside = self.folder / f"damaged-{step}"
            with contextlib.suppress(OSError):
                if aside.exists():
                    aside.rmtree()
                where.rename(aside)
            log.warning("checkpoint %s is damaged (%s): set aside as %s", where, _short(error), aside.name)
        self._manager.reload()


class _Mismatch(ValueError):
    """A checkpoint that is whole, but of something else."""


def _plain(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A tree path without what kind of node each entry is in: saved trees are all dicts and lists."""
    return tuple(str(getattr(e, "name", getattr(e, "key", getattr(e, "idx", "")))) for e in path)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text[:120]}"


@contextlib.contextmanager
def _quiet_threads():
    """Orbax's threads raise what reaches us as an exception once more; their tracebacks are left out."""
    before = threading.excepthook
    threading.excepthook = lambda args: None
    try:
        yield
    finally:
        threading.excepthook = before


@jax.jit
def _checksums(leaves: list[Any]) -> Any:
    """[leaves] uint32: Σ bits·(2i + 1) mod 2³², i the place in the array; a changed bit always changes it.

    The same however the array is spread over devices.
    """
    return jnp.stack([_checksum(leaf) for leaf in leaves]) if leaves else jnp.zeros(0, jnp.uint32)


def _checksum(leaf: Any) -> Any:
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    bits = jax.lax.bitcast_convert_type(leaf, kinds[leaf.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)

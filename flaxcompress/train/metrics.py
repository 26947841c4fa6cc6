"""What a run measures, written down as it goes: JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

FILE = "metrics.jsonl"
TIMES = ("seconds", "waiting", "saving")  # values that add up over steps


class Sink(Protocol):
    """A place where values by step go."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Notes the values of a step."""

    def back_to(self, step: int) -> None:
        """Forgets `step` and all steps after it."""

    def close(self) -> None:
        """Finishes writing."""


class Metrics:
    """Writes values by step; a context manager.

    A step before the last one written means that the run went back, or was taken up from a checkpoint: what was written
    of that step and later ones is dropped, so that every step is there once.

    Args:
      folder: where metrics.jsonl, tensorboard/ and wandb/ are written.
      tensorboard: also for TensorBoard.
      wandb: a project of Weights & Biases, where the values go too.
      settings: what such a project shows of a run beside its values.

    Raises ValueError where tensorboardX or wandb is asked for and not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        tensorboard: bool = False,
        wandb: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = JsonLines(folder / FILE)
        self._last = lines.last
        self._sinks: list[Sink] = [lines]
        if tensorboard:
            self._sinks.append(TensorBoard(folder / "tensorboard"))
        if wandb is not None:
            self._sinks.append(WeightsAndBiases(folder, wandb, settings or {}))
        self._resumed = self._last is not None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Notes the values of a step; several calls may add to one step, as long as no later one came in between."""
        if self._last is not None and (step < self._last or (self._resumed and step == self._last)):
            for sink in self._sinks:
                sink.back_to(step)
        self._resumed, self._last = False, step
        plain = {name: float(value) for name, value in values.items()}
        for sink in self._sinks:
            sink.write(step, plain)


class JsonLines:
    """A line {"step": …, name: value, …} for each call; numbers that are not finite are null, as JSON has none.

    Attributes:
      last: the last step in the file; None where there is none.
    """

    def __init__(self, path: Path):
        self._path = path
        kept = list(_whole_lines(path))
        self.last = kept[-1]["step"] if kept else None
        self._rewrite(kept)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line."""
        line = {"step": step, **{name: v if math.isfinite(v) else None for name, v in values.items()}}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def back_to(self, step: int) -> None:
        """Drops the lines of `step` and later ones."""
        self._file.close()
        self._rewrite([line for line in _whole_lines(self._path) if line["step"] < step])

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        handle, name = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(name, 0o666 & ~mask)
            os.replace(name, self._path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        self._file: IO[str] = self._path.open("a", encoding="utf-8")


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines up to the first that is torn: a killed run may leave half a line at the end."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                return
            if not isinstance(found, dict) or not isinstance(found.get("step"), int):
                return
            yield found


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, those of one step put together."""
    out: list[dict[str, Any]] = []
    for line in _whole_lines(Path(folder) / FILE):
        if out and out[-1]["step"] == line["step"]:
            out[-1] |= line
        else:
            out.append(line)
    return out


class TensorBoard:
    """Event files, by tensorboardX."""

    def __init__(self, folder: Path):
        try:
            import tensorboardX  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError("metrics: files for TensorBoard need tensorboardX: pip install tensorboardX") from None

        def new_file(**options: Any) -> Any:
            number = len(list(folder.glob("events.*")))  # names hold the second alone: one could replace another
            return tensorboardX.SummaryWriter(str(folder), filename_suffix=f".{number}", **options)

        self._open = new_file
        self._writer = new_file()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to every curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def back_to(self, step: int) -> None:
        """Tells TensorBoard to hide what it has of `step` and later ones."""
        self._writer.close()
        self._writer = self._open(purge_step=step)

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of a project; its id is kept in the folder, so that a resumed run goes on there."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError(f"metrics: project {project!r} of Weights & Biases needs: pip install wandb") from None
        kept = folder / "wandb-run"
        known = kept.read_text("utf-8").strip() if kept.exists() else None
        self._run = wandb.init(project=project, id=known, resume="allow", config=dict(settings), dir=str(folder))
        kept.write_text(f"{self._run.id}\n", "utf-8")
        # Its own count of steps cannot go back; a metric called "step" can.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the values."""
        self._run.log({"step": step, **values})

    def back_to(self, step: int) -> None:
        """Nothing is taken back there: later points of a step stand beside earlier ones."""

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()

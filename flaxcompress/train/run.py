"""A training run from its settings: data, model, objective and mesh, `fit`, and what is left in the folder."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from flaxcompress.config.yaml_file import read_yaml
from flaxcompress.data.batches import PlannedBatches
from flaxcompress.data.frame import whole_tokenizer
from flaxcompress.folder import save
from flaxcompress.model import Model
from flaxcompress.storage import write_files
from flaxcompress.train.cluster import same_everywhere
from flaxcompress.train.config import FILE, TrainConfig
from flaxcompress.train.fit import fit
from flaxcompress.train.loop import Watch
from flaxcompress.train.mesh import make_mesh, parse_mesh
from flaxcompress.train.metrics import Metrics, read_metrics
from flaxcompress.train.objectives import Distill
from flaxcompress.train.outputs import Outputs
from flaxcompress.train.report import TrainReport
from flaxcompress.train.task_model import make_model
from flaxcompress.train.throughput import peak_of
from flaxcompress.train.watch import ShapedBatches, Watcher

_PROFILED = 10  # steps
_SAME = ("steps", "accumulate", "remat", "unroll", "dtype", "memory_limit", "ema", "spike", "save_every")
_SAME += ("keep_last", "keep_best", "evaluate_every", "best", "best_mode", "take_best", "patience")


def run(
    config: TrainConfig, *, allow_changes: bool = False, progress: bool = False, profile: bool = False
) -> TrainReport:
    """Trains as the settings say, or goes on where an earlier run in `config.out` stopped; saves model and report.

    The folder then holds config.yaml, metrics.jsonl, checkpoints/, model/, report.json and report.html.

    Args:
      allow_changes: goes on although settings differ from those of the earlier run.
      profile: writes a trace of some steps, for TensorBoard or Perfetto, to profile/.

    Raises:
      ValueError: settings that do not go together, data that do not fit, or changed settings.
      FileNotFoundError: no such data or model.
      Stopped, FloatingPointError: see `fit`.
    """
    writes = jax.process_index() == 0
    with Outputs(config.out, writes=writes) as outputs:
        same_everywhere(functools.partial(_begin, outputs, config, allow_changes))
        data, training, key = config.task_data, config.training, jax.random.key(config.training.seed)
        mesh = _mesh(config)
        model = make_model(config, data, outputs.folder, key=jax.random.fold_in(key, 0))
        objective = config.task.objective(training.z_loss)
        if isinstance(objective, Distill):
            _check_teacher(objective.teacher, model)
        batches = ShapedBatches(data.train(model.assets, model.config))
        validation = None
        if config.data.validates:
            validation = _passes(data.validation(model.assets, model.config), training.validation_batches)
        outputs.copy()
        with contextlib.ExitStack() as stack:
            metrics = stack.enter_context(_metrics(config, outputs.folder)) if writes else None
            watcher = Watcher(
                metrics,
                batches,
                model.config,
                rates=config.optimizer.learning_rates(training.steps),
                steps=training.steps,
                every=config.metrics.every,
                peak=peak_of(jax.devices(), measure=config.metrics.measure_peak),
                teacher=objective.teacher.config if isinstance(objective, Distill) else None,
            )
            trace = stack.enter_context(_Trace(outputs.folder / "profile", training.steps)) if profile else None
            trained = fit(
                model,
                objective,
                batches,
                key=jax.random.fold_in(key, 1),
                mesh=mesh,
                out=config.out,
                optimizer=config.optimizer,
                trainable=config.trainable,
                validation=validation,
                watch=_all(watcher, trace, lambda step, values: outputs.copy_now_and_then()),
                label=config.task.name,
                progress=progress,
                **{name: getattr(training, name) for name in _SAME},
            )
        devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
        report = TrainReport.of(trained, read_metrics(outputs.folder), config=config.resolved(), devices=devices)
        if writes:
            save(trained, outputs.folder / "model", report=report, overwrite=True)
            files = {"report.json": json.dumps(report.to_json(), indent=2) + "\n", "report.html": report.to_html()}
            write_files(outputs.folder, files)
        return report


def _check_teacher(teacher: Model, model: Model) -> None:
    theirs, ours = teacher.config.vocabulary, model.config.vocabulary
    if theirs != ours or (teacher.assets.has_tokenizer and _pieces(teacher) != _pieces(model)):
        raise ValueError(
            f"task/teacher: teacher ({theirs} tokens) and student ({ours}) need the same tokenizer; set it to the "
            "teacher's folder"
        )


def _pieces(model: Model) -> dict[str, int]:
    return whole_tokenizer(model.assets).get_vocab(with_added_tokens=True)


def _begin(outputs: Outputs, config: TrainConfig, allow_changes: bool) -> None:
    """Compares the settings with those of a run that begun in the folder, and writes them there."""
    path = outputs.folder / FILE
    if not outputs.begun:  # what is left of a run that failed at once does not bind this one
        shutil.rmtree(outputs.folder / "tokenizer", ignore_errors=True)
    elif path.is_file() and (changed := config.changed(read_yaml(path))) and not allow_changes:
        raise ValueError(
            f"{config.out}: the run there has other settings: {'; '.join(changed)}. Go on with the old ones, "
            "choose another out, or add --allow-config-change"
        )
    write_files(outputs.folder, {FILE: config.to_yaml()})


def _mesh(config: TrainConfig) -> Mesh | None:
    """The mesh that the settings name; all devices in "data" where they name none, and none for a single device."""
    if config.mesh is not None:
        sizes: dict[str, Any] = parse_mesh(config.mesh)
        return make_mesh(**sizes)
    return make_mesh(data=jax.device_count()) if jax.device_count() > 1 else None


def _passes(batches: PlannedBatches, limit: int | None) -> Callable[[], Iterator[Mapping[str, Any]]]:
    """A function that gives one pass over the validation data, each time from its start."""
    start = batches.get_state()

    def one_pass() -> Iterator[Mapping[str, Any]]:
        batches.set_state(start)
        return itertools.islice(batches, limit)

    return one_pass


def _metrics(config: TrainConfig, folder: Path) -> Metrics:
    wanted = config.metrics
    return Metrics(folder, tensorboard=wanted.tensorboard, wandb=wanted.wandb, settings=config.resolved())


def _all(*watchers: Watch | None) -> Watch:
    def watch(step: int, values: Mapping[str, float]) -> str | None:
        notes = [watcher(step, values) for watcher in watchers if watcher is not None]
        return next((note for note in notes if note), None)

    return watch


@dataclasses.dataclass
class _Trace:
    """Has JAX trace some steps, once the first ones, which compile, are over."""

    folder: Path
    steps: int
    seen: int = 0
    running: bool = False

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        if "loss" not in values:
            return
        self.seen += 1
        if self.seen == min(3, max(1, self.steps // 2)):
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        elif self.running and self.seen > _PROFILED + 3:
            self.__exit__()

    def __enter__(self) -> _Trace:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False

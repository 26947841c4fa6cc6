"""Running a recipe on a model's files, one layer in memory at a time."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxcompress import storage, tree
from flaxcompress.compress.layer_step import LayerStep
from flaxcompress.compress.layer_store import LayerStore
from flaxcompress.compress.recipe import Recipe
from flaxcompress.compress.run import calibrated
from flaxcompress.compress.step import Context, Step, known_steps
from flaxcompress.compress.work import leave_unused, work_folder
from flaxcompress.config import ModelConfig
from flaxcompress.data import CalibrationText, calibration_text
from flaxcompress.evaluate import Report, profile
from flaxcompress.families import CHECKPOINTS
from flaxcompress.folder import open_model, resolve, write_companions
from flaxcompress.formats import nbytes
from flaxcompress.model import Model, abstract_flat
from flaxcompress.progress import progress_bar

Entries = dict[str, dict[str, Any]]  # {group: {"seconds", "bytes", "spectra"}}


def compress_folder(
    name: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    calibration: CalibrationText | Sequence[str | Path] | None = None,
    work: str | Path,
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """Applies a recipe to a model's folder and writes another, as `load`, `compress` and `save` would.

    The weights stay on disk: a step reads a layer, changes it, and writes it to the work folder before it reads the
    next one; of the statistics, too, it holds one layer's. Each step passes through the model once, and reads what the
    step before it wrote. The calibration text's hidden states are in memory beside the layer.

    The report has the seconds that each layer took, and no fidelity: nothing here runs the whole model.

    Args:
      name: a folder, a hub id, or "minilm".
      recipe: of steps that need no more than a layer at a time.
      calibration: as `compress` takes it.
      work: a folder for finished layers, as large as the results of two steps; a call with the same model, recipe and
        text goes on from there. It is removed at the end.
      overwrite: replace an existing folder.

    Raises:
      ValueError: a step that needs the whole model, a checkpoint that is no Hugging Face folder, a model whose layers
        share weights or that has a decoder beside its encoder, and what `load`, `compress` and `save` raise it for.
    """
    start, out = time.perf_counter(), Path(out)
    storage.check_output(out, overwrite=overwrite)
    if any(checkpoint.find(Path(name)) is not None for checkpoint in CHECKPOINTS):
        raise ValueError(f"low memory: {name} is no Hugging Face folder, and is read whole; leave out --low-memory")
    config, weights, assets = open_model(name)
    _check_structure(config)
    model = _abstract(Model(params={}, config=config, assets=assets))
    steps = [_layer_step(step.resolve(model)) for step in recipe.steps]
    recipe.plan(model)
    text = calibration_text(calibration) if recipe.needs and assets.has_tokenizer and config.patches is None else None
    files = storage.weight_files(resolve(name))
    identity = {
        "files": {file.name: storage.file_checksum(file) for file in files},
        "config": config.to_json(),
        "assets": assets.digest,
        "recipe": recipe.to_json(),
        "text": None if text is None else text.digest,
        "by": "layer",
    }
    folder = work_folder(work, identity)
    context = Context(original=model, low_memory=True)
    if text is not None:
        context.calibration = calibrated(model, text, recipe.scrambled)
    begin, done = time.perf_counter(), []
    try:
        stores = _stores(folder, steps, config)
        with progress_bar("layers", sum(len(store.groups) for store in stores), show=progress) as advance:
            for number, (step, store) in enumerate(zip(steps, stores, strict=True)):
                finished = folder / f"step-{number}.json"
                if not finished.is_file():
                    entries = _run(step, store, config, weights, context, advance)
                    with storage.new_file(finished) as part:
                        part.write_text(json.dumps(entries), "utf-8")
                else:
                    advance(len(store.groups), note=step.name)
                done.append(storage.read_json(finished))
                if number + 1 < len(steps) and (folder / f"step-{number + 1}.json").is_file():
                    continue  # its files may be gone already
                if number:
                    stores[number - 1].remove()
                config, weights = store.config, store.weights()
    except ValueError:
        leave_unused(folder)
        raise
    spent = time.perf_counter() - begin
    seconds = time.perf_counter() - start - spent + sum(e["seconds"] for entries in done for e in entries.values())
    small = _abstract(model.replace(config=config))  # pyright: ignore[reportAttributeAccessIssue]
    with storage.new_folder(out, overwrite=overwrite) as part:
        storage.join_tensors(part / storage.WEIGHTS, stores[-1].files)
        size = (part / storage.WEIGHTS).stat().st_size
        report = _report(model, small, recipe, text, steps, stores, done, seconds=seconds, size=size)
        write_companions(small, part, report=report.to_json())
        (part / "report.html").write_text(report.to_html(), "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    return report


def _layer_step(step: Step) -> LayerStep:
    if not isinstance(step, LayerStep):
        known = ", ".join(name for name, kind in sorted(known_steps().items()) if issubclass(kind, LayerStep))
        raise ValueError(
            f"low memory: {step.name} needs the whole model; what works layer by layer: {known}; leave {step.name} out "
            "of the recipe (heal by `flaxcompress train` afterwards), or leave out --low-memory"
        )
    if reason := step.whole():
        raise ValueError(f"low memory: {step.name}: {reason}")
    return step


def _check_structure(config: ModelConfig) -> None:
    if config.decoder is not None:
        raise ValueError("low memory: the model has an encoder and a decoder, which is not read layer by layer yet")
    own = tuple(range(config.layers))
    if shared := [part for part in config.sharing.parts if getattr(config.sharing, part) != own]:
        raise ValueError(
            f"low memory: the layers share their {', '.join(shared)}, so that none comes alone; leave out --low-memory"
        )


def _abstract(model: Model) -> Model:
    """A model of the same structure without weights, its length limit within its positions."""
    limit = min(model.assets.max_length, model.config.positions)
    return Model(
        params=tree.unflatten(abstract_flat(model.config)),
        config=model.config,
        assets=dataclasses.replace(model.assets, max_length=limit),
    )


def _stores(folder: Path, steps: Sequence[Step], config: ModelConfig) -> list[LayerStore]:
    """Where each step's result lies."""
    stores = []
    for number, step in enumerate(steps):
        config = step.plan(config)
        stores.append(LayerStore(folder / f"step-{number}", config))
    return stores


def _run(
    step: LayerStep,
    store: LayerStore,
    config: ModelConfig,
    weights: Mapping[str, Any],
    context: Context,
    advance: Callable[..., None],
) -> Entries:
    """Writes each group that is not there yet, changed or as it was; returns the notes on all."""
    entries: Entries = store.entries()
    context.finished = store.weights() if entries else {}
    advance(len(entries), note=step.name)
    begin = time.perf_counter()
    for group, changes in _all_groups(step.by_layer(config, weights, context), store):
        if group in entries:
            del changes
            continue
        matrices = {a: changes[a] if a in changes else weights[a] for a in store.groups[group]}
        now = time.perf_counter()
        entries[group] = {
            "seconds": now - begin,
            "bytes": sum(map(nbytes, matrices.values())),
            "spectra": list(context.spectra),
        }
        store.write(group, matrices, entries[group])
        begin = now
        del changes, matrices
        context.spectra.clear()
        advance(note=f"{step.name}, {group}")
    return {group: entries[group] for group in store.groups}


def _all_groups(
    changes: Iterator[tuple[str, dict[str, Any]]], store: LayerStore
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a step yields, and then the groups that it left out, unchanged."""
    left = dict.fromkeys(store.groups)
    for group, change in changes:
        left.pop(group)
        yield group, change
        del change  # not held while the next one is made
    yield from ((group, {}) for group in left)


def _report(
    model: Model,
    small: Model,
    recipe: Recipe,
    text: CalibrationText | None,
    steps: Sequence[Step],
    stores: Sequence[LayerStore],
    done: Sequence[Entries],
    *,
    seconds: float,
    size: int,
) -> Report:
    length = min(128, small.config.positions)
    before, after = profile(model, length=length), profile(small, length=length)
    ran = []
    for step, store, entries in zip(steps, stores, done, strict=True):
        counted = profile(_abstract(small.replace(config=store.config)), length=length)  # pyright: ignore[reportAttributeAccessIssue]
        spent = sum(entry["seconds"] for entry in entries.values())
        ran.append({"name": step.name, "params": counted.params, "bytes": counted.bytes, "seconds": spent})
    layers = [
        {"layer": group, "seconds": sum(e[group]["seconds"] for e in done if group in e), "bytes": entry["bytes"]}
        for group, entry in done[-1].items()
    ]
    return Report(
        params={"before": before.params, "after": after.params},
        bytes={"before": before.bytes, "after": size},
        flops_per_token={"before": before.flops_per_token, "after": after.flops_per_token},
        steps=tuple(ran),
        layers=tuple(layers),
        seconds=seconds,
        parts={"before": before.to_json()["parts"], "after": after.to_json()["parts"]},
        spectra=tuple(s for entries in done for entry in entries.values() for s in entry["spectra"]),
        recipe=recipe.to_json(),
        calibration="" if text is None else text.name,
        source=model.assets.source,
    )

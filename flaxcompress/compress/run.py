"""Running a recipe: every step timed, saved for resumption, and measured at the end."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flaxcompress import storage
from flaxcompress.compress.allocate import Allocate
from flaxcompress.compress.answers import Answers
from flaxcompress.compress.calibrate import Calibration, cut, make_batches
from flaxcompress.compress.kept import model_digest
from flaxcompress.compress.recipe import Recipe
from flaxcompress.compress.solve import Solution
from flaxcompress.compress.step import Context
from flaxcompress.compress.structures import Structure
from flaxcompress.compress.trim_vocabulary import follow
from flaxcompress.compress.work import leave_unused, work_folder
from flaxcompress.data import CalibrationText, calibration_text
from flaxcompress.evaluate import Report, compare_vectors, profile
from flaxcompress.evaluate.rates import encode_rates
from flaxcompress.folder import load, tensors_of, write_model
from flaxcompress.model import Model

log = logging.getLogger("flaxcompress")

_TIMED = 128  # held-out texts that are encoded for the report's speed
_NOTES = ("spectra", "healing", "choices", "layers")  # what steps leave in the context for later ones and the report


def compress(
    model: Model,
    recipe: Recipe,
    *,
    calibration: CalibrationText | Sequence[str | Path] | None = None,
    key: jax.Array,
    work: str | Path | None = None,
    statistics: str | Path | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> tuple[Model, Report]:
    """Applies a recipe's steps in order; returns the compressed model and a report on it.

    Args:
      calibration: sentences, or text files, from which statistics are gathered and the model heals; part of them is
        held out to measure fidelity. None takes the docstrings of Python's standard library. A model of images takes
        none: only steps that need no text run on it, and the report has no fidelity.
      key: decides every random choice.
      work: a folder where finished steps and healing checkpoints are kept; a call with the same model, recipe, text and
        key goes on from there.
      statistics: a folder where statistics are kept, for other recipes on the same model and text.
      mesh: devices over which statistics are gathered and healing is spread; None: one.

    Raises:
      ValueError: a step does not fit the model, the checkpoint has no tokenizer, there is too little text, or text for
        a model of images.
    """
    start = time.perf_counter()
    recipe.plan(model)
    text = _text(model, calibration)
    folder = _work_folder(work, model, recipe, text, key)
    context = Context(original=model, work=folder, progress=progress, mesh=mesh)
    if recipe.needs and text is not None:
        context.calibration = calibrated(model, text, recipe.scrambled, statistics=statistics, mesh=mesh)
    small, done, earlier = model, [], 0.0
    try:
        for number, step in enumerate(recipe.steps):
            begin = time.perf_counter()
            small, entry = _run_step(number, step, small, context, jax.random.fold_in(key, number), recipe)
            done.append(entry)
            earlier += max(0.0, entry["seconds"] - (time.perf_counter() - begin))  # steps that an earlier run did
    except ValueError:  # a mistake before anything was finished leaves nothing behind
        if folder is not None:
            leave_unused(folder)
        raise
    length = min(128, small.config.positions)
    before, after = profile(model, length=length), profile(small, length=length)
    report = Report(
        params={"before": before.params, "after": after.params},
        bytes={"before": file_bytes(model), "after": file_bytes(small)},
        flops_per_token={"before": before.flops_per_token, "after": after.flops_per_token},
        fidelity=None if text is None else _fidelity(small, model, text, progress),
        encoded_per_second=None if text is None else encode_rates(model, small, text.held_out[:_TIMED]),
        steps=tuple(done),
        seconds=time.perf_counter() - start + earlier,
        parts={"before": before.to_json()["parts"], "after": after.to_json()["parts"]},
        spectra=tuple(context.spectra),
        healing=tuple(context.healing),
        choices=tuple(context.choices),
        recipe=recipe.to_json(),
        calibration="" if text is None else text.name,
        source=model.assets.source,
    )
    return small, report


def calibrated(
    model: Model,
    text: CalibrationText,
    scrambled: float,
    *,
    statistics: str | Path | None = None,
    mesh: Mesh | None = None,
) -> Calibration:
    """The text as a model's tokens; that of a language model is not scrambled, since its words follow each other."""
    return Calibration(
        text,
        model.assets,
        vocabulary=model.config.vocabulary,
        scrambled=0.0 if model.config.causal else scrambled,
        folder=statistics,
        mesh=mesh,
    )


def predict(
    model: Model,
    recipe: Recipe,
    *,
    calibration: CalibrationText | Sequence[str | Path] | None = None,
    key: jax.Array,
    statistics: str | Path | None = None,
    progress: bool = False,
) -> tuple[Structure, Solution] | None:
    """What a recipe's allocation would choose first, and the loss predicted for it; None for a recipe without one.

    The steps before the allocation are run, nothing after it. Raises as `compress` does.
    """
    text = _text(model, calibration)
    if text is None:
        return None
    context = Context(original=model, progress=progress)
    context.calibration = calibrated(model, text, recipe.scrambled, statistics=statistics)
    small = model
    for number, step in enumerate(recipe.steps):
        if isinstance(step, Allocate):
            return step.predict(small, context, key=jax.random.fold_in(key, number))
        small = step(small, context, key=jax.random.fold_in(key, number))
    return None


def _text(model: Model, calibration: CalibrationText | Sequence[str | Path] | None) -> CalibrationText | None:
    """The text that the steps may read; None for a model of images."""
    if model.config.patches is not None:
        if calibration is not None:
            raise ValueError("compress: a model of images cannot be calibrated on text; leave the calibration text out")
        return None
    if not model.assets.has_tokenizer:
        raise ValueError("compress: the checkpoint has no tokenizer, so nothing can be calibrated or measured")
    return calibration_text(calibration)


def _fidelity(small: Model, model: Model, text: CalibrationText, progress: bool) -> dict[str, Any]:
    held_out = list(text.held_out)
    vectors, reference = (m.encode(held_out, progress=progress) for m in (small, model))
    found = compare_vectors(vectors, reference, data=f"{text.name}, held out")
    if model.config.head == "causal_lm" and small.config.vocabulary == model.config.vocabulary:
        rows = [cut(row, model.assets.max_length) for row in model.assets.tokenize(held_out).ids]
        found["kl_per_token"] = Answers(model, make_batches(rows, size=16, pad=model.config.pad_token)).loss(small)
    return found


def file_bytes(model: Model) -> int:
    """The size that the model's model.safetensors has: tensors, and the header with names, shapes and checksums."""
    tensors = tensors_of(model)
    return storage.file_size(tensors)


def _run_step(number, step, model: Model, context: Context, key, recipe: Recipe) -> tuple[Model, dict[str, Any]]:
    """Runs one step, or takes its result from the work folder."""
    folder = None if context.work is None else context.work / f"step-{number}"
    if folder is not None and folder.is_dir():
        state = storage.read_json(folder / "state.json")
        for name in _NOTES:
            getattr(context, name)[:] = state[name]
        restored = load(folder)
        log.warning("%s: taken from an earlier run", step.name)
        fewer = restored.config.vocabulary != model.config.vocabulary  # its tokenizer is another one, too
        files = restored.assets.files if fewer else model.assets.files
        kept = {"max_length": restored.assets.max_length, "end_tokens": restored.assets.end_tokens, "files": files}
        restored = dataclasses.replace(restored, assets=dataclasses.replace(model.assets, **kept))
        follow(context, model, restored)
        return restored, state["entry"]
    begin = time.perf_counter()
    before, model = model, step(model, context, key=key)
    follow(context, before, model)
    jax.block_until_ready(model.params)
    entry = {
        "name": step.name,
        "params": model.parameters,
        "bytes": model.nbytes,
        "seconds": time.perf_counter() - begin,
    }
    if folder is not None and number + 1 < len(recipe.steps):
        with storage.new_folder(folder) as part:
            write_model(model, part)
            state = {**{name: getattr(context, name) for name in _NOTES}, "entry": entry}
            (part / "state.json").write_text(json.dumps(state), "utf-8")
    return model, entry


def _work_folder(work, model: Model, recipe: Recipe, text: CalibrationText | None, key) -> Path | None:
    if work is None:
        return None
    identity = {
        "model": model_digest(model),
        "assets": model.assets.digest,
        "recipe": recipe.to_json(),
        "text": None if text is None else text.digest,
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }
    return work_folder(work, identity)

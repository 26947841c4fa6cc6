"""`fit`: trains a model of any format on any objective, on one device or a mesh."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flaxcompress.data.batches import Batches
from flaxcompress.encoding import compute_dtype
from flaxcompress.model import Model
from flaxcompress.nn.remat import check_remat
from flaxcompress.train.checkpoint import Checkpoints
from flaxcompress.train.loop import Choose, Evaluation, Limits, Memory, Watch, mean_terms, train
from flaxcompress.train.memory import first_that_fits, parse_bytes, ways
from flaxcompress.train.objectives import Objective, Program
from flaxcompress.train.optimizer import Optimizer
from flaxcompress.train.placement import OneDevice, placement
from flaxcompress.train.state import State
from flaxcompress.train.step import Recipe
from flaxcompress.train.trainable import freeze_model, thaw_model

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def fit(
    model: Model,
    objective: Objective,
    data: Batches,
    *,
    steps: int,
    key: jax.Array,
    mesh: Mesh | None = None,
    out: str | os.PathLike[str] | None = None,
    optimizer: Optimizer | optax.GradientTransformation | None = None,
    trainable: str = ".*",
    original: Model | None = None,
    accumulate: int = 1,
    remat: str = "dots",
    unroll: int = 1,
    dtype: str | None = None,
    memory_limit: int | str | None = None,
    ema: float | None = None,
    spike: float | None = None,
    limits: Limits = Limits(),  # noqa: B008  (a tuple, never changed)
    save_every: int = 1000,
    keep_last: int = 2,
    keep_best: int = 0,
    validation: Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]] | None = None,
    evaluation: Callable[[Model], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    best: str = "loss",
    best_mode: str = "min",
    take_best: bool = False,
    patience: int = 0,
    watch: Watch = lambda step, values: None,
    memory: Memory | None = None,
    label: str = "training",
    progress: bool = False,
) -> Model:
    """Trains for `steps` steps; the model keeps its structure and formats, values change.

    Master weights and optimizer are float32; integer formats are trained through rounding (`formats.fake_quantized`)
    and frozen again at the end. A run that is stopped or killed goes on from `out` when it is started again, with the
    same batches and, on one device in float32, the same bits as one that was not.

    Args:
      objective: `MaskedLM`, `NextToken`, `Classification`, `Distill`, …
      data: endless batches, each this process's share (see `data.Batches`).
      key: draws dropout.
      mesh: from `make_mesh`; None for one device.
      out: a folder (or "gs://…") for checkpoints; None: none are written.
      optimizer: settings, or an optax transformation; None: AdamW as `Optimizer` has it.
      trainable: a pattern of addresses or names of tensors (see `partition`): what it does not match in full stays as
        it is, and has no optimizer state. `flaxcompress.lora.TRAINABLE` is what `with_lora` added.
      original: where it has a quantized matrix unrounded, training starts from that.
      accumulate: microbatches per step; the gradient is the whole batch's.
      remat: what the backward pass computes again: "dots" (all but products with weights), which saves memory and,
        where memory is slow, time; "full" (each layer), or "none".
      unroll: layers of a turn of the loop over layers. All of them make a shallow model faster on a CPU, where a loop's
        gradient copies what it keeps, and take longer to compile.
      dtype: of the computation, "float32" or "bfloat16"; None: as the device likes it.
      memory_limit: bytes of each device, or "12GB", that a step may take: `remat` and `accumulate` are then only where
        the search begins; what fits is found by compiling (see `train/memory.py`).
      ema: the decay of a running average of the weights, which is then evaluated and returned.
      spike: a loss so many standard deviations over its running mean is refused like one that is not finite; None: off.
      limits: when a run goes back to a checkpoint, and when it gives up.
      save_every, keep_last, keep_best: steps between checkpoints; how many of the newest and of the best stay.
      validation: one pass of batches, or a function that gives one; the objective's means over it are measured.
      evaluation: model -> metrics, measured with `validation`.
      evaluate_every: steps between evaluations; 0: at the end only.
      best, best_mode: the metric that decides which checkpoint is best, and whether it should be "min" or "max".
      take_best: returns the best checkpoint's model, not the last one's.
      patience: the run ends after so many evaluations in a row that were no better than the best; 0: never early.
      watch: called with (steps done, values), see `train`.
      memory: what a caller wants kept in checkpoints.
      label, progress: of the progress bar.

    Raises:
      ValueError: settings that do not go together, or a checkpoint in `out` of another model.
      Stopped: SIGINT or SIGTERM; the state was saved first.
      FloatingPointError: too many steps were refused in a row.
    """
    check_remat(remat)
    _check(steps=steps, accumulate=accumulate, unroll=unroll, save_every=save_every, keep_last=keep_last)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"fit: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if best_mode not in ("min", "max"):
        raise ValueError(f"fit: best_mode must be 'min' or 'max', got {best_mode!r}")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"fit: ema must lie between 0 and 1, got {ema}")
    if (take_best or keep_best) and (out is None or (validation is None and evaluation is None)):
        raise ValueError("fit: the best model is chosen among checkpoints; give out= and validation= or evaluation=")
    if patience and (not evaluate_every or (validation is None and evaluation is None)):
        raise ValueError("fit: patience counts evaluations; give evaluate_every and validation= or evaluation=")
    split, constants = objective.split()
    computed = compute_dtype() if dtype is None else DTYPES[dtype]
    terms = Program(split, model.config, computed, remat, unroll)
    optimizer = optimizer or Optimizer()
    transformation = optimizer.build(steps) if isinstance(optimizer, Optimizer) else optimizer
    recipe = Recipe(terms, transformation, accumulate, ema, spike)
    place = placement(mesh, model.config)
    choose = None if memory_limit is None else _chooser(recipe, remat, parse_bytes(memory_limit))
    measure = None
    if validation is not None or evaluation is not None:
        measure = _evaluation(model, terms, constants, validation, evaluation, place)
    folder = None if out is None else _checkpoint_folder(out)
    keeper = None if folder is None else Checkpoints(folder, keep_last=keep_last, keep_best=keep_best)
    sign = 1.0 if best_mode == "min" else -1.0
    try:
        params = train(
            thaw_model(model, original, trainable),
            data,
            recipe,
            steps=steps,
            choose=choose,
            constants=constants,
            key=key,
            trainable=trainable,
            place=place,
            checkpoints=keeper,
            save_every=save_every,
            evaluation=measure,
            evaluate_every=evaluate_every,
            best=(lambda found: sign * _named(found, best)) if keep_best or take_best or patience else None,
            take_best=take_best,
            patience=patience,
            limits=limits,
            watch=watch if jax.process_index() == 0 else lambda step, values: None,
            memory=memory,
            label=label,
            progress=progress,
        )
    finally:
        if keeper is not None:
            keeper.__exit__()
    return freeze_model(params, model)


def _chooser(recipe: Recipe, remat: str, limit: int) -> Choose:
    """Picks the way of making `recipe`'s step that fits the memory."""

    def choose(rows: int, place: OneDevice, state: State, *inputs: Any) -> Recipe:
        tried = ways(remat, recipe.accumulate, rows)
        recipes = [
            dataclasses.replace(recipe, terms=dataclasses.replace(recipe.terms, remat=kind), accumulate=parts)  # pyright: ignore[reportArgumentType]
            for kind, parts in tried
        ]
        names = [f"remat {kind} and {parts} microbatches" for kind, parts in tried]
        return first_that_fits(recipes, names, limit, place, state, *inputs)

    return choose


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"fit: {name} must be at least 1, got {value}")


def _checkpoint_folder(out: str | os.PathLike[str]) -> str:
    text = os.fspath(out)
    return f"{text.rstrip('/')}/checkpoints" if "://" in text else str(Path(text) / "checkpoints")


def _named(found: Mapping[str, float], name: str) -> float:
    if name not in found:
        raise ValueError(f"fit: best={name!r} is not measured; there are {', '.join(sorted(found))}")
    return found[name]


def _evaluation(model, terms, constants, validation, evaluation, place) -> Evaluation:
    means = None if validation is None else mean_terms(terms, constants, validation, place)

    def measure(params: Any) -> dict[str, float]:
        found = {} if means is None else dict(means(params))
        if evaluation is not None:
            found |= evaluation(freeze_model(place.gather(params), model))
        return found

    return measure

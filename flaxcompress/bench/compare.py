"""The comparison of forward passes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from flaxcompress import storage
from flaxcompress.bench.batch import make_batch, make_single
from flaxcompress.bench.cold_start import in_process_of_its_own
from flaxcompress.bench.encode import encode_all
from flaxcompress.bench.ours import Flax
from flaxcompress.bench.pytorch import Torch
from flaxcompress.bench.result import BenchResult, Contestant
from flaxcompress.bench.rounds import interleaved, quartiles
from flaxcompress.bench.runtimes import OWN, RIVALS, installed
from flaxcompress.bench.threads import torch_threads
from flaxcompress.config import closest
from flaxcompress.evaluate.report import versions
from flaxcompress.folder import resolve
from flaxcompress.machine import cores
from flaxcompress.progress import progress_bar


def bench(
    models: Sequence[str | Path],
    *,
    against: Sequence[str] = ("torch",),
    batch: int = 32,
    length: int = 128,
    rounds: int = 20,
    encode: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> BenchResult:
    """Times the forward pass of models against other runtimes on the same ids and mask.

    In PyTorch a Hugging Face folder runs as the stock model with SDPA attention, a folder of ours as its own
    modeling_flaxcompress.py. A runtime that is not installed is left out, with a note that says how to install it.

    Args:
      models: folders, hub ids or "minilm".
      against: rivals, of `RIVALS`.
      batch: B, sentences in the batch; their lengths lie between T/2 and T, padded to T.
      length: T.
      rounds: how often every contestant is timed.
      encode: also compares `Model.encode` with sentence-transformers on this many of Python's docstring sentences.
      seed: of the random ids and lengths.

    Raises:
      ValueError: no models, an unknown rival, sizes below 1, more tokens than a model has positions.
      FileNotFoundError: no such model.
      RuntimeError: the process that takes cold start and memory failed.
    """
    _check_arguments(models, against, batch=batch, length=length, rounds=rounds, encode=encode)
    present, notes = installed(against)
    busy, count = os.getloadavg()[0], cores()
    if busy > count / 2:
        notes.append(f"the machine was busy (load {busy:.1f} on {count} cores): measure again when it is idle")
    folders = {str(name): resolve(name) for name in models}
    own = {name: Flax(folder) for name, folder in folders.items()}
    vocabulary = min(one.model.config.vocabulary for one in own.values())
    for name, one in own.items():
        if length > one.model.config.positions:
            raise ValueError(
                f"bench: {name} has {one.model.config.positions} positions, so a length of {length} does not fit; "
                f"add --length {one.model.config.positions}"
            )
    shapes = {"batch": batch, "length": length, "vocabulary": vocabulary, "seed": seed}
    who = [(name, OWN) for name in folders] + [(name, rival) for rival in present for name in folders]
    baseline = next((i for i, (_, runtime) in enumerate(who) if runtime != OWN), 0)
    with progress_bar("bench", 2 * len(who) + rounds, show=progress) as advance:
        cold = []
        for name, runtime in who:
            cold.append(in_process_of_its_own(runtime, folders[name], shapes))
            advance(note=f"{name}, cold start")
        with torch_threads(bool(present)) as threads:
            runners = [own[name] if runtime == OWN else Torch(folders[name]) for name, runtime in who]
            full, single = make_batch(**shapes), make_single(vocabulary, length, seed)
            inputs = [(runner.prepare(*full), runner.prepare(*single)) for runner in runners]
            states = []
            for runner, (many, one) in zip(runners, inputs, strict=True):
                for _ in range(2):  # compile, then let caches and thread pools settle
                    runner(many)
                    runner(one)
                states.append(runner.states(many))
                advance(note="warm-up")
            timed = interleaved(runners, inputs, rounds, advance)
    contestants = []
    for i, (name, runtime) in enumerate(who):
        seconds = np.array(timed.forward[i])
        reference = states[who.index((name, OWN))]
        contestants.append(
            Contestant(
                model=name,
                runtime=runtime,
                median_ms=float(np.median(seconds)) * 1e3,
                tokens_per_second=batch * length / float(np.median(seconds)),
                speed=quartiles(np.array(timed.forward[baseline]) / seconds),
                latency_p50_ms=float(np.percentile(timed.single[i], 50)) * 1e3,
                latency_p95_ms=float(np.percentile(timed.single[i], 95)) * 1e3,
                **cold[i],
                bytes=sum(file.stat().st_size for file in storage.weight_files(folders[name])),
                joules_per_1000=None if timed.joules is None else timed.joules[i] / (rounds * batch) * 1000,
                difference=None if runtime == OWN else float(np.abs(states[i] - reference)[full[1]].max()),
            )
        )
    encoded, more = encode_all(folders, own, encode, rounds, progress)
    if any(one.joules_per_1000 is None for one in contestants):
        notes.append("energy: this machine does not let it be read")
    return BenchResult(
        batch=batch,
        length=length,
        rounds=rounds,
        latency_length=single[0].shape[1],
        threads=threads,
        device=own[next(iter(own))].device,
        baseline=" ".join(who[baseline]),
        contestants=tuple(contestants),
        encode=encoded,
        notes=(*notes, *more),
        versions=_versions(),
    )


def _check_arguments(models: Sequence[Any], against: Sequence[str], **sizes: int) -> None:
    if not models:
        raise ValueError("bench: no model is given; name at least one folder, hub id, or minilm")
    if len({str(name) for name in models}) < len(models):
        raise ValueError(f"bench: a model is named twice: {', '.join(map(str, models))}")
    for rival in against:
        if rival not in RIVALS:
            raise ValueError(f"bench: unknown runtime {rival!r} to compare with; {closest(rival, RIVALS)}")
    for name, value in sizes.items():
        least = 0 if name == "encode" else 1
        if value < least:
            raise ValueError(f"bench: {name} must be at least {least}, got {value}")


def _versions() -> dict[str, str]:
    found = versions()
    for package in ("torch", "transformers", "sentence-transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found

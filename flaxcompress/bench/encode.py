"""The comparison of whole encoders, tokenizing included."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import util
from pathlib import Path

import numpy as np

from flaxcompress.bench.ours import Flax
from flaxcompress.bench.pytorch import sentence_transformer
from flaxcompress.bench.result import EncodeResult
from flaxcompress.bench.rounds import PAUSE, quartiles
from flaxcompress.bench.runtimes import INSTALL
from flaxcompress.bench.threads import torch_threads
from flaxcompress.data.calibration import calibration_text
from flaxcompress.model import Model
from flaxcompress.progress import progress_bar


def bench_encode(
    model: Model,
    reference_folder: str | Path,
    sentences: Sequence[str],
    rounds: int = 5,
    *,
    name: str = "",
    batch_size: int = 32,
    progress: bool = False,
) -> EncodeResult:
    """Times `Model.encode` against sentence-transformers' `encode` of `reference_folder`, interleaved, warm.

    Args:
      sentences: what both encode, in batches of `batch_size`.
      rounds: how often each encodes all of them; one more pass of each comes first and is not counted.

    Raises:
      ValueError: no sentences, or rounds below 1.
      ImportError: sentence-transformers is not installed.
    """
    if not sentences or rounds < 1:
        raise ValueError(f"bench_encode: needs sentences and rounds, got {len(sentences)} and {rounds}")
    sentences = list(sentences)
    rival = sentence_transformer(Path(reference_folder))

    def ours() -> np.ndarray:
        return model.encode(sentences, batch_size=batch_size)

    def theirs() -> np.ndarray:
        return rival.encode(sentences, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)

    with progress_bar("bench encode", rounds + 1, show=progress) as advance, torch_threads(True):
        start = time.perf_counter()
        vectors = ours()
        first = time.perf_counter() - start
        difference = float(np.abs(vectors - theirs()).max())
        advance()
        seconds: tuple[list[float], list[float]] = ([], [])
        for number in range(rounds):
            for i in (0, 1) if number % 2 == 0 else (1, 0):
                time.sleep(PAUSE)
                start = time.perf_counter()
                (ours, theirs)[i]()
                seconds[i].append(time.perf_counter() - start)
            advance()
    return EncodeResult(
        model=name or str(reference_folder),
        n=len(sentences),
        rounds=rounds,
        median_seconds=float(np.median(seconds[0])),
        rival_median_seconds=float(np.median(seconds[1])),
        speed=quartiles(np.array(seconds[1]) / np.array(seconds[0])),
        first_seconds=first,
        difference=difference,
    )


def encode_all(
    folders: dict[str, Path], own: dict[str, Flax], count: int, rounds: int, progress: bool
) -> tuple[tuple[EncodeResult, ...], list[str]]:
    """`bench_encode` of every model on `count` docstring sentences, and notes on what was left out."""
    if not count:
        return (), []
    if util.find_spec("sentence_transformers") is None:
        return (), [f"encode: left out, since sentence_transformers cannot be imported; install: {INSTALL}"]
    sentences = calibration_text().train[:count]
    notes = [f"encode: there are only {len(sentences):,} docstring sentences"] if len(sentences) < count else []
    results = [
        bench_encode(one.model, folders[name], sentences, max(1, rounds // 4), name=name, progress=progress)
        for name, one in own.items()
    ]
    return tuple(results), notes

"""How fast two models encode the same texts, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from flaxcompress.model import Model

_ROUNDS = 5


def encode_rates(before: Model, after: Model, texts: Sequence[str]) -> dict[str, float]:
    """{"before", "after"}: texts per second of `encode`, the medians of interleaved rounds, compiling left out."""
    texts = list(texts)
    seconds: dict[str, list[float]] = {"before": [], "after": []}
    for number in range(_ROUNDS + 1):
        for name, model in (("before", before), ("after", after)):
            start = time.perf_counter()
            model.encode(texts)
            if number:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
    return {name: len(texts) / statistics.median(found) for name, found in seconds.items()}

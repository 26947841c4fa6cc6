"""What do reading data and writing checkpoints cost a training run?

Masked language modelling with sentence order on docstrings of Python's standard library, float32, by `fit`, in three
ways: batches made beside the steps and checkpoints written in the background (as a run does); without checkpoints; and
without checkpoints on batches that are made beforehand. Rounds of all three alternate; a round's time runs from its
fifth step to its end, when the last checkpoint is on the disk. Two models: ALBERT-mini (4 shared layers of 128, whose
steps are short, so that batches have little time), and a BERT of MiniLM's size, whose checkpoint has 272 MB.

    python experiments/overheads.py --json experiments/overheads.json

Results, 2026-11-23, 2 CPU cores with nothing else on them, medians of 3 rounds (quartiles in brackets):

    model    a step   waiting for data   held up by saving   a save every      checkpoints cost    making batches costs
    mini     0.41 s   under 0.001 %      0.07 %              20 s (50 steps)   0.4 % (0.2, 1.0)    0.9 % (0.6, 0.9)
    minilm   1.46 s   under 0.001 %      0.29 %              29 s (20 steps)   3.5 % (3.4, 5.1)    0.0 % (-1.3, 0.2)

What a checkpoint costs beside being waited for is the cores' time: the step runs on the same two. A run saves every
1,000 steps by default.

Cost: 20 minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CASES = {  # name: (structure, rows, length, steps of a round, steps between checkpoints)
    "mini": (
        {"width": 128, "embedding_width": 64, "layers": 4, "heads": 4, "feed_forward_width": 512, "sharing": "all"},
        *(32, 128, 100, 50),
    ),
    "minilm": (
        {"width": 384, "layers": 6, "heads": 12, "feed_forward_width": 1536, "vocabulary": 30522},
        *(16, 128, 40, 20),
    ),
}
WAYS = ("as a run", "no checkpoints", "no checkpoints, batches made before")


class Clock:
    """Notes when steps end, and what `fit` says that they waited for."""

    def __init__(self):
        self.start, self.waiting, self.saving = 0.0, 0.0, 0.0

    def __call__(self, step: int, values: Any) -> None:
        if step == 5:
            self.start = time.perf_counter()
        elif step > 5 and "waiting" in values:
            self.waiting += values["waiting"]
            self.saving += values["saving"]


def measure(name: str, rounds: int, texts: list[str]) -> dict[str, Any]:
    import jax

    import flaxcompress as fc
    from flaxcompress.data import StepBatches, masked_lm_batches
    from flaxcompress.data.train_tokenizer import train_tokenizer, vocabulary_size

    structure, rows, length, steps, save_every = CASES[name]
    assets = train_tokenizer(texts, "wordpiece", vocabulary=8000, model="encoder", lowercase=True, max_length=length)
    sizes = {"vocabulary": vocabulary_size(assets), **structure}
    config = fc.ModelConfig(**sizes, positions=length, head="pretraining", classes=2)
    model = fc.Model.init(config, key=jax.random.key(0), assets=assets)
    options: dict[str, Any] = {"length": length, "batch_size": rows, "sentence_order": True}
    made = masked_lm_batches(texts, assets, buckets=1, **options, threads=2)
    before = [next(made) for _ in range(16)]
    found: dict[str, Any] = {way: [] for way in WAYS}
    shares: dict[str, list[float]] = {"waiting": [], "saving": []}
    key, optimizer = jax.random.key(1), fc.Optimizer(learning_rate=1e-4)
    for number in range(rounds + 1):  # the first compiles
        for way in WAYS:
            clock, out = Clock(), tempfile.mkdtemp()
            data = StepBatches(lambda step: before[step % len(before)])
            if way != WAYS[2]:
                data = masked_lm_batches(texts, assets, buckets=1, **options, threads=2)
            more: dict[str, Any] = {"out": out, "save_every": save_every} if way == WAYS[0] else {}
            fc.fit(model, fc.MaskedLM(), data, steps=steps, key=key, optimizer=optimizer, watch=clock, **more)
            seconds = time.perf_counter() - clock.start
            shutil.rmtree(out)
            if number:
                found[way].append(seconds)
            if number and way == WAYS[0]:
                shares["waiting"].append(clock.waiting / seconds)
                shares["saving"].append(clock.saving / seconds)
            time.sleep(0.2)
    whole, unsaved, ready = (np.asarray(found[way]) for way in WAYS)
    entry = {
        "model": name,
        "seconds_per_step": float(np.median(whole)) / (steps - 5),
        "waiting_for_data": float(np.median(shares["waiting"])),
        "held_up_by_saving": float(np.median(shares["saving"])),
        "checkpoints_cost": quartiles(whole / unsaved - 1),
        "making_batches_costs": quartiles(unsaved / ready - 1),
        "saves": steps // save_every,
    }
    print(json.dumps(entry), flush=True)
    return entry


def quartiles(values: np.ndarray) -> list[float]:
    """Quarter, median, three quarters."""
    return [round(float(q), 4) for q in np.percentile(values, [25, 50, 75])]


def main() -> None:
    from flaxcompress.data import calibration_text

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES)
    arguments = parser.parse_args()
    sentences = calibration_text().train
    texts = [" ".join(sentences[i : i + 8]) for i in range(0, len(sentences), 8)]
    found = [measure(name, arguments.rounds, texts) for name in arguments.only]
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

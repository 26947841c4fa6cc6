"""How fast is a training step of ALBERT-base's shape on a CPU, beside transformers' in PyTorch, and in how much memory?

12 layers that share one block, embeddings of 128, masked language modelling of 15 % of 8×128 tokens, AdamW, float32,
no dropout (as ALBERT version 2). Both start from the same weights and see the same batches; PyTorch runs transformers'
AlbertForMaskedLM with SDPA attention and fused AdamW. Ours is the step that `fit` runs. Each has a process of its own,
whose resident memory is read at its fullest; rounds alternate between the two. The first two steps of a round do not
count: training never pauses, and a process that was idle for ten seconds finds its memory cold. Ours then takes 3.8,
3.1, 2.7, 2.7, … seconds for a step; PyTorch's steps show nothing that could be told from noise.

transformers computes the logits of all tokens; ours those of the masked ones. `--all-tokens` has ours compute all.

    python experiments/albert_step.py --json experiments/albert_step.json

Result, 2 cores of an Intel Xeon with AVX-512 (`albert_step.json`): 420 tokens/s against 347, 1.19 times (quartiles
1.18 and 1.24), at most 1.19 GB against 3.02 GB; losses agree to 5e-7. With `--all-tokens`
(`albert_step_all_tokens.json`): 1.07 times (1.06 and 1.09), 1.45 GB. What was tried, seconds of a step and temporary
memory: keeping every intermediate result (remat "none") 3.79 and 1.64 GB; computing all but products again ("dots",
the default) 2.51 and 0.56 GB; all but the layers' inputs ("full") 3.09 and 0.24 GB; also keeping products over a
batch 2.58 and 0.68 GB; glibc without mmap 2.49. Writing out the gradient of the cross-entropy took 0.1 s off a step
with all logits. A gradient of the attention core written out, and heads one by one, gained nothing. Seven tenths of
the time are products, at 245 to 295 GFLOP/s by shape (PyTorch's reach 315).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH, LENGTH, MASKED = 8, 128, 0.15
RATE = 1e-4
WARM = 2  # steps of a round that do not count


def batches(vocabulary: int) -> list[dict[str, np.ndarray]]:
    """A few batches; `labels` are those of `label_positions`."""
    rng, found = np.random.default_rng(0), []
    for _ in range(4):
        ids = rng.integers(5, vocabulary, (BATCH, LENGTH), dtype=np.int32)
        few = round(MASKED * LENGTH)
        places = np.sort(np.stack([rng.permutation(LENGTH)[:few] for _ in range(BATCH)]), 1).astype(np.int32)
        labels = np.take_along_axis(ids, places, 1)
        np.put_along_axis(ids, places, 4, 1)
        found.append({"input_ids": ids, "label_positions": places, "labels": labels})
    return found


def checkpoint(folder: Path) -> None:
    """Saves the weights that both start from."""
    import torch
    from transformers import AlbertConfig, AlbertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "embedding_size": 128}
    config = AlbertConfig(vocab_size=30000, num_hidden_layers=12, attention_probs_dropout_prob=0.0, **sizes)
    AlbertForMaskedLM(config).save_pretrained(folder)


def ours(folder: Path, all_tokens: bool) -> Callable[[int], list[float]]:
    import jax
    import optax

    import flaxcompress as fc
    from flaxcompress.train import thaw_model
    from flaxcompress.train.objectives import Program
    from flaxcompress.train.placement import OneDevice
    from flaxcompress.train.step import Recipe
    from flaxcompress.train.trainable import partition

    model = fc.load(str(folder))
    place, optimizer = OneDevice(), optax.adamw(RATE, weight_decay=0.01)
    recipe = Recipe(Program(fc.MaskedLM(), model.config, np.float32, "dots"), optimizer)
    moving, frozen = partition(place.params(thaw_model(model)))
    state, given = place.start(recipe, moving), batches(model.config.vocabulary)
    for batch in given:
        batch["attention_mask"] = np.ones((BATCH, LENGTH), bool)
        if all_tokens:
            labels = np.full((BATCH, LENGTH), -100, np.int32)
            np.put_along_axis(labels, batch.pop("label_positions"), batch["labels"], 1)
            batch["labels"] = labels
    step, key = place.step(recipe, state), jax.random.key(0)
    del model, moving

    def run(steps: int) -> list[float]:
        nonlocal state
        losses = []
        for number in range(steps):
            state, report = step(state, frozen, (), place.batch(given[number % len(given)]), key)
            losses.append(report.loss)
        return [float(loss) for loss in losses]

    return run


def pytorch(folder: Path) -> Callable[[int], list[float]]:
    import torch
    from transformers import AlbertForMaskedLM

    network = AlbertForMaskedLM.from_pretrained(folder, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    given = []
    for batch in batches(network.config.vocab_size):
        labels = np.full((BATCH, LENGTH), -100, np.int64)
        np.put_along_axis(labels, batch["label_positions"].astype(np.int64), batch["labels"].astype(np.int64), 1)
        arrays = {"input_ids": batch["input_ids"].astype(np.int64), "labels": labels}
        given.append({name: torch.from_numpy(array) for name, array in arrays.items()})

    def run(steps: int) -> list[float]:
        losses = []
        for number in range(steps):
            loss = network(**given[number % len(given)]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        return losses

    return run


def work(kind: str, folder: Path, all_tokens: bool) -> None:
    """A worker: a line with a number of steps comes in, a line with what they took goes out."""
    run = ours(folder, all_tokens) if kind == "ours" else pytorch(folder)
    begun = time.perf_counter()
    for line in sys.stdin:
        losses = run(WARM)
        start = time.perf_counter()
        losses += run(int(line))
        seconds, whole = time.perf_counter() - start, time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "since_start": whole, "losses": losses, "peak": peak}), flush=True)


class Worker:
    """A process that runs steps when it is told to."""

    def __init__(self, kind: str, folder: Path, all_tokens: bool):
        command = [sys.executable, __file__, "--work", kind, "--folder", str(folder)]
        command += ["--all-tokens"] if all_tokens else []
        # Huge pages, as `flaxcompress train` asks for; PyTorch, too, is faster with them.
        environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process: Any = subprocess.Popen(command, **pipes, text=True, env=environment)

    def run(self, steps: int) -> dict[str, Any]:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="of a round, beside those that do not count")
    parser.add_argument("--all-tokens", action="store_true", help="ours, too, computes the logits of all tokens")
    parser.add_argument("--work", choices=("ours", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.folder, arguments.all_tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder))
        workers = {kind: Worker(kind, Path(folder), arguments.all_tokens) for kind in ("ours", "torch")}
        first = {kind: worker.run(3) for kind, worker in workers.items()}  # compiles, and warms up
        times: dict[str, list[float]] = {kind: [] for kind in workers}
        for _ in range(arguments.rounds):
            for kind, worker in workers.items():
                time.sleep(0.5)
                last = worker.run(arguments.steps)
                times[kind].append(last["seconds"])
                first[kind]["peak"] = last["peak"]
        for worker in workers.values():
            worker.end()
    ratios = np.asarray(times["torch"]) / np.asarray(times["ours"])
    difference = np.abs(np.asarray(first["ours"]["losses"]) / np.asarray(first["torch"]["losses"]) - 1)
    found = {
        "tokens_per_second": {k: BATCH * LENGTH * arguments.steps / float(np.median(t)) for k, t in times.items()},
        "ratio": float(np.median(ratios)),
        "quartiles": [float(np.quantile(ratios, q)) for q in (0.25, 0.75)],
        "peak_bytes": {kind: each["peak"] for kind, each in first.items()},
        "seconds_until_five_steps_were_done": {kind: each["since_start"] for kind, each in first.items()},
        "largest_relative_difference_of_losses": float(difference.max()),
        "logits": "all tokens" if arguments.all_tokens else "masked tokens",
    }
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

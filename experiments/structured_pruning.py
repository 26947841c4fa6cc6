"""Half the feed-forward and half the heads of all-MiniLM-L6-v2: how fast is what PyTorch then runs, and how good?

Question: leaving out half the heads of every layer and half the channels of every feed-forward network, which way of
choosing them loses least before healing; and, healed, how near is the model to the original, and how much faster is
the saved folder in PyTorch on a CPU than the stock original (SDPA), both in transformers, in interleaved rounds of
32×128 tokens, and of one sentence?

Commands (results are added to experiments/structured_pruning.json):

    export FLAXCOMPRESS_DATA=…    # the folder that holds wikitext2/, multi30k/, ag_news/ and stsb/
    python experiments/structured_pruning.py choose                       # every way of choosing, not healed
    python experiments/structured_pruning.py heal --steps 1500 --out DIR  # the best way, healed, saved
    python experiments/structured_pruning.py speed DIR
    python experiments/structured_pruning.py table

The way is chosen by the cosine on STS-B *train* sentences; dev is only reported. Healing is on train texts of other
sets, without labels. One seed.

Results, 2026-12-01, JAX 0.10.2, PyTorch 2.13, two cores of an Intel Xeon. Before healing, cosines to the original on
STS-B dev and train sentences:

    magnitude, sliced    0.5313  0.5595
    activation, sliced   0.6763  0.7016
    error, sliced        0.6858  0.7117
    magnitude            0.7570  0.7792

The refit is worth more than the choice. The other four ways have not been run on this text; the one that is healed was
taken for the choice's own objective, not from this table. By error, healed for 600 steps (20 minutes on
a core that other work shared): 17.2M parameters of 22.7M, 68.6 MB in float32, half the operations; STS-B dev 0.8605
(the original: 0.8672) at a mean cosine of 0.9019 (train sentences: 0.9140). The saved folder in PyTorch runs 1.78 times
as fast as the stock original on a thread (quartiles 1.71 and 1.86; 511 to 898 ms) and 1.73 times on two (1.60, 1.77);
one sentence of 32 tokens 1.96 times (1.45, 2.17) and 1.61 times (1.44, 1.85). Other work was halted meanwhile.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from results import Results, data, fidelity

RESULTS = Results(__file__)
MIXED = ("multi30k/train.en.gz", "ag_news/train_10k.tsv.gz:text", "wikitext2/train.txt.gz")
WAYS = {
    "magnitude, sliced": {"by": "magnitude", "repair": False},
    "activation, sliced": {"by": "activation", "repair": False},
    "error, sliced": {"by": "error", "repair": False},
    "magnitude": {"by": "magnitude"},
    "activation": {"by": "activation"},
    "gradient": {"by": "gradient"},
    "leverage": {"by": "leverage"},
    "error": {"by": "error"},
}


def compressed(way: dict[str, Any], steps: int) -> tuple[Any, Any, Any]:
    """The original, the model with half its heads and channels, and the report."""
    import jax

    import flaxcompress as fc

    original = fc.load("minilm")
    recipe = fc.Recipe(
        [
            fc.Trim(positions="limit", pooler="unused"),
            fc.PruneHeads(keep=0.5, **way),
            fc.PruneChannels(keep=0.5, **way),
            *([fc.Heal(steps=steps, save_every=250)] if steps else []),
        ]
    )
    texts = [str(data(file)) for file in MIXED]
    small, report = fc.compress(original, recipe, calibration=texts, key=jax.random.key(0), progress=True)
    return original, small, report


def choose(names: list[str]) -> None:
    for name in names or WAYS:
        original, small, _ = compressed(WAYS[name], 0)
        RESULTS.keep(name, fidelity(small, original))


def heal(name: str, steps: int, out: Path) -> None:
    import flaxcompress as fc

    start = time.perf_counter()
    original, small, report = compressed(WAYS[name], steps)
    fc.save(small, out, report=report, overwrite=True)
    ratio = report.flops_per_token["after"] / report.flops_per_token["before"]
    sizes = {"MB": round(report.bytes["after"] / 1e6, 2), "params": report.params["after"], "flops": round(ratio, 3)}
    seconds = round(time.perf_counter() - start)
    RESULTS.keep(f"{name}, {steps} steps", {**fidelity(small, original), **sizes, "seconds": seconds})


def speed(folder: Path, rounds: int, threads: int) -> None:
    import numpy as np
    import torch

    from flaxcompress.bench.pytorch import Torch
    from flaxcompress.bench.rounds import interleaved, quartiles
    from flaxcompress.folder import resolve

    torch.set_num_threads(threads)
    runners = [Torch(resolve("minilm")), Torch(folder)]
    rng = np.random.default_rng(0)
    batch, single = rng.integers(1000, 20_000, (32, 128)), rng.integers(1000, 20_000, (1, 32))
    whole = [one.prepare(batch, np.ones(batch.shape, bool)) for one in runners]
    alone = [one.prepare(single, np.ones(single.shape, bool)) for one in runners]
    inputs = list(zip(whole, alone, strict=True))
    interleaved(runners, inputs, 3, lambda note: None)  # warm
    timed = interleaved(runners, inputs, rounds, lambda note: None)
    entry: dict[str, Any] = {"threads": threads, "rounds": rounds}
    for name, seconds in (("batch of 32x128", timed.forward), ("one of 32", timed.single)):
        ratios = np.asarray(seconds[0]) / np.asarray(seconds[1])
        entry[name] = {key: round(value, 3) for key, value in quartiles(ratios).items()}
        entry[f"{name}, ms"] = [round(1e3 * float(np.median(own)), 2) for own in seconds]
    RESULTS.keep(f"speed in PyTorch, {threads} threads", entry)


def table() -> None:
    print(f"{'':26}{'dev':>9}{'cosine':>9}{'train':>9}{'MB':>8}")
    for name, entry in RESULTS.read().items():
        if "spearman" in entry:
            figures = "".join(f"{entry[key]:9.4f}" for key in ("spearman", "cosine", "train_cosine"))
            print(f"{name:26}{figures}" + (f"{entry['MB']:8.2f}" if "MB" in entry else ""))
        else:
            print(name, entry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("choose").add_argument("names", nargs="*", choices=[*WAYS, []], metavar="WAY")
    heals = commands.add_parser("heal")
    heals.add_argument("--way", choices=list(WAYS), default="error")
    heals.add_argument("--steps", type=int, default=1500)
    heals.add_argument("--out", type=Path, required=True)
    speeds = commands.add_parser("speed")
    speeds.add_argument("folder", type=Path)
    speeds.add_argument("--rounds", type=int, default=15)
    speeds.add_argument("--threads", type=int, default=1)
    commands.add_parser("table")
    options = parser.parse_args()
    if options.command == "choose":
        choose(options.names)
    elif options.command == "heal":
        heal(options.way, options.steps, options.out)
    elif options.command == "speed":
        speed(options.folder, options.rounds, options.threads)
    else:
        table()


if __name__ == "__main__":
    main()

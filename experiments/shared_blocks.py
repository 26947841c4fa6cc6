"""How good is all-MiniLM-L6-v2 with 3 blocks of weights for its 6 layers, healed?

Question: which start is the best for healing of one length, blocks taken from single layers, the mean of two weighted
by their inputs, or that with a low-rank difference for each layer; and how near to the original does a longer healing
come? `recursive_init.py` compares the starts by themselves.

Commands (results are added to experiments/shared_blocks.json):

    export FLAXCOMPRESS_DATA=…    # the folder that holds wikitext2/ and stsb/
    python experiments/shared_blocks.py run --steps 300 stepwise weighted "weighted, deltas of rank 16"
    python experiments/shared_blocks.py run --steps 1500 NAME      # the best of these by cosine on STS-B *train*
    python experiments/shared_blocks.py table

Healing is on WikiText-2 train. Dev sentences are only reported on. One seed.

Results, 2026-11-30, JAX 0.10.2, a core that other work shared (STS-B dev Spearman and cosine; cosine on STS-B train;
the original: 90.9 MB, 0.8672 and 1):

    start                          steps    MB      dev      cosine   train    minutes
    stepwise                         300    68.60   0.8520   0.8523   0.8763   4
    weighted                         300    68.60   0.8271   0.7161   0.7484   3
    weighted, deltas of rank 16      300    71.36   0.8439   0.7697   0.7963   7
    stepwise                       1,500    68.60   0.8602   0.9020   0.9201   (57, of which it stood still for most)

Blocks taken from single layers are the best start for healing by far; that their mean is nearer before healing
(`recursive_init.py`) says nothing. 17.1M of 22.7M parameters are left, 11.7M of them the token table, which nothing was
done to here.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "shared_blocks.json"
TRIM = {"Trim": {"positions": "limit", "pooler": "unused"}}
STARTS: dict[str, dict[str, Any]] = {
    "stepwise": {"initializer": "stepwise"},
    "weighted": {"initializer": "weighted"},
    "weighted, deltas of rank 16": {"initializer": "weighted", "residual_rank": 16},
    "weighted, deltas of rank 64": {"initializer": "weighted", "residual_rank": 64},
    "weighted, cycle": {"initializer": "weighted", "map": "cycle"},
}


def data(name: str) -> Path:
    folder = os.environ.get("FLAXCOMPRESS_DATA")
    if not folder:
        raise SystemExit("set FLAXCOMPRESS_DATA to the folder that holds wikitext2/ and stsb/")
    return Path(folder) / name


def run(names: list[str], steps: int) -> None:
    import jax

    import flaxcompress as fc

    original = fc.load("minilm")
    for name in names:
        heal = [{"Heal": {"steps": steps}}] if steps else []
        share = {"Share": {"sets": 3, **STARTS[name]}}
        recipe = fc.Recipe.from_json({"scrambled": 0.0, "steps": [TRIM, share, *heal]})
        start = time.perf_counter()
        small, report = fc.compress(
            original, recipe, calibration=[data("wikitext2/train.txt.gz")], key=jax.random.key(0), progress=True
        )
        seconds = time.perf_counter() - start
        found = {
            split: fc.evaluate(small, "sts", data=data(f"stsb/{split}.tsv.gz"), reference=original)
            for split in ("dev", "train")
        }
        entry = {
            "steps": steps,
            "parameters": report.params["after"],
            "MB": round(report.bytes["after"] / 1e6, 2),
            "spearman": round(found["dev"]["spearman"], 4),
            "cosine": round(found["dev"]["mean_cosine"], 4),
            "train_spearman": round(found["train"]["spearman"], 4),
            "train_cosine": round(found["train"]["mean_cosine"], 4),
            "seconds": round(seconds),
        }
        results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**results, f"{name}; {steps} steps": entry}, indent=1) + "\n", "utf-8")
        print(name, entry, flush=True)


def table() -> None:
    print(f"{'start; healing':44}{'MB':>7}{'STS-B dev':>11}{'cosine':>9}{'cosine, train':>15}{'seconds':>9}")
    for name, entry in json.loads(RESULTS.read_text("utf-8")).items():
        figures = f"{entry['spearman']:11.4f}{entry['cosine']:9.4f}{entry['train_cosine']:15.4f}{entry['seconds']:9}"
        print(f"{name:44}{entry['MB']:7.2f}{figures}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("names", nargs="+", choices=list(STARTS))
    runs.add_argument("--steps", type=int, default=300, help="of healing")
    commands.add_parser("table")
    options = parser.parse_args()
    if options.command == "run":
        run(options.names, options.steps)
    else:
        table()


if __name__ == "__main__":
    main()

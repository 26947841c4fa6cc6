"""Does choosing bits, ranks, the table's bytes and layers together beat recipes written by hand, at equal size?

Question: `Allocate` for the file sizes that the shipped recipes have, healed as they are, beside what
`minilm_frontier.json` has of them; and, without healing, all kinds of action beside each kind alone, at 10x to 24x.

Commands (results are added to experiments/one_budget.json):

    export FLAXCOMPRESS_DATA=…    # the folder that holds wikitext2/ and stsb/
    python experiments/one_budget.py run balanced small tiny nano "3.9 MB"    # healed, on WikiText-2
    python experiments/one_budget.py kinds 10x 12x 16x 24x              # not healed, on docstrings
    python experiments/one_budget.py table

Calibration text is WikiText-2 train (`run`) or the standard library's docstrings (`kinds`). STS-B dev is only reported
on; "train" are cosines on STS-B train sentences. One seed, 2 CPU cores.

Not run yet.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax

import flaxcompress as fc
from flaxcompress import storage
from flaxcompress.compress import recipe_names
from flaxcompress.folder import tensors_of

HERE = Path(__file__).parent
RESULTS = HERE / "one_budget.json"
KINDS: dict[str, tuple[str, ...]] = {
    "all kinds": ("bits", "rank", "table", "drop", "tie"),
    "bits alone": ("bits",),
    "rank alone": ("rank",),
    "table alone": ("table",),
    "layers alone": ("drop", "tie"),
    "bits and table": ("bits", "table"),
}


def data(name: str) -> Path:
    folder = os.environ.get("FLAXCOMPRESS_DATA")
    if not folder:
        raise SystemExit("set FLAXCOMPRESS_DATA to the folder that holds wikitext2/ and stsb/")
    return Path(folder) / name


def read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}


def keep(name: str, entry: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps({**read(), name: entry}, indent=1) + "\n", "utf-8")
    print(name, entry, flush=True)


def measured(small: fc.Model, report: fc.Report, original: fc.Model, asked: float, seconds: float) -> dict[str, Any]:
    """Sizes, fidelity, and what was chosen."""
    dev = fc.evaluate(small, "sts", data=data("stsb/dev.tsv.gz"), reference=original)
    train = fc.evaluate(small, "sts", data=data("stsb/train.tsv.gz"), reference=original)
    size = storage.file_size(tensors_of(small))
    assert report.fidelity is not None
    return {
        "MB": round(size / 1e6, 3),
        "of_the_size_asked": round(size / asked, 4),
        "spearman": round(dev["spearman"], 4),
        "cosine": round(dev["mean_cosine"], 4),
        "train_cosine": round(train["mean_cosine"], 4),
        "held_out_cosine": round(report.fidelity["mean_cosine"], 4),
        "predicted_loss": round(sum(row["loss"] for row in report.choices), 4),
        "kinds": dict(Counter(row["kind"] for row in report.choices)),
        "seconds": round(seconds),
    }


def compressed(recipe: fc.Recipe, original: fc.Model, asked: float, calibration: Any) -> dict[str, Any]:
    start = time.perf_counter()
    small, report = fc.compress(original, recipe, calibration=calibration, key=jax.random.key(0), progress=True)
    return measured(small, report, original, asked, time.perf_counter() - start)


def run(names: list[str]) -> None:
    """The sizes and the healing of recipes written by hand (shipped, or in minilm_frontier.json), chosen together."""
    original = fc.load("minilm")
    frontier = json.loads((HERE / "minilm_frontier.json").read_text("utf-8"))
    for name in names:
        asked = frontier[name]["MB"] * 1e6
        by_hand = fc.Recipe.load(name) if name in recipe_names() else fc.Recipe.from_json(frontier[name]["recipe"])
        recipe = by_hand.with_target(f"{int(asked)}B", original)
        keep(f"{name}, chosen together", compressed(recipe, original, asked, [data("wikitext2/train.txt.gz")]))


def kinds(targets: list[str]) -> None:
    """Kinds of action alone and together, without healing."""
    original = fc.load("minilm")
    trim = fc.Trim(positions="limit", pooler="unused", dtype="float16")
    for target in targets:
        asked = original.nbytes / float(target.removesuffix("x"))
        for name, actions in KINDS.items():
            try:
                recipe = fc.Recipe([trim, fc.Allocate(target=target, actions=actions)])  # pyright: ignore[reportArgumentType]
                recipe.plan(original)
            except ValueError as error:
                keep(f"{target}, {name}", {"refused": str(error)})
                continue
            keep(f"{target}, {name}", compressed(recipe, original, asked, None))


def table() -> None:
    """Prints what was kept, shipped recipes beside their sizes."""
    frontier = json.loads((HERE / "minilm_frontier.json").read_text("utf-8"))
    print(f"{'configuration':34}{'MB':>7}{'STS-B dev':>11}{'cosine':>9}{'train':>9}{'held-out':>10}  kinds")
    for name, entry in read().items():
        shipped = frontier.get(name.partition(",")[0])
        if shipped:
            print(_line(name.partition(",")[0], shipped))
        print(_line(name, entry) if "MB" in entry else f"{name:34} {entry['refused']}")


def _line(name: str, entry: dict[str, Any]) -> str:
    figures = (f"{entry[key]:{width}.4f}" for key, width in (("spearman", 11), ("cosine", 9), ("train_cosine", 9)))
    kinds = ", ".join(f"{count} {kind}" for kind, count in entry.get("kinds", {}).items())
    return f"{name:34}{entry['MB']:7.2f}{''.join(figures)}{entry['held_out_cosine']:10.4f}  {kinds}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("names", nargs="+")
    commands.add_parser("kinds").add_argument("targets", nargs="+")
    commands.add_parser("table")
    options = parser.parse_args()
    if options.command == "run":
        run(options.names)
    elif options.command == "kinds":
        kinds(options.targets)
    else:
        table()


if __name__ == "__main__":
    main()

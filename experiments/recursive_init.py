"""Which weights should layers share that were trained with their own, and what do low-rank deltas give back?

Question: all-MiniLM-L6-v2 (6 layers) and llama2.c's stories260K (5 layers), tied to 3 blocks by the map "sequence"
(neighbours), every layer with its own norms. How much is left of the model before healing and after, for blocks drawn
at random, taken from one layer ("stepwise"), the mean of their layers, the mean weighted by their inputs on calibration
text, and this with deltas of rank R for each layer (plain and whitened)? Relaxed Recursive Transformers (Bae et al.
2024) found stepwise best where layers are tied strictly, mean with deltas where they are not, both after long training.

Commands (results are added to experiments/recursive_init.json):

    export FLAXCOMPRESS_DATA=…    # the folder that holds models/stories260K and tinystories/
    python experiments/recursive_init.py run minilm
    python experiments/recursive_init.py run stories260K --heal-steps 500
    python experiments/recursive_init.py run minilm --heal-steps 500
    python experiments/recursive_init.py table
    python experiments/recursive_init.py plot          # writes experiments/recursive_init.png

MiniLM is measured by the mean cosine of 600 held-out docstrings' vectors to the original's, and heals by the step
`Heal` on the others (batch 32). stories260K is measured by its perplexity on the last 200 of 2,316 stories, and heals
as it was trained, on the next token of the others (batch 16, 256 tokens, AdamW at 1e-3). Statistics come from the texts
that it heals on. One seed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "recursive_init.json"
SETS, HELD_OUT = 3, 200
RANKS = {"minilm": (16, 64), "stories260K": (4, 16)}
STRICT = ("random", "stepwise", "mean", "weighted")
ORIGINAL = "original"


def variants(name: str) -> dict[str, dict[str, Any]]:
    """{what it is called: settings of `Share`}."""
    small, large = RANKS[name]
    found: dict[str, dict[str, Any]] = {initializer: {"initializer": initializer} for initializer in STRICT}
    found[f"mean + plain deltas, rank {small}"] = {
        "initializer": "mean",
        "residual_rank": small,
        "residual_whitening": False,
    }
    for rank in (small, large):
        found[f"weighted + whitened deltas, rank {rank}"] = {"initializer": "weighted", "residual_rank": rank}
    return found


class MiniLM:
    """Sentence vectors of docstrings."""

    metric = "cosine"

    def __init__(self):
        import flaxcompress as fc

        self.text = fc.calibration_text()
        self.model = fc.load("minilm")
        self.vectors = self.model.encode(list(self.text.held_out))

    def measure(self, model) -> float:
        from flaxcompress.evaluate import compare_vectors

        found = compare_vectors(model.encode(list(self.text.held_out)), self.vectors, data="docstrings")
        return found["mean_cosine"]

    def heal(self, model, context, steps: int, key):
        import flaxcompress as fc

        return fc.Heal(steps=steps)(model, context, key=key)


class Stories:
    """Perplexity of stories."""

    metric = "perplexity"

    def __init__(self):
        import gzip

        import flaxcompress as fc

        folder = Path(os.environ.get("FLAXCOMPRESS_DATA") or "")
        if not (folder / "models").is_dir():
            raise SystemExit("set FLAXCOMPRESS_DATA to the folder that holds models/stories260K and tinystories/")
        with gzip.open(folder / "tinystories/sample_2mib.txt.gz", "rt", encoding="utf-8") as file:
            stories = [story.strip() for story in file.read().split("<|endoftext|>") if story.strip()]
        self.stories, self.held_out = stories[:-HELD_OUT], stories[-HELD_OUT:]
        self.text = fc.CalibrationText(name="stories", train=tuple(self.stories), held_out=())
        self.model = fc.load(folder / "models/stories260K")

    def measure(self, model) -> float:
        import flaxcompress as fc

        return fc.evaluate(model, "lm", data=self.held_out, length=256)["perplexity"]

    def heal(self, model, context, steps: int, key):
        import flaxcompress as fc
        from flaxcompress.data import causal_lm_batches

        data = causal_lm_batches(self.stories, model.assets, length=256, batch_size=16)
        optimizer = fc.Optimizer(learning_rate=1e-3)
        return fc.fit(model, fc.NextToken(), data, steps=steps, key=key, optimizer=optimizer, progress=True)


CHECKPOINTS = {"minilm": MiniLM, "stories260K": Stories}


def run(name: str, heal_steps: int, only: list[str]) -> None:
    import jax

    import flaxcompress as fc
    from flaxcompress.compress import Calibration, Context

    setting = CHECKPOINTS[name]()
    model = setting.model
    record(name, ORIGINAL, {"metric": setting.metric, "bytes": model.nbytes, "before": setting.measure(model)})
    calibration = Calibration(setting.text, model.assets, vocabulary=model.config.vocabulary)
    for variant, settings in variants(name).items():
        if only and variant not in only:
            continue
        context = Context(original=model, calibration=calibration, progress=True)
        start = time.perf_counter()
        small = fc.Share(map="sequence", sets=SETS, **settings)(model, context, key=jax.random.key(0))
        entry = {"bytes": small.nbytes, "before": setting.measure(small)}
        if heal_steps:
            healed = setting.heal(small, context, heal_steps, jax.random.key(1))
            entry |= {"steps": heal_steps, "after": setting.measure(healed)}
        record(name, variant, entry | {"seconds": round(time.perf_counter() - start, 1)})


def record(name: str, variant: str, entry: dict[str, Any]) -> None:
    """Adds what was measured to the results."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results.setdefault(name, {})[variant] = entry
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{name}: {variant}: {entry}", flush=True)


def print_table() -> None:
    for name, entries in json.loads(RESULTS.read_text()).items():
        metric = entries[ORIGINAL]["metric"]
        print(f"\n| {name}, 3 blocks | MB | {metric} | {metric} after healing |\n|---|---|---|---|")
        for variant, entry in entries.items():
            after = f"{entry['after']:.4g} ({entry['steps']} steps)" if "after" in entry else ""
            print(f"| {variant} | {entry['bytes'] / 1e6:.2f} | {entry['before']:.4g} | {after} |")


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = json.loads(RESULTS.read_text())
    figure, grid = plt.subplots(1, len(results), figsize=(6 * len(results), 4), layout="constrained", squeeze=False)
    for axes, (name, entries) in zip(grid[0], results.items(), strict=True):
        original = entries[ORIGINAL]
        names = [variant for variant in entries if variant != ORIGINAL]
        for key, offset in (("before", 0.2), ("after", -0.2)):
            shown = [(place, entries[v][key]) for place, v in enumerate(names) if key in entries[v]]
            if shown:
                places, values = zip(*shown, strict=True)
                axes.barh([-place + offset for place in places], values, height=0.4, label=f"{key} healing")
        axes.axvline(original["before"], color="0.4", linewidth=1, label="original")
        axes.set_yticks([-place for place in range(len(names))], names)
        axes.set(xlabel=original["metric"], title=f"{name}, 3 blocks")
        if original["metric"] == "perplexity":
            axes.set_xscale("log")
        axes.legend(fontsize=8)
    figure.savefig(HERE / "recursive_init.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table", "plot"])
    parser.add_argument("name", nargs="?", choices=list(CHECKPOINTS))
    parser.add_argument("--heal-steps", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="variants by name; by default all")
    arguments = parser.parse_args()
    if arguments.action == "run":
        if arguments.name is None:
            parser.error(f"run: name one of {', '.join(CHECKPOINTS)}")
        run(arguments.name, arguments.heal_steps, arguments.only)
    elif arguments.action == "table":
        print_table()
    else:
        plot()


if __name__ == "__main__":
    main()

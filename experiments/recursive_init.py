"""Which weights should layers share that were trained with their own, and what do low-rank deltas give back?

Question: all-MiniLM-L6-v2 (6 layers) and llama2.c's stories260K (5 layers), tied to 3 blocks by the map "sequence"
(neighbours), every layer with its own norms. How much is left of the model before healing and after, for blocks drawn
at random, taken from one layer ("stepwise"), the mean of their layers, the mean weighted by their inputs on calibration
text, and these with deltas of rank R for each layer (whitened unless said)? Relaxed Recursive Transformers (Bae et al.
2024) found stepwise best where layers are tied strictly, mean with deltas where they are not, both after long training.

Commands (results are added to experiments/recursive_init.json):

    export FLAXCOMPRESS_DATA=…    # the folder that holds models/stories260K and tinystories/
    python experiments/recursive_init.py run minilm
    python experiments/recursive_init.py run stories260K --heal-steps 500
    python experiments/recursive_init.py run minilm --heal-steps 500
    python experiments/recursive_init.py table
    python experiments/recursive_init.py plot          # writes experiments/recursive_init.png

MiniLM is measured by the mean cosine of 200 held-out docstrings' vectors to the original's, and heals by the step
`Heal` on the others (batch 32). stories260K is measured by its perplexity on the last 100 of 2,316 stories, and heals
as it was trained, on the next token of the others (batch 4, 128 tokens, AdamW at 1e-3). Statistics come from the texts
that it heals on. One seed, one core. Cost, on a core of a shared machine: 7 to 120 seconds per variant, 60 to 400 with
healing.

Result (`recursive_init.json`; MiniLM keeps 69.6 of 90.9 MB without deltas, 72.3 with rank 16, 80.3 with rank 64;
stories260K 0.68 of 1.04 MB, 0.77 with rank 4, 0.86 with rank 8); "after" is after 500 steps of healing:

                                  MiniLM, cosine            stories260K, perplexity (original 4.11)
    blocks                        before    after           before    after
    random                        0.154     0.720           1.6e10    23.63
    mean                          0.283     0.854           821.5     9.87
    weighted, ridge 0.01          0.263                     773.9
    weighted, ridge 0.1           0.354                     585.9
    weighted (ridge 1)            0.438     0.877           339.2     9.99
    weighted, ridge 10            0.373                     512.7
    stepwise                      0.412     0.936           57.4      7.36
    mean + plain deltas           0.371     (rank 16)       1440.9    (rank 4)
    mean + deltas                 0.606     0.893 (16)      742.3     (4)
    weighted + deltas             0.666     0.908 (16)      289.9     8.37 (4)
    stepwise + deltas             0.516     0.935 (16)      279.5     7.87 (4)
    weighted + deltas             0.819     (rank 64)
    stepwise + deltas             0.701     (rank 64)       379.9     (8)

Random < mean < weighted < weighted with deltas holds before healing on both, and after it on MiniLM; on stories260K the
weighting gains nothing over the mean once healed (9.99 against 9.87), the deltas do. It takes a large ridge: with a
small one, which makes each map's output best, the whole is hardly better than with the mean. Whitening is most of what
deltas of a low rank are worth. Blocks taken from single layers heal best on both, as in the paper: a mean of layers is
no layer, and 500 steps do not make it one. Deltas of low rank on such blocks gain nothing: only near full rank do they
give the original back.
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
SETS, SENTENCES, STORIES = 3, 200, 100
RANKS = {"minilm": (16, 64), "stories260K": (4, 8)}
STRICT = ("random", "stepwise", "mean", "weighted")
ORIGINAL = "original"


def variants(name: str) -> dict[str, dict[str, Any]]:
    """{what it is called: settings of `Share`}."""
    small, large = RANKS[name]
    found: dict[str, dict[str, Any]] = {initializer: {"initializer": initializer} for initializer in STRICT}
    found |= {f"weighted, ridge {ridge:g}": {"initializer": "weighted", "ridge": ridge} for ridge in (0.01, 0.1, 10.0)}
    plain = {"initializer": "mean", "residual_rank": small, "residual_whitening": False}
    found[f"mean + plain deltas, rank {small}"] = plain
    for initializer in ("mean", "weighted", "stepwise"):
        found[f"{initializer} + deltas, rank {small}"] = {"initializer": initializer, "residual_rank": small}
    for initializer in ("weighted", "stepwise"):
        found[f"{initializer} + deltas, rank {large}"] = {"initializer": initializer, "residual_rank": large}
    return found


class MiniLM:
    """Sentence vectors of docstrings."""

    metric = "cosine"

    def __init__(self):
        import flaxcompress as fc

        self.text = fc.calibration_text()
        self.model = fc.load("minilm")
        self.held_out = list(self.text.held_out[:SENTENCES])
        self.vectors = self.model.encode(self.held_out)

    def measure(self, model) -> float:
        from flaxcompress.evaluate import compare_vectors

        found = compare_vectors(model.encode(self.held_out), self.vectors, data="docstrings")
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
        self.stories, self.held_out = stories[:-STORIES], stories[-STORIES:]
        self.text = fc.CalibrationText(name="stories", train=tuple(self.stories), held_out=())
        self.model = fc.load(folder / "models/stories260K")

    def measure(self, model) -> float:
        import flaxcompress as fc

        return fc.evaluate(model, "lm", data=self.held_out, length=256)["perplexity"]

    def heal(self, model, context, steps: int, key):
        import flaxcompress as fc
        from flaxcompress.data import causal_lm_batches

        data = causal_lm_batches(self.stories, model.assets, length=128, batch_size=4)
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


def load_results() -> dict[str, dict[str, Any]]:
    """{checkpoint: {variant: entry}}, the original first, then in the order of `variants`."""
    results = json.loads(RESULTS.read_text())
    orders = {name: (ORIGINAL, *variants(name)) for name in CHECKPOINTS if name in results}
    return {name: {v: results[name][v] for v in order if v in results[name]} for name, order in orders.items()}


def print_table() -> None:
    for name, entries in load_results().items():
        metric = entries[ORIGINAL]["metric"]
        print(f"\n| {name}, 3 blocks | MB | {metric} | {metric} after healing |\n|---|---|---|---|")
        for variant, entry in entries.items():
            after = f"{entry['after']:.4g} ({entry['steps']} steps)" if "after" in entry else ""
            print(f"| {variant} | {entry['bytes'] / 1e6:.2f} | {entry['before']:.4g} | {after} |")


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = load_results()
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

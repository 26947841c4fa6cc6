"""What does it cost to turn full attention into latent attention, without any training?

Question: a model's quality against the numbers that a cache keeps per token and layer, for
  apart, plain      truncated SVD of every W_K and W_V by itself; the cache keeps both products' inner vectors
  apart, whitened   the same, weighted by the inputs
  joint, plain      `ToLatentAttention(whitening="none")`: one latent for both
  joint, whitened   `ToLatentAttention()`: weighted by inputs, queries and the output's map
and, in models with rotary positions, where joint forms have a shared key of one head's width,
  rotations dropped the last, but what the latent carries loses its positions as it is (as MHA2MLA and TransMLA leave
                    it), instead of getting the mean of its rotations over the distances that the head attends to.
The forms apart keep rotary positions whole, but have to expand and turn all cached keys for every new token.

Command (results are added to experiments/attention_conversion.json):

    export FLAXCOMPRESS_DATA=…    # the folder that holds models/, tinystories/ and stsb/
    python experiments/attention_conversion.py run minilm stories260K babyllama105
    python experiments/attention_conversion.py table
    python experiments/attention_conversion.py plot     # writes experiments/attention_conversion.png

Measured: minilm, mean cosine to the original's vectors of 300 STS-B dev sentences, calibrated on docstrings of Python's
standard library; the two llama2.c checkpoints, perplexity on the last 40 TinyStories, line ends read as spaces,
calibrated on the first 300. Text of the kind that both were trained on, very probably with these stories in it.

Cost: 4.6 minutes of one core for all three.

Results, one seed, no training; columns are cached numbers per token and layer (of minilm, which has no cache, the
numbers between a token and its keys and values), the first that of full attention:

    minilm, cosine              768       384       192        96
    apart, plain                       0.9686    0.8521    0.6952
    apart, whitened                    0.9836    0.8893    0.7251
    joint, plain                       1.00      0.8199    0.6444
    joint, whitened                    1.00      0.9679    0.8586

    stories260K, perplexity      64        48        32        16
    original                   4.40
    apart, plain                         4.76      7.20     26.14
    apart, whitened                      4.58      5.77     13.34
    joint, plain                        64.15     68.36    111.85
    joint, whitened                      4.62      5.34     22.83
    rotations dropped                    9.17     10.83     33.84

    babyllama105, perplexity    128        96        64        32
    original                   2.33
    apart, plain                         2.75      4.76     11.42
    apart, whitened                      2.36      2.53      4.41
    joint, plain                        35.74     34.33     58.69
    joint, whitened                      2.35      2.41      3.94
    rotations dropped                    2.53      2.60      4.45

Without rotary positions one latent for both is better at every size once errors are weighed, and exact at the width of
the model. With them the shared key takes its part of the cache first: of stories260K's 16 numbers it has 8, and the
whitened form apart, which keeps its positions, is better there, and as good at 48. Which pairs keep their positions,
and what stands for the others, has to come from the attention: by the weights alone ("joint, plain") conversion is no
start.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "attention_conversion.json"
MINILM = "minilm"
SHARES = {MINILM: (0.5, 0.25, 0.125), "stories260K": (0.75, 0.5, 0.25), "babyllama105": (0.75, 0.5, 0.25)}
METHODS = ("apart, plain", "apart, whitened", "joint, plain", "joint, whitened", "rotations dropped")


def data(name: str) -> Path:
    folder = os.environ.get("FLAXCOMPRESS_DATA")
    if not folder:
        raise SystemExit("set FLAXCOMPRESS_DATA to the folder that holds models/, tinystories/ and stsb/")
    return Path(folder) / name


def stories() -> list[str]:
    text = gzip.decompress(data("tinystories/sample_2mib.txt.gz").read_bytes()).decode()
    return [" ".join(story.split()) for story in text.split("<|endoftext|>")[:-1]]


def dropping() -> Any:
    """The step, leaving out the mean rotations."""
    from flaxcompress.compress import ToLatentAttention

    class Dropping(ToLatentAttention):
        def _rotations(self, model, context):
            found = super()._rotations(model, context)
            return [each._replace(mean=np.ones_like(each.mean), lost=np.ones_like(each.lost)) for each in found]

    return Dropping


def converted(model: Any, context: Any, method: str, share: float) -> Any:
    """The model with `share` of the numbers that a cache keeps per token and layer."""
    import jax

    from flaxcompress.compress import LowRank, ToLatentAttention

    config = model.config
    half = int(share * config.groups * config.head_dim)
    plain = "none" if method.endswith("plain") else "activation"
    if method.startswith("apart"):
        pattern = r"layers/\d+/attention/(key|value)/kernel"
        step: Any = LowRank(pattern=pattern, rank=half, whitening=plain, allow_larger=True)
    elif method.startswith("joint"):
        step = ToLatentAttention(keep=share, whitening=plain)
    else:
        step = dropping()(keep=share)
    return step(model, context, key=jax.random.key(0))


def vectors(original: Any) -> Callable[[Any], float]:
    """Mean cosine to the original's sentence vectors."""
    lines = gzip.decompress(data("stsb/dev.tsv.gz").read_bytes()).decode().split("\n")[1:301]
    texts = [line.split("\t")[-1] for line in lines]
    want = original.encode(texts)
    return lambda model: float((model.encode(texts) * want).sum(1).mean())


def perplexity(held: list[str]) -> Callable[[Any], float]:
    from flaxcompress.evaluate.tasks.lm import lm

    return lambda model: lm(model, data=held, length=256)["perplexity"]


def run(names: list[str]) -> None:
    import flaxcompress as fc
    from flaxcompress.compress import Calibration, Context

    for name in names:
        model = fc.load(name if name == MINILM else data(f"models/{name}"))
        config = model.config
        if name == MINILM:
            text, length, measure = fc.calibration_text(), 64, vectors(model)
        else:
            told = stories()
            text = fc.CalibrationText(name="TinyStories", train=tuple(told[:300]), held_out=())
            length, measure = 256, perplexity(told[-40:])
        held = Calibration(text, model.assets, vocabulary=config.vocabulary, max_length=length)
        context, whole = Context(original=model, calibration=held), 2 * config.groups * config.head_dim
        rows = [{"method": "original", "numbers": whole, "value": measure(model)}]
        for share in SHARES[name]:
            for method in METHODS if config.rotary is not None else METHODS[:-1]:
                start = time.perf_counter()
                small = converted(model, context, method, share)
                seconds = time.perf_counter() - start
                row = {"method": method, "numbers": int(share * whole), "value": measure(small), "seconds": seconds}
                if small.config.rotary is not None and small.config.rotary.pairs is not None:
                    row["pairs"] = small.config.rotary.pairs
                rows.append(row)
                print(name, row, flush=True)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[name] = rows
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def table() -> None:
    for name, rows in json.loads(RESULTS.read_text()).items():
        sizes = list(dict.fromkeys(row["numbers"] for row in rows))
        found = {(row["method"], row["numbers"]): row["value"] for row in rows}
        print(f"{name:<20}" + "".join(f"{size:>10}" for size in sizes))
        shown = lambda value: "" if value is None else f"{value:.4f}" if value < 1 else f"{value:.2f}"  # noqa: E731
        for method in ("original", *METHODS):
            if any(row["method"] == method for row in rows):
                print(f"{method:<20}" + "".join(f"{shown(found.get((method, size))):>10}" for size in sizes))


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = json.loads(RESULTS.read_text())
    figure, axes = plt.subplots(1, len(results), figsize=(4.2 * len(results), 3.6), squeeze=False)
    for axis, (name, rows) in zip(axes[0], results.items(), strict=True):
        for method in METHODS:
            points = [(row["numbers"], row["value"]) for row in rows if row["method"] == method]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=method)
        axis.axhline(rows[0]["value"], color="grey", linewidth=0.8, label="original")
        axis.set(title=name, xlabel="cached numbers per token and layer")
        axis.set_ylabel("mean cosine" if name == MINILM else "perplexity")
        if name != MINILM:
            axis.set_yscale("log")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(HERE / "attention_conversion.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("names", nargs="+", choices=SHARES)
    commands.add_parser("table")
    commands.add_parser("plot")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.names)
    else:
        {"table": table, "plot": plot}[arguments.command]()


if __name__ == "__main__":
    main()

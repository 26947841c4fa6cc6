"""How much do pruning and rounding lose on trained decoders, by method, without healing?

Question: of the kernels in the layers of two llama2.c checkpoints, half of the weights or 2 of every 4 are left (Wanda
and SparseGPT go through the layers on what the pruned ones before give), or all are stored in few bits in groups of
32, with and without a repair of rank 8. Perplexity on the last 100 of 2,316 TinyStories; statistics come from 256 of
the others. Is the order of the papers there: magnitude, Wanda, SparseGPT; nearest, GPTQ, repaired?

Commands (results are added to experiments/prune_quantize_order.json):

    export FLAXCOMPRESS_DATA=…    # the folder that holds models/stories260K, models/babyllama105 and tinystories/
    python experiments/prune_quantize_order.py run
    python experiments/prune_quantize_order.py table
    python experiments/prune_quantize_order.py plot          # writes experiments/prune_quantize_order.png

Results, 2026-11-30 (MB are the kernels' bytes, float32 values where they are not rounded; half a minute to a minute a
line on a shared core):

                                     stories260K          babyllama105
                                     MB     perplexity    MB     perplexity
    original                         0.906    4.08        3.686   2.28
    50 %  magnitude                  0.482   40.05        1.958   7.89
          magnitude, of all kernels  0.486   72.19        1.962  49.45
          magnitude, of an output    0.482   35.83        1.958  10.44
          Fisher                     0.482   19.06        1.958   5.51
          Fisher, of all kernels     0.485   19.65        1.962  25.27
          Wanda                      0.482   20.03        1.958   8.37
          Wanda, of a matrix         0.482   22.74        1.958   6.56
          SparseGPT                  0.482   18.30        1.958   3.21
          SparseGPT, repaired        0.574   10.13        2.145   2.91
    2:4   magnitude                  0.482  120.35        1.958  33.90
          Wanda                      0.482   65.04        1.958  26.78
          SparseGPT                  0.482   35.11        1.958   4.26
          SparseGPT, repaired        0.574   17.97        2.145   3.62
    4 bits  nearest                  0.128    4.71        0.518   2.43
          nearest, plain repair      0.220    4.45        0.705   2.39
          nearest, whitened repair   0.220    4.34        0.705   2.35
          least error                0.128    4.59        0.518   2.42
          GPTQ                       0.128    4.42        0.518   2.33
          GPTQ, whitened repair      0.220    4.31        0.705   2.32
    3 bits  nearest                  0.100    8.69        0.403   3.11
          nearest, plain repair      0.192    6.53        0.590   2.92
          nearest, whitened repair   0.192    5.59        0.590   2.62
          least error                0.100    6.71        0.403   3.10
          GPTQ                       0.100    5.89        0.403   2.49
          GPTQ, whitened repair      0.192    5.08        0.590   2.45

The order holds at 2:4, in 4 and in 3 bits, and at 50 % on stories260K. On babyllama105 at 50 % Wanda is behind
magnitude, because it takes as much from every output and magnitude does not: among the weights of an output alone
magnitude is worse (10.44), among those of a whole matrix Wanda is better (6.56). Comparing weights of different
matrices by size does harm. A repair of rank 8 is large beside matrices 64 or 128 wide; there 4 bits with GPTQ are the
better use of bytes than 3 bits with a repair.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from pathlib import Path
from typing import Any

import jax

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.compress import Calibration, Context, Step
from flaxcompress.compress.statistics import dense_model
from flaxcompress.data import CalibrationText
from flaxcompress.formats import nbytes

HERE = Path(__file__).parent
RESULTS = HERE / "prune_quantize_order.json"
MODELS = ("stories260K", "babyllama105")
KERNELS = r"layers/\d+/.*/kernel"
HELD_BACK = 100  # stories
SENTENCES = 256


def prune(**settings: Any) -> list[Step]:
    return [fc.Prune(pattern=KERNELS, sentences=SENTENCES, **settings)]


def rounded(bits: int, *more: Step, **settings: Any) -> list[Step]:
    return [fc.Quantize(bits=bits, group=32, pattern=KERNELS, sentences=SENTENCES, **settings), *more]


def repaired(**settings: Any) -> Step:
    return fc.Repair(rank=8, sentences=SENTENCES, **settings)


PANELS: dict[str, dict[str, list[Step]]] = {
    "50 %": {
        "magnitude": prune(sparsity=0.5, by="magnitude"),
        "magnitude, of all kernels": prune(sparsity=0.5, by="magnitude", scope="global"),
        "Fisher": prune(sparsity=0.5, by="fisher"),
        "Fisher, of all kernels": prune(sparsity=0.5, by="fisher", scope="global"),
        "magnitude, of an output": prune(sparsity=0.5, by="magnitude", scope="row"),
        "Wanda": prune(sparsity=0.5),
        "Wanda, of a matrix": prune(sparsity=0.5, scope="matrix"),
        "SparseGPT": prune(sparsity=0.5, by="sparsegpt"),
        "SparseGPT, repaired": [*prune(sparsity=0.5, by="sparsegpt"), repaired()],
    },
    "2:4": {
        "magnitude": prune(n_of_m="2:4", by="magnitude"),
        "Wanda": prune(n_of_m="2:4"),
        "SparseGPT": prune(n_of_m="2:4", by="sparsegpt"),
        "SparseGPT, repaired": [*prune(n_of_m="2:4", by="sparsegpt"), repaired()],
    },
    **{
        f"{bits} bits": {
            "nearest": rounded(bits, rounding="nearest"),
            "nearest, plain repair": rounded(bits, repaired(whitening="none"), rounding="nearest"),
            "nearest, whitened repair": rounded(bits, repaired(), rounding="nearest"),
            "least error": rounded(bits, rounding="mse"),
            "GPTQ": rounded(bits),
            "GPTQ, whitened repair": rounded(bits, repaired()),
        }
        for bits in (4, 3)
    },
}


def data() -> Path:
    folder = os.environ.get("FLAXCOMPRESS_DATA")
    if not folder:
        raise SystemExit("set FLAXCOMPRESS_DATA to the folder that holds models/ and tinystories/")
    return Path(folder)


def stories() -> Path:
    return data() / "tinystories" / "sample_2mib.txt.gz"


def load(name: str) -> tuple[fc.Model, Calibration]:
    """The model, and the stories that are not held back."""
    model = fc.load(data() / "models" / name)
    texts = gzip.decompress(stories().read_bytes()).decode().split("<|endoftext|>")
    text = CalibrationText(
        name="TinyStories", train=tuple(text.strip() for text in texts[: -HELD_BACK - 1]), held_out=()
    )
    return model, Calibration(text, model.assets, vocabulary=model.config.vocabulary, max_length=128)


def perplexity(model: fc.Model) -> float:
    """Of the stories held back; dense, so that one program serves all methods."""
    found = fc.evaluate(dense_model(model), "lm", data=stories(), separator="<|endoftext|>", hold_out=HELD_BACK)
    return found["perplexity"]


def stored(model: fc.Model) -> int:
    """Bytes of the layers' kernels."""
    flat = tree.View(model.params)
    return sum(nbytes(flat[a]) for a in tree.select(flat, KERNELS))


def run(names: list[str], again: bool) -> None:
    held = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    for name in names:
        original, calibration = load(name)
        entry = held.setdefault(name, {})
        entry["original"] = {"perplexity": round(perplexity(original), 3), "bytes": stored(original)}
        for panel, methods in PANELS.items():
            for method, steps in methods.items():
                if f"{panel}; {method}" in entry and not again:
                    continue
                model, context = original, Context(original=original, calibration=calibration)
                for step in steps:
                    model = step(model, context, key=jax.random.key(0))
                found = {"perplexity": round(perplexity(model), 3), "bytes": stored(model)}
                entry[f"{panel}; {method}"] = found
                print(f"{name:14} {panel:8} {method:28} {found['perplexity']:12.3f} {found['bytes']:10}", flush=True)
        RESULTS.write_text(json.dumps(held, indent=1) + "\n", "utf-8")


def table() -> None:
    """Prints the results, a method a line."""
    held = json.loads(RESULTS.read_text("utf-8"))
    print(f"{'':40}" + "".join(f"{name + ', MB':>20}{'perplexity':>12}" for name in held))
    for key in ["original", *(f"{panel}; {method}" for panel, methods in PANELS.items() for method in methods)]:
        cells = (f"{e[key]['bytes'] / 1e6:20.3f}{e[key]['perplexity']:12.2f}" for e in held.values() if key in e)
        print(f"{key:40}" + "".join(cells))


def plot() -> None:
    """Writes experiments/prune_quantize_order.png, a column for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    held = json.loads(RESULTS.read_text("utf-8"))
    size = (6.5 * len(held), 2.2 * len(PANELS))
    figure, panels = plt.subplots(len(PANELS), len(held), figsize=size, layout="constrained", squeeze=False)
    for row, (panel, methods) in zip(panels, PANELS.items(), strict=True):
        for axes, (name, entry) in zip(row, held.items(), strict=True):
            shown = list(methods)[::-1]
            axes.plot([entry[f"{panel}; {method}"]["perplexity"] for method in shown], shown, "o")
            axes.axvline(entry["original"]["perplexity"], color="0.6", linestyle=":")
            axes.set(title=f"{name}, {panel} (dotted: whole)", xlabel="perplexity on held-back stories")
            axes.grid(axis="x", alpha=0.3)
            if "bits" not in panel:
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
    figure.savefig(HERE / "prune_quantize_order.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table", "plot"])
    parser.add_argument("models", nargs="*", default=list(MODELS), help="by default both")
    parser.add_argument("--again", action="store_true", help="measure what has a result, too")
    arguments = parser.parse_args()
    if arguments.action == "run":
        run(arguments.models, arguments.again)
    else:
        (table if arguments.action == "table" else plot)()


if __name__ == "__main__":
    main()

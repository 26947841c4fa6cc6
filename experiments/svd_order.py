"""Does the published order of the low-rank methods hold on small models, at equal bytes, without healing?

Expected from the papers, from worst to best: plain SVD, FWSVD and ASVD, whitened, whitened with allocated ranks, and
methods that cut two maps of a module together. Measured: the mean cosine of all-MiniLM-L6-v2's sentence vectors to the
original's on 200 held-out docstrings of Python's standard library with 60 % of its kernels' values kept; the perplexity
of both llama2.c checkpoints on 100 stories that were held back from calibration, with 80 % kept. The kernels hold the
same number of values in all methods to within 0.9 %, since ranks and widths are whole numbers; tables and biases are
left alone. Calibration: 256 docstrings, or 256 stories cut at 128 tokens.

    export FLAXCOMPRESS_DATA=…    # the folder that holds tinystories/ and models/
    python experiments/svd_order.py run              # results are added to experiments/svd_order.json
    python experiments/svd_order.py table
    python experiments/svd_order.py plot             # writes experiments/svd_order.png

Results, 2026-11-24, JAX 0.10.2, one seed (an empty place was not run):

                                                            minilm 0.6   stories260K 0.8  babyllama105 0.8
    plain SVD                                                    0.460           181.614            10.795
    input PCA                                                                    200.515
    FWSVD                                                        0.638           126.773             8.606
    ASVD                                                         0.604           139.681             9.093
    whitened                                                     0.845            32.726             3.172
    shared bases                                                 0.837            29.315
    shared bases, refitted                                       0.846            27.303
    two-sided                                                                     31.951
    whitened, in sequence                                        0.845            19.038             3.025
    whitened, ranks by energy                                    0.803            28.648             2.413
    whitened, ranks by gradient                                  0.871            32.862
    whitened, ranks by gradient, in sequence                                      13.982
    two-sided, ranks by gradient                                                  27.273
    whitened, ranks by zero sum                                                   31.534
    module-joint                                                 0.886            15.043             3.005
    module-joint, channels by leverage                                            15.102
    joint heads, whitened feed-forward                           0.851            39.454             3.205
    joint heads, whitened feed-forward, in sequence                               25.271
    original                                                     1.000             4.085             2.278

Where the order holds: whitening is worth more than all else, FWSVD and ASVD lie between it and plain SVD (ASVD behind
FWSVD each time), and cutting modules together beats whitening on all three.

Where it fails:
1. Ranks by energy lose to equal ranks on MiniLM. The share of a matrix's own output says nothing of what that output is
   for; weighting by the mean squared gradient of the outputs puts that right there (0.803 to 0.871), but brings nothing
   by itself on stories260K, where energy does.
2. Allocated ranks are not always behind the joint methods: energy beats them on babyllama105, and ranks by gradient,
   fitted in sequence, on stories260K. Fitting in sequence is worth more than allocation there (32.7 to 19.0, beside
   28.6), less on babyllama105 (3.17 to 3.02, beside 2.41), and nothing on MiniLM.
3. What the joint methods gain lies in the feed-forward channels: the same narrower heads beside low-rank feed-forward
   kernels are about as good as whitening alone. Choosing channels one by one or by leverage makes little difference.
4. Ranks by zero sum are hardly better than equal ones: first-order effects are of small changes, which these are not.
5. Bases of pairs of layers gain what their higher ranks allow on stories260K, and next to nothing on MiniLM (0.8457
   beside 0.8450), where without the refit of each layer's coefficients to its own inputs they lose. Fitting in sequence
   is worth more on stories260K. (Measured 2026-11-30.)
6. Projecting inputs on their principal components is worse than plain SVD on stories260K.

Cost: some minutes of one core a model; it was run in pieces, beside other work, and not timed as a whole.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.compress import (
    Calibration,
    Context,
    JointQueryKey,
    JointValueOutput,
    LowRank,
    PruneChannels,
    ShareBasis,
    Step,
)
from flaxcompress.compress.statistics import dense_model
from flaxcompress.data import CalibrationText
from flaxcompress.formats import stored_values
from flaxcompress.model import abstract_flat

HERE = Path(__file__).parent
RESULTS = HERE / "svd_order.json"
KERNELS = r"layers/\d+/.*/kernel"
HELD_BACK = 100  # stories
SENTENCES = 256
TEXTS = 200  # held-out docstrings


def low_rank(**settings: Any) -> Any:
    return lambda model, keep: [LowRank(KERNELS, keep=keep, sentences=SENTENCES, **settings)]


def shared(**settings: Any) -> Any:
    """Bases of neighbouring layers' maps that read the residual stream, the others by themselves, as in the paper."""
    into, out = r"layers/\d+/(.*/(query|key|value|up|gate))/kernel", r"layers/\d+/(.*/(output|down))/kernel"
    return lambda model, keep: [
        ShareBasis(into, keep=keep, sentences=SENTENCES, **settings),
        LowRank(out, keep=keep, sentences=SENTENCES),
    ]


def heads(model: fc.Model, keep: float) -> list[Step]:
    """Narrower heads, by the nearest width that they can have."""
    config = model.config
    pairs = 1 if config.rotary is None else 2
    scored = max(pairs, round(keep * config.query_key_dim / pairs) * pairs)
    width = max(1, round(keep * config.head_dim))
    return [JointQueryKey(width=scored, sentences=SENTENCES), JointValueOutput(width=width, sentences=SENTENCES)]


def left_for_networks(model: fc.Model, keep: float, steps: list[Step]) -> float:
    """The fraction of the feed-forward kernels that brings all kernels to `keep` when heads are cut by some steps."""
    config = model.config
    for step in steps:
        config = step.plan(config)
    before, after = kernels(abstract_flat(model.config)), kernels(abstract_flat(config))
    inner = sum(n for a, n in before.items() if "/feed_forward/" in a)
    return (keep * sum(before.values()) - sum(n for a, n in after.items() if "/attention/" in a)) / inner


def joint(**settings: Any) -> Any:
    def steps(model: fc.Model, keep: float) -> list[Step]:
        cut = heads(model, keep)
        rest = left_for_networks(model, keep, cut)
        return [*cut, PruneChannels(keep=rest, sentences=SENTENCES, **settings)]

    return steps


def joint_heads(**settings: Any) -> Any:
    def steps(model: fc.Model, keep: float) -> list[Step]:
        cut = heads(model, keep)
        rest = left_for_networks(model, keep, cut)
        return [*cut, LowRank(r"layers/\d+/feed_forward/.*/kernel", keep=rest, sentences=SENTENCES, **settings)]

    return steps


METHODS = {
    "plain SVD": low_rank(whitening="none"),
    "input PCA": low_rank(whitening="pca"),
    "FWSVD": low_rank(whitening="fisher"),
    "ASVD": low_rank(whitening="asvd"),
    "whitened": low_rank(),
    "shared bases": shared(refit=False),
    "shared bases, refitted": shared(),
    "two-sided": low_rank(whitening="two_sided"),
    "whitened, in sequence": low_rank(sequential=True),
    "two-sided, in sequence": low_rank(whitening="two_sided", sequential=True),
    "whitened, ranks by energy": low_rank(allocation="energy"),
    "whitened, ranks by gradient": low_rank(allocation="gradient"),
    "whitened, ranks by gradient, in sequence": low_rank(allocation="gradient", sequential=True),
    "two-sided, ranks by gradient": low_rank(whitening="two_sided", allocation="gradient"),
    "two-sided, ranks by gradient, in sequence": low_rank(
        whitening="two_sided", allocation="gradient", sequential=True
    ),
    "whitened, ranks by zero sum": low_rank(allocation="zero_sum"),
    "module-joint": joint(),
    "module-joint, channels by leverage": joint(selection="leverage"),
    "joint heads, whitened feed-forward": joint_heads(),
    "joint heads, whitened feed-forward, in sequence": joint_heads(sequential=True),
}
KEPT = {"minilm": (0.6,), "stories260K": (0.8,), "babyllama105": (0.8,)}


def data() -> Path:
    return Path(os.environ["FLAXCOMPRESS_DATA"])


def stories() -> Path:
    return data() / "tinystories" / "sample_2mib.txt.gz"


def load(name: str) -> tuple[fc.Model, Calibration]:
    """The model and what it is calibrated on: docstrings, or the stories that are not held back."""
    if name == "minilm":
        model = fc.load("minilm")
        return model, Calibration(fc.calibration_text(), model.assets, vocabulary=model.config.vocabulary)
    model = fc.load(data() / "models" / name)
    texts = gzip.decompress(stories().read_bytes()).decode().split("<|endoftext|>")
    train = tuple(text.strip() for text in texts[: -HELD_BACK - 1])
    text = CalibrationText(name="TinyStories", train=train, held_out=())
    return model, Calibration(text, model.assets, vocabulary=model.config.vocabulary, max_length=128)


def quality(name: str, model: fc.Model, original: fc.Model) -> float:
    """Mean cosine to the original's vectors, or perplexity; dense, so that one program serves all methods."""
    model = dense_model(model)
    if name == "minilm":
        texts = list(fc.calibration_text().held_out[:TEXTS])
        return fc.evaluate(model, "fidelity", reference=original, data=texts)["mean_cosine"]
    return fc.evaluate(model, "lm", data=stories(), separator="<|endoftext|>", hold_out=HELD_BACK)["perplexity"]


def kernels(flat: Mapping[str, Any]) -> dict[str, int]:
    """{address: values} of the layers' kernels."""
    return {a: stored_values(flat[a]) for a in flat if a.startswith("layers/") and a.endswith("/kernel")}


def values(model: fc.Model) -> int:
    """What all kernels in layers hold."""
    return sum(kernels(tree.View(model.params)).values())


def run(name: str, methods: list[str], kept: list[float]) -> None:
    """Measures methods on one model, and writes each result beside those that are there."""
    original, calibration = load(name)
    add(name, 1.0, "original", {"quality": quality(name, original, original), "values": values(original)})
    for keep in kept or KEPT[name]:
        for method in methods:
            model, context = original, Context(original=original, calibration=calibration)
            try:
                for step in METHODS[method](original, keep):
                    model = step(model, context, key=jax.random.key(0))
            except ValueError as error:  # a method that this kind of model does not have
                print(f"{name:14} {keep:.1f} {method:48} {error}", flush=True)
                continue
            found = {"quality": quality(name, model, original), "values": values(model)}
            add(name, keep, method, found)
            print(f"{name:14} {keep:.1f} {method:48} {found['quality']:9.4f} {found['values']:9}", flush=True)


def add(name: str, keep: float, method: str, found: dict[str, Any]) -> None:
    """Writes one result beside those that are there."""
    held = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    held.setdefault(name, {}).setdefault(f"{keep:.1f}", {})[method] = found
    RESULTS.write_text(json.dumps(held, indent=1) + "\n", "utf-8")


def columns() -> list[tuple[str, str, dict[str, Any]]]:
    """(model, fraction kept, results by method) of everything measured."""
    held = json.loads(RESULTS.read_text("utf-8"))
    return [(name, keep, held[name][keep]) for name in KEPT if name in held for keep in held[name] if keep != "1.0"]


def table() -> None:
    """Prints the results, a method a line."""
    found = columns()
    print(f"{'':48}" + "".join(f"{f'{name} {keep}':>18}" for name, keep, _ in found))
    for method in METHODS:
        cells = [f"{r[method]['quality']:18.3f}" if method in r else f"{'':18}" for _, _, r in found]
        if any(cell.strip() for cell in cells):
            print(f"{method:48}" + "".join(cells))


def plot() -> None:
    """Writes experiments/svd_order.png, a panel for each model and size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    held, found = json.loads(RESULTS.read_text("utf-8")), columns()
    figure, panels = plt.subplots(len(found), 1, figsize=(7.5, 3.2 * len(found)), layout="constrained", squeeze=False)
    for axes, (name, keep, results) in zip(panels[:, 0], found, strict=True):
        shown = [m for m in METHODS if m in results][::-1]
        axes.plot([results[m]["quality"] for m in shown], shown, "o")
        axes.axvline(held[name]["1.0"]["original"]["quality"], color="0.6", linestyle=":")
        scale = "linear" if name == "minilm" else "log"
        what = "mean cosine to the original's vectors" if name == "minilm" else "perplexity on held-back stories"
        axes.set(xscale=scale, xlabel=what, title=f"{name} at {float(keep):.0%} (dotted: whole)")
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(HERE / "svd_order.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table", "plot"])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(KEPT)}; by default all")
    parser.add_argument("--keep", nargs="*", type=float, default=[], help="fractions of the kernels' values")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.models if name not in KEPT]:
        parser.error(f"unknown model {unknown[0]!r}; known: {', '.join(KEPT)}")
    if arguments.action == "run":
        for name in arguments.models or KEPT:
            run(name, arguments.methods, arguments.keep)
    else:
        (table if arguments.action == "table" else plot)()


if __name__ == "__main__":
    main()

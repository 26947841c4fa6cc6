"""How small can all-MiniLM-L6-v2 get, and what does each choice cost?

Question: size of `model.safetensors` against mean cosine to the original's sentence vectors and Spearman on STS-B dev,
for the shipped recipes and the variants that were tried on the way, beside what a user would pick instead.

Command (each configuration on its own; results are added to experiments/minilm_frontier.json):

    export FLAXCOMPRESS_DATA=…    # the folder that holds wikitext2/ and stsb/
    python experiments/minilm_frontier.py run balanced small tiny nano
    python experiments/minilm_frontier.py table
    python experiments/minilm_frontier.py plot          # writes experiments/minilm_frontier.png

Calibration and healing text: WikiText-2 train. Dev sentences are only reported on. One seed, 2 CPU cores.

Cost: 20 minutes for tiny (1,500 healing steps), 6 to 12 for balanced, small and nano, seconds for the others.

Results, 2026-11-23, JAX 0.10.2 (original: 90.9 MB, Spearman 0.8672):

    configuration                                MB      STS-B dev   cosine, STS-B dev   cosine, held-out
    PyTorch dynamic int8 (`torch-int8`)          58.63   0.8616      0.9441
    8 bits everywhere, nearest                   22.93   0.8669      0.9995              0.9994
    light                                        22.93   0.8674      0.9995              0.9995 (docstrings)
    4 bits in groups of 64 everywhere, nearest   12.20   0.8639      0.9409              0.9396
    balanced                                      9.05   0.8659      0.9830              0.9879
    small                                         7.56   0.8671      0.9660              0.9764
    tiny                                          5.64   0.8657      0.9272              0.9567
    nano                                          4.41   0.8574      0.8656              0.9218
    3.9 MB                                        3.88   0.8559      0.8429              0.9033
    3.5 MB (700 steps of healing)                 3.51   0.8360      0.7687              0.8601

What decided it, unhealed unless said, cosine on 600 STS-B *train* sentences:

    token table of 2.1 MB: 2 tiers, weights not in the gradient's metric       0.966
    the same in 3 tiers, in the metric of the sentence vector's gradient       0.967
    the same bytes in 8 tiers of bands of columns, each with its own bits      0.981
    kernels: attention 3 bits, feed-forward 2 (5.66 MB in all)                 0.656, after 150 steps 0.885
    kernels: 2 to 4 bits by sensitivity, fewer bytes (5.55 MB in all)          0.853
    default on docstrings, 4 bits everywhere (8.95 MB)                         0.968, after 240 steps 0.971
    default on docstrings, 3 to 8 bits by sensitivity, the same bytes          0.973

The same for scrambled sentences and the rate of healing (all 5,749 STS-B train sentences, --docstrings, Spearman beside
the cosine, and the cosine on held-out docstrings; the original has 0.8100):

    balanced, text as it is, no healing            0.8061   0.9710
    balanced, text as it is, four times the rate   0.8039   0.9722   0.9885
    balanced, text as it is                        0.8037   0.9755   0.9923
    balanced's bits, no healing                    0.8084   0.9758
    balanced, twice the rate                       0.8061   0.9774   0.9891
    balanced                                       0.8073   0.9793   0.9907
    balanced, twice the steps                      0.8073   0.9803   0.9918

The reason for the fourth and fifth lines: feed_forward/down of layer 0 alone in 2 bits costs 0.33 of cosine, any query
or key kernel in 2 bits costs 0.001.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "minilm_frontier.json"
KERNELS = r"layers/\d+/.*/kernel|embedding/position"
POSITION = {"pattern": "embedding/position", "bits": 8}

TORCH_INT8 = "PyTorch dynamic int8"
PEERS = (TORCH_INT8, "4 bits in groups of 64 everywhere, nearest")


def trim() -> dict:
    return {"Trim": {"positions": "limit", "pooler": "unused", "dtype": "float16"}}


def quantize(bits: int, group: int = 64, **more) -> dict:
    return {"Quantize": {"bits": bits, "group": group, "pattern": KERNELS, "overrides": [POSITION], **more}}


def table(bits: float, **more) -> dict:
    return {"FactorizeEmbedding": {"average_bits": bits, "weighting": "fisher", **more}}


def heal(steps: int, rate: float) -> dict:
    return {"Heal": {"steps": steps, "weights": rate, "scales": rate / 2, "vectors": max(rate / 20, 1e-4)}}


def balanced(scrambled: float, *more: dict) -> dict:
    mixed = {"average_bits": 4.0, "choices": [3, 4, 8]}
    return {"scrambled": scrambled, "steps": [trim(), table(2.2), quantize(4, **mixed), *more]}


CONFIGURATIONS = {
    # shipped recipes, by name
    "light": "light",
    "balanced": "balanced",
    "small": "small",
    "tiny": "tiny",
    "nano": "nano",
    # the default's parts, without healing
    "balanced, no healing": [trim(), table(2.15), quantize(4)],
    "balanced, nearest rounding, no healing": [trim(), table(2.15), quantize(4, rounding="nearest")],
    "balanced, error-minimising rounding, no healing": [trim(), table(2.15), quantize(4, rounding="mse")],
    "balanced, one plain SVD table, no healing": [
        trim(),
        {"FactorizeEmbedding": {"tiers": [{"rank": 128, "bits": 4}], "weighting": "none"}},
        quantize(4),
    ],
    "balanced, counts not tempered, no healing": [trim(), table(2.15, power=1.0), quantize(4)],
    "balanced, frequency metric, no healing": [trim(), table(2.15, weighting="frequency"), quantize(4)],
    "balanced, 3 tiers, no healing": [trim(), table(2.15, max_tiers=3), quantize(4)],
    "balanced, 4 bits everywhere": [trim(), table(2.15), quantize(4), heal(200, 2e-3)],
    # scrambled sentences and the rate of healing; with --docstrings, the default's text
    "balanced's bits, no healing": balanced(0.5),
    "balanced, text as it is, no healing": balanced(0.0),
    "balanced, text as it is": balanced(0.0, heal(200, 5e-4)),
    "balanced, text as it is, four times the rate": balanced(0.0, heal(200, 2e-3)),
    "balanced, twice the rate": balanced(0.5, heal(200, 1e-3)),
    "balanced, twice the steps": balanced(0.5, heal(400, 5e-4)),
    # what else a user might do
    "8 bits everywhere, nearest": [{"Quantize": {"bits": 8, "rounding": "nearest"}}],
    "4 bits in groups of 64 everywhere, nearest": [{"Quantize": {"bits": 4, "group": 64, "rounding": "nearest"}}],
    # below nano
    "3.9 MB": [
        trim(),
        table(0.6),
        quantize(2, group=128),
        heal(1000, 6e-3),
    ],
    "3.5 MB": [
        trim(),
        table(0.35),
        quantize(2, group=128),
        heal(700, 6e-3),
    ],
}


def data(name: str) -> Path:
    folder = os.environ.get("FLAXCOMPRESS_DATA")
    if not folder:
        raise SystemExit("set FLAXCOMPRESS_DATA to the folder that holds wikitext2/ and stsb/")
    return Path(folder) / name


def run(names: list[str], out: Path, docstrings: bool) -> None:
    import jax

    import flaxcompress as fc

    original = fc.load("minilm")
    for name in names:
        chosen = CONFIGURATIONS[name]
        if isinstance(chosen, str):
            recipe = fc.Recipe.load(chosen)
        else:
            recipe = fc.Recipe.from_json(chosen if isinstance(chosen, dict) else {"steps": chosen})
        name = f"{name} (docstrings)" if docstrings else name
        folder = out / re.sub(r"[(),]", "", name.replace(" ", "-"))
        start = time.perf_counter()
        small, report = fc.compress(
            original,
            recipe,
            calibration=None if docstrings else [data("wikitext2/train.txt.gz")],
            key=jax.random.key(0),
            work=folder.with_name(f".{folder.name}.work"),
            progress=True,
        )
        seconds = time.perf_counter() - start
        fc.save(small, folder, report=report, overwrite=True)
        record(name, folder, seconds, original)


def record(name: str, folder: Path, seconds: float | None, original) -> None:
    """Measures a saved folder and adds it to the results."""
    import flaxcompress as fc

    small = fc.load(folder)
    found = fc.evaluate(small, "sts", data=data("stsb/dev.tsv.gz"), reference=original)
    train = fc.evaluate(small, "sts", data=data("stsb/train.tsv.gz"), reference=original)  # what choices are made by
    report = json.loads((folder / "report.json").read_text())
    entry = {
        "MB": (folder / "model.safetensors").stat().st_size / 1e6,
        "spearman": found["spearman"],
        "cosine": found["mean_cosine"],
        "train_spearman": train["spearman"],
        "train_cosine": train["mean_cosine"],
        "held_out_cosine": report["fidelity"]["mean_cosine"],
        "held_out_rank_correlation": report["fidelity"]["rank_correlation"],
        "seconds": seconds if seconds is not None else report["seconds"],
        "recipe": report["recipe"],
    }
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = entry
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(name, {k: round(v, 4) for k, v in entry.items() if isinstance(v, float)}, flush=True)


def torch_int8() -> None:
    """PyTorch's dynamic quantization of every linear map (the tables stay float32), on the same sentences."""
    import io
    import types

    import torch
    from sentence_transformers import SentenceTransformer

    import flaxcompress as fc
    from flaxcompress.evaluate.tasks import sts
    from flaxcompress.folder import resolve

    network = SentenceTransformer(str(resolve("minilm")), device="cpu")
    network[0].model = torch.ao.quantization.quantize_dynamic(network[0].model, {torch.nn.Linear})
    written = io.BytesIO()
    torch.save(network[0].model.state_dict(), written)  # for its size only
    model = types.SimpleNamespace(encode=lambda texts: network.encode(list(texts)))
    found = sts(model, data=data("stsb/dev.tsv.gz"), reference=fc.load("minilm"))
    entry = {"MB": written.tell() / 1e6, "spearman": found["spearman"], "cosine": found["mean_cosine"]}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**results, TORCH_INT8: entry}, indent=1) + "\n")
    print(TORCH_INT8, entry)


def print_table() -> None:
    results = json.loads(RESULTS.read_text())
    print("| configuration | MB | STS-B dev | cosine on STS-B dev sentences | cosine on held-out text | minutes |")
    print("|---|---|---|---|---|---|")
    for name, r in sorted(results.items(), key=lambda item: -item[1]["MB"]):
        held_out = f"{r['held_out_cosine']:.4f}" if "held_out_cosine" in r else ""
        minutes = f"{r['seconds'] / 60:.1f}" if "seconds" in r else ""
        print(f"| {name} | {r['MB']:.2f} | {r['spearman']:.4f} | {r['cosine']:.4f} | {held_out} | {minutes} |")


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = json.loads(RESULTS.read_text())
    shipped = [(n, results[n]) for n in ("light", "balanced", "small", "tiny", "nano") if n in results]
    others = [r for n, r in results.items() if n not in dict(shipped) and n not in PEERS]
    peers = [(n, results[n]["MB"], results[n]["cosine"]) for n in PEERS if n in results]
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    axes.plot([r["MB"] for _, r in shipped], [r["cosine"] for _, r in shipped], "o-", label="flaxcompress recipes")
    for n, r in shipped:
        axes.annotate(n, (r["MB"], r["cosine"]), textcoords="offset points", xytext=(6, -12))
    axes.plot([r["MB"] for r in others], [r["cosine"] for r in others], ".", color="0.6", label="tried on the way")
    axes.plot([p[1] for p in peers], [p[2] for p in peers], "s", color="tab:red", label="what else there is")
    for n, size, cosine in peers:
        axes.annotate(n, (size, cosine), textcoords="offset points", xytext=(6, -12), fontsize=8, ha="center")
    axes.set(xscale="log", xlabel="model.safetensors, MB (original: 90.9)", ylabel="mean cosine on STS-B dev sentences")
    axes.set_xlim(3.5, 100)
    axes.set_xticks([4, 6, 9, 12, 23, 59], ["4", "6", "9", "12", "23", "59"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(HERE / "minilm_frontier.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "record", "torch-int8", "table", "plot", "list"])
    parser.add_argument("names", nargs="*", help="configurations (see list)")
    parser.add_argument("--out", type=Path, default=Path("frontier"), help="where compressed folders go")
    parser.add_argument("--docstrings", action="store_true", help="the default's text instead of WikiText-2")
    arguments = parser.parse_args()
    unknown = [n for n in arguments.names if n.removesuffix(" (docstrings)") not in CONFIGURATIONS]
    if unknown:
        parser.error(f"unknown configuration {unknown[0]!r}; known: {', '.join(CONFIGURATIONS)}")
    if arguments.action == "run":
        run(arguments.names, arguments.out, arguments.docstrings)
    elif arguments.action == "record":
        import flaxcompress as fc

        original = fc.load("minilm")
        for name in arguments.names:
            record(name, arguments.out / re.sub(r"[(),]", "", name.replace(" ", "-")), None, original)
    elif arguments.action == "torch-int8":
        torch_int8()
    elif arguments.action == "table":
        print_table()
    elif arguments.action == "plot":
        plot()
    else:
        print("\n".join(CONFIGURATIONS))


if __name__ == "__main__":
    main()

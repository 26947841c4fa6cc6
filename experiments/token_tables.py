"""Which form of a token table keeps most of all-MiniLM-L6-v2 at a quarter and at an eighth of its bytes?

RESULT

Cost: COST
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "token_tables.json"
TOKEN = "embedding/token"
MODES = (24, 16)  # of the 384 columns, for CP and Tucker
BATCH, ROUNDS, CALLS = (32, 64), 15, 3
SENTENCES = 400  # held-out docstrings

Make = Callable[[np.ndarray, np.ndarray, float], Any]


def low_rank(table: np.ndarray, weights: np.ndarray | None, values: float) -> Any:
    """Two factors by the row-weighted SVD."""
    from flaxcompress import linalg
    from flaxcompress.formats import LowRank

    found = linalg.row_weighted_svd(table, int(values / sum(table.shape)), weights)
    return LowRank(left=np.float32(found.left), right=np.float32(found.right))


def bucketed(table: np.ndarray, weights: np.ndarray, values: float) -> Any:
    """Two tiers, heavy rows and the rest, each a low-rank table of its own: the best of some layouts."""
    from flaxcompress import linalg
    from flaxcompress.formats import Bucketed, LowRank

    order, (rows, width) = np.argsort(-weights, kind="stable"), table.shape
    best = (np.inf, 0, 0, 0)
    left = linalg.row_weighted_svd(table, width, weights).left[order]
    lost = weights[order, None] * np.square(left)
    after = lost.sum(1, keepdims=True) - np.cumsum(lost, axis=1)  # [row, rank - 1]: in one basis for both tiers
    for heavy in (1000, 2000, 4000, 6000, 9000):
        for rank in range(64, width, 16):
            rest = int((values - rows / 16 - rank * (heavy + width)) / (rows - heavy + width))
            if 1 <= rest < rank:
                loss = after[:heavy, rank - 1].sum() + after[heavy:, rest - 1].sum()
                best = min(best, (loss, heavy, rank, rest))
    _, heavy, rank, rest = best
    tier_of_row = np.ones(rows, np.uint8)
    tier_of_row[order[:heavy]] = 0
    tiers = []
    for number, r in enumerate((rank, rest)):
        mine = tier_of_row == number
        found = linalg.row_weighted_svd(table[mine], r, weights[mine])
        tiers.append(LowRank(left=np.float32(found.left), right=np.float32(found.right)))
    return Bucketed.from_tiers(tuple(tiers), tier_of_row)


def tensor_train(table: np.ndarray, weights: np.ndarray | None, values: float) -> Any:
    """Three cores."""
    from flaxcompress import linalg
    from flaxcompress.compress.tensor_train_embedding import compress_matrix
    from flaxcompress.formats import TensorTrainSpec

    make = lambda rank: TensorTrainSpec.balanced(table.shape, cores=3, rank=rank)  # noqa: E731
    rank = linalg.largest(lambda rank: make(rank).values() <= values, table.shape[0])
    return compress_matrix(table, make(rank), weights)


def cp(table: np.ndarray, weights: np.ndarray, values: float) -> Any:
    """A sum of rank-one tensors ids × 24 × 16."""
    from flaxcompress import linalg
    from flaxcompress.compress.tensorize import spec_within

    return spec_within("cp", (len(table),), MODES, values).compress(table, linalg.Metric.of_weights(weights))


def tucker(table: np.ndarray, weights: np.ndarray, values: float) -> Any:
    """A core and a factor for ids and for each of 24 × 16: the best of some ranks of the columns."""
    from flaxcompress import linalg
    from flaxcompress.formats import TuckerSpec

    found = []
    for columns in ((12, 8), (16, 12), (20, 14)):
        core = int(np.prod(columns))
        rank = int((values - sum(m * r for m, r in zip(MODES, columns, strict=True))) / (len(table) + core))
        spec = TuckerSpec(rows=(len(table),), columns=MODES, ranks=(min(rank, core), *columns))
        node = spec.compress(table, linalg.Metric.of_weights(weights))
        found.append((weights @ np.square(np.asarray(node.materialize()) - table).sum(1), node))
    return min(found, key=lambda pair: pair[0])[1]


def autoencoded(table: np.ndarray, weights: np.ndarray, values: float) -> Any:
    """Two factors trained from the row-weighted SVD, squared error and cosine."""
    from flaxcompress.compress.autoencode_embedding import compress_matrix

    found = compress_matrix(table, int(values / sum(table.shape)), weights, progress=True)
    print(f"autoencoder: loss {found.before:.5f} -> {found.after:.5f}", flush=True)
    return found.node


FORMS: dict[str, Make] = {
    "low rank, plain SVD": lambda table, weights, values: low_rank(table, None, values),
    "low rank, row-weighted": low_rank,
    "low rank, autoencoded": autoencoded,
    "two tiers of low rank, row-weighted": bucketed,
    "Tucker, row-weighted": tucker,
    "CP, row-weighted": cp,
    "tensor train, plain": lambda table, weights, values: tensor_train(table, None, values),
    "tensor train, blocks weighted": tensor_train,
}


def data(name: str) -> Path:
    folder = os.environ.get("FLAXCOMPRESS_DATA")
    if not folder:
        raise SystemExit("set FLAXCOMPRESS_DATA to the folder that holds stsb/")
    return Path(folder) / name


def run(names: list[str]) -> None:
    import jax

    import flaxcompress as fc
    from flaxcompress import tree
    from flaxcompress.compress.tiers import token_weights
    from flaxcompress.data import calibration_text
    from flaxcompress.evaluate import metrics
    from flaxcompress.formats import materialize, nbytes
    from flaxcompress.text import first_ordinary_token

    original = fc.load("minilm")
    text = calibration_text()
    ids = original.assets.tokenize(text.train).ids
    table = np.asarray(materialize(tree.View(original.params)[TOKEN]))
    counts = np.bincount(np.concatenate([np.asarray(row) for row in ids]), minlength=len(table)).astype(float)
    weights = token_weights(counts, start=first_ordinary_token(original.assets))
    held_out = list(text.held_out)[:SENTENCES]
    reference = original.encode(held_out)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "original" not in results:
        found = fc.evaluate(original, "sts", data=data("stsb/dev.tsv.gz"))
        results["original"] = {"bytes": table.nbytes, "spearman": found["spearman"], "cosine": 1.0}
    nodes = {"original": table}
    for factor in (4, 8):
        for name in names:
            begin = time.perf_counter()
            node = FORMS[name](table, weights, table.size / factor)
            made = time.perf_counter() - begin
            nodes[f"{name}, {factor}x"] = node
            assert nbytes(node) <= table.nbytes / factor
            dense = np.asarray(materialize(node))  # so that all models share one program
            params = tree.replace(original.params, {TOKEN: dense})
            model = fc.Model(params=params, config=original.config, assets=original.assets)
            error = weights @ np.square(dense - table).sum(1) / (weights @ np.square(table).sum(1))
            found = fc.evaluate(model, "sts", data=data("stsb/dev.tsv.gz"))
            results[f"{name}, {factor}x"] = {
                "bytes": nbytes(node),
                "weighted_error": float(error),
                "cosine": metrics.mean_cosine(model.encode(held_out), reference),
                "spearman": found["spearman"],
                "seconds_to_make": made,
            }
            print(f"{name}, {factor}x", results[f"{name}, {factor}x"], flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for name, seconds in lookups(nodes, jax).items():
        results[name]["lookup_ms"] = 1e3 * seconds
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def lookups(nodes: dict[str, Any], jax: Any) -> dict[str, float]:
    """Median seconds of a lookup of 32×64 ids, over interleaved rounds."""
    from flaxcompress.formats import take

    ids = np.random.default_rng(0).integers(0, len(nodes["original"]), BATCH).astype(np.int32)
    placed = {name: jax.device_put(node) for name, node in nodes.items()}
    look = jax.jit(take)
    for node in placed.values():
        jax.block_until_ready(look(node, ids))
    taken: dict[str, list[float]] = {name: [] for name in placed}
    for _ in range(ROUNDS):
        for name, node in placed.items():
            for _ in range(CALLS):
                begin = time.perf_counter()
                jax.block_until_ready(look(node, ids))
                taken[name].append(time.perf_counter() - begin)
    return {name: float(np.median(seconds)) for name, seconds in taken.items()}


def print_table() -> None:
    heads = ("MB", "weighted error", "cosine", "STS-B dev", "lookup, ms", "made in, s")
    widths = [len(head) + 2 for head in heads]
    print(f"    {'table':44}" + "".join(head.rjust(w) for head, w in zip(heads, widths, strict=True)))
    for name, r in json.loads(RESULTS.read_text()).items():
        cells = [f"{r['bytes'] / 1e6:.2f}", f"{r.get('weighted_error', 0):.4f}", f"{r['cosine']:.4f}"]
        cells += [f"{r['spearman']:.4f}", f"{r['lookup_ms']:.2f}", f"{r.get('seconds_to_make', 0):.0f}"]
        print(f"    {name:44}" + "".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)))


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = json.loads(RESULTS.read_text())
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained", sharex=True)
    for name in FORMS:
        rows = [results[f"{name}, {factor}x"] for factor in (8, 4) if f"{name}, {factor}x" in results]
        for axis, key in zip(axes, ("cosine", "spearman"), strict=True):
            axis.plot([r["bytes"] / 1e6 for r in rows], [r[key] for r in rows], "o-", label=name)
    axes[1].axhline(results["original"]["spearman"], color="0.6", linestyle=":", label="original, 46.9 MB")
    for axis, label in zip(axes, ("mean cosine on held-out docstrings", "Spearman on STS-B dev"), strict=True):
        axis.set(xlabel="token table, MB (float32)", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7)
    figure.savefig(HERE / "token_tables.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table", "plot"])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FORMS)}; default: all")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in FORMS]
    if unknown:
        parser.error(f"unknown form {unknown[0]!r}; known: {', '.join(FORMS)}")
    {"run": lambda: run(arguments.names or list(FORMS)), "table": print_table, "plot": plot}[arguments.action]()


if __name__ == "__main__":
    main()

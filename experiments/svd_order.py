"""Does the published order of the low-rank methods hold on small models, at equal bytes, without healing?"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
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
    NystromFeedForward,
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
        return [*cut, NystromFeedForward(keep=rest, sentences=SENTENCES, **settings)]

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
KEPT = {"minilm": (0.6,), "stories260K": (0.8, 0.6), "babyllama105": (0.8, 0.6)}


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


def measure(name: str, methods: list[str]) -> None:
    original, calibration = load(name)
    add(
        name,
        "original",
        1.0,
        {"quality": quality(name, original, original), "values": values(original)},
    )
    for keep in KEPT[name]:
        for method in methods:
            begin = time.perf_counter()
            model, context = original, Context(original=original, calibration=calibration)
            try:
                for step in METHODS[method](original, keep):
                    model = step(model, context, key=jax.random.key(0))
            except ValueError as error:  # a method that this kind of model does not have
                print(f"{name:14} {keep:.1f} {method:44} {error}")
                continue
            seconds = time.perf_counter() - begin
            found = {
                "quality": quality(name, model, original),
                "values": values(model),
                "seconds": seconds,
            }
            add(name, method, keep, found)
            print(
                f"{name:14} {keep:.1f} {method:44} {found['quality']:9.4f} {found['values']:9} {seconds:6.1f} s",
                flush=True,
            )


def add(name: str, method: str, keep: float, found: dict[str, Any]) -> None:
    """Writes one result beside those that are there."""
    held = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    held.setdefault(name, {}).setdefault(f"{keep:.1f}", {})[method] = found
    RESULTS.write_text(json.dumps(held, indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(KEPT))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    args = parser.parse_args()
    for name in args.models:
        measure(name, args.methods)


if __name__ == "__main__":
    main()

"""A tiny sentence encoder with a vocabulary of two-letter words, and text in it, for several test files."""

from __future__ import annotations

import jax
import numpy as np

import flaxcompress as fc
from flaxcompress.compress import Calibration


def words(count: int) -> list[str]:
    """[PAD] to [MASK] and `count` ordinary words."""
    pairs = (chr(97 + i) + chr(97 + j) for i in range(20) for j in range(20))
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for word, _ in zip(pairs, range(count), strict=False))]


def numbered_words(count: int) -> fc.Assets:
    """A tokenizer of [PAD] to [MASK] and w0, w1, …; texts of 16 tokens, mean pooling, unit vectors."""
    lines = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(count))])
    return fc.Assets(files=(("vocab.txt", lines.encode()),), max_length=16, pooling=fc.Pooling("mean", True))


def numbered_text(count: int, assets: fc.Assets) -> Calibration:
    """Sixty sentences of the first `count` of those words, the first ones often."""
    rng = np.random.default_rng(0)
    rows = tuple(" ".join(f"w{i}" for i in rng.zipf(1.5, int(n)) % count) for n in rng.integers(4, 14, 60))
    return Calibration(fc.CalibrationText(name="words", train=rows, held_out=()), assets, vocabulary=count + 5)


def make_model(vocabulary: list[str], *, key: int = 0, **config) -> fc.Model:
    """Random weights; texts up to 32 tokens, mean pooling, unit vectors."""
    assets = fc.Assets(
        files=(("vocab.txt", "\n".join(vocabulary).encode()),),
        pooling=fc.Pooling("mean", True),
        max_length=32,
        source="someone/some-model",
        licence="mit",
    )
    return fc.Model.init(
        fc.ModelConfig(vocabulary=len(vocabulary), heads=4, **config), key=jax.random.key(key), assets=assets
    )


def make_sentences(vocabulary: list[str], count: int) -> list[str]:
    """5 to 19 ordinary words each."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(vocabulary[5:], rng.integers(5, 20))) for _ in range(count)]

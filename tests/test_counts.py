"""Parameters by `eval_shape`, against the counts that the ALBERT paper prints (Lan et al. 2020, tables 1, 3 and 4)."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.model import abstract_flat

ALL = {"attention": "one", "feed_forward": "one", "norms": "one"}
SHARING = {
    "all": ALL,
    "attention": {"attention": "one"},
    "feed_forward": {"feed_forward": "one"},
    "none": {},
}


def albert(width=768, layers=12, narrow: int | None = 128, sharing="all", feed_forward=None) -> fc.ModelConfig:
    own, one = tuple(range(layers)), (0,) * layers
    maps = {part: one if SHARING[sharing].get(part) else own for part in ("attention", "feed_forward", "norms")}
    return fc.ModelConfig(
        family="albert",
        vocabulary=30_000,
        width=width,
        embedding_width=narrow,
        layers=layers,
        heads=width // 64,
        feed_forward_width=feed_forward or 4 * width,
        sharing=fc.Sharing(**maps),
    )


def count(config) -> int:
    flat = abstract_flat(config)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(flat))


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (albert(), 12),
        (albert(1024, 24), 18),
        (albert(2048, 24), 59),  # the paper prints 60; the released model has 59
        (albert(4096, 12), 223),  # the paper prints 235; the released model has 223
        *((albert(narrow=None, sharing=s), m) for s, m in zip(SHARING, (31, 83, 57, 108), strict=True)),
        *((albert(sharing=s), m) for s, m in zip(SHARING, (12, 64, 38, 89), strict=True)),
    ],
)
def test_counts_are_those_of_the_paper(config, millions):
    assert count(config) == pytest.approx(millions * 1e6, rel=0.02, abs=0.5e6)  # printed in whole millions


@pytest.mark.parametrize("sharing", SHARING)
def test_a_shared_set_is_one_leaf(sharing):
    config = albert(sharing=sharing)
    addresses = tree.select(abstract_flat(config), r"layers/\d+/attention/query/kernel")
    assert len(addresses) == (1 if sharing in ("all", "attention") else 12)

"""Several documents in a row, and heads that see some of the tokens."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.config import Latent, Linformer, Nystrom
from flaxcompress.model import abstract_flat
from flaxcompress.nn import run

BASE = {
    "vocabulary": 30,
    "width": 16,
    "layers": 2,
    "heads": 4,
    "feed_forward_width": 24,
    "positions": 8,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pooler": False,
    "head": "masked_lm",
}
PLACED = {"position_embedding": "none", "embedding_norm": False, "segments": 0}
LLAMA = {**PLACED, "rotary": fc.Rotary(), "causal": True, "head": "causal_lm", "norm": "rms", "norm_place": "pre"}
STRUCTURES = {
    "bert": {},
    "albert": {"embedding_width": 6, "sharing": fc.Sharing.named("all", layers=2)},
    "roberta": {"position_offset": 2, "positions": 6, "pad_token": 1},
    "modernbert": {"rotary": fc.Rotary(local_theta=10.0), "window": 2, "local": (False, True), **PLACED},
    "gpt2": {"causal": True, "head": "causal_lm", "norm_place": "pre", "final_norm": True, "segments": 0},
    "llama": {**LLAMA, "key_value_heads": 2, "gated": True, "tied": False},
    "mistral": {**LLAMA, "window": 2},
    "deepseek": {
        **LLAMA,
        "attention": Latent(query_rank=6, key_value_rank=6, rotary_width=4, plain_width=4, value_width=4),
    },
    "t5": {**PLACED, "relative_buckets": 8, "relative_distance": 6, "attention_scale": 1.0},
    "sinusoidal": {"position_embedding": "sinusoidal"},
}
LENGTHS = ((3, 1, 4, 2), (6, 5), (7,))  # of the documents of each row; what is left of 12 is padding


def config_of(name):
    return fc.ModelConfig(**{**BASE, **STRUCTURES[name]})


def params_of(config):
    """Random values everywhere: biases and positions of zero hide mistakes."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype)  # noqa: E731
    return tree.unflatten(jax.tree.map(draw, abstract_flat(config)))


def documents():
    """(row, first place, ids [n]) of every document; 1 among the ids is the padding token of one structure."""
    rng = np.random.default_rng(1)
    for row, lengths in enumerate(LENGTHS):
        for first, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
            text = rng.integers(1, 30, length)
            text[length // 2] = 1
            yield row, int(first), text


def packed(length=12):
    ids, packs = np.zeros((len(LENGTHS), length), int), np.zeros((len(LENGTHS), length), int)
    for row, first, text in documents():
        here = slice(first, first + len(text))
        ids[row, here], packs[row, here] = text, packs[row].max() + 1
    return ids, packs


def close(got, want, terms=200):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape and np.isfinite(got).all()
    atol = 16 * np.finfo(np.float32).eps * math.sqrt(terms) * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_packed_row_equals_its_documents_run_one_by_one(name):
    config = config_of(name)
    params, (ids, packs) = params_of(config), packed()
    forward = jax.jit(lambda ids, mask, packs: run(params, config, jnp.float32, ids, mask, packs=packs).logits)
    logits = forward(ids, None, packs)
    assert np.isfinite(logits).all()
    alone = np.zeros((7, 7), int)
    for number, (_, _, text) in enumerate(documents()):
        alone[number, : len(text)] = text
    want = forward(alone, alone > 0, None)
    for number, (row, first, text) in enumerate(documents()):
        close(logits[row, first : first + len(text)], want[number, : len(text)])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"feed_forward_kernel": 3}, "feed_forward_kernel convolve"),
        ({"projection_kernel": 3}, "projection_kernel convolve"),
        ({"attention": Linformer(length=4)}, "linformer attention mixes"),
        ({"attention": Nystrom(landmarks=2)}, "nystrom attention mixes"),
        ({"head": "sequence_classification", "classes": 2}, "one vector per row"),
    ],
)
def test_structures_in_which_documents_would_mix_are_refused(change, message):
    config = fc.ModelConfig(**{**BASE, **change})
    ids, packs = packed()
    with pytest.raises(ValueError, match=message):
        run({}, config, jnp.float32, jnp.asarray(ids), packs=jnp.asarray(packs))


def test_a_mask_beside_packs_is_refused():
    ids, packs = packed()
    with pytest.raises(ValueError, match="attention_mask cannot be given too"):
        run({}, config_of("bert"), jnp.float32, jnp.asarray(ids), jnp.ones(ids.shape, bool), packs=jnp.asarray(packs))


@pytest.mark.parametrize("head", ["masked_lm", "pretraining", "causal_lm", "replaced_token", "token_classification"])
def test_a_head_sees_the_label_positions_alone(head):
    config = fc.ModelConfig(**{**BASE, "head": head, "pooler": head == "pretraining", "classes": 3})
    params, ids = params_of(config), jnp.asarray(np.random.default_rng(2).integers(1, 30, (2, 8)))
    places = jnp.asarray([[6, 1, 1], [0, 7, 3]])
    want = run(params, config, jnp.float32, ids).logits
    got = run(params, config, jnp.float32, ids, label_positions=places).logits
    if head == "pretraining":
        close(got.sentence_order, want.sentence_order)
        got, want = got.masked_lm, want.masked_lm
    close(got, np.stack([row[at] for row, at in zip(np.asarray(want), np.asarray(places), strict=True)]))


def test_label_positions_are_refused_where_a_head_reads_the_sequence():
    config = fc.ModelConfig(**{**BASE, "head": "sequence_classification", "classes": 2})
    ids = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="'sequence_classification' reads whole sequences"):
        run(params_of(config), config, jnp.float32, ids, label_positions=ids)

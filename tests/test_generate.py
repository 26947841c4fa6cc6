"""Decoding against transformers' generate, and its own rules against plain loops."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxcompress as fc

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

spec = importlib.util.spec_from_file_location("families_cases", Path(__file__).with_name("test_families.py"))
families = importlib.util.module_from_spec(spec)
sys.modules["families_cases"] = families
spec.loader.exec_module(families)

DECODERS = [family for family, head in families.HEADED if head == "causal_lm"]


def prompts(config, seed, positions=18):
    """Three prompts of different lengths, and as transformers wants them: padded on the left."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, config.vocab_size, n).tolist() for n in (2, 5, 3)]
    ids = np.zeros((3, 5), int)
    mask = np.zeros((3, 5), int)
    for i, row in enumerate(rows):
        ids[i, 5 - len(row) :], mask[i, 5 - len(row) :] = row, 1
    return rows, torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
@pytest.mark.parametrize("family", DECODERS)
def test_tokens_equal_those_of_transformers(family, number, beams, tmp_path):
    network, seed = families.drawn(family, "causal_lm", number, tmp_path)
    network.generation_config.eos_token_id = 2
    network.generation_config.pad_token_id = 0
    network.generation_config.save_pretrained(tmp_path)
    model = fc.load(tmp_path)
    assert model.assets.end_tokens == (2,)
    rows, ids, mask = prompts(network.config, seed)
    with torch.no_grad():
        want = network.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, num_beams=beams)
    got = model.generate(rows, max_new_tokens=12, beams=beams, return_ids=True)
    for ours, theirs in zip(got, want[:, 5:].tolist(), strict=True):
        end = theirs.index(2) + 1 if 2 in theirs else len(theirs)
        assert ours.ids == theirs[:end]

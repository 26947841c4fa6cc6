"""Every family against transformers: random configs of odd sizes, all weights perturbed, sharded files, padding."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from family_cases import (  # noqa: E402
    CASES,
    DRAWS,
    EVERY,
    HEADED,
    QUICK,
    SOME,
    batch,
    close,
    close_logits,
    drawn,
    logits_of,
    perturbed,
    weights,
)
from quick import quick  # noqa: E402

import flaxcompress as fc  # noqa: E402
from flaxcompress import tree  # noqa: E402
from flaxcompress.config import GENERATING  # noqa: E402
from flaxcompress.families import FAMILIES  # noqa: E402
from flaxcompress.model import abstract_flat  # noqa: E402


def test_every_family_has_a_case():
    assert {*CASES, "vit"} == set(FAMILIES)  # images have a file of their own


def test_the_quick_suite_has_every_family_and_every_head():
    assert [{case[i] for case in QUICK} for i in (0, 1)] == [{case[i] for case in HEADED} for i in (0, 1)]


@pytest.mark.parametrize("family", CASES)
def test_a_family_names_its_heads(family):  # for load(head=…)
    assert {"none", *FAMILIES[family].heads} == set(CASES[family][2])
    for head, classes in FAMILIES[family].heads.items():
        assert CASES[family][2][head] == classes[0]


# Three drawn configs of every family; classifiers, which stand on the same layers, are drawn once.
DRAWN = [
    pytest.param(family, head, number, marks=pytest.mark.slow if number or (family, head) not in QUICK else ())
    for family, head in HEADED
    for number in range(DRAWS if head in ("none", "masked_lm", *GENERATING) else 1)
]


@pytest.mark.parametrize(("family", "head", "number"), DRAWN)
def test_outputs_equal_those_of_transformers(family, head, number, tmp_path):
    network, seed = drawn(family, head, number, tmp_path)
    model = fc.load(tmp_path)
    assert model.config.family == family and model.config.head == head
    ids, mask = batch(network, seed, model.config.pad_token)
    given, ours = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask.astype(int))}, {}
    if model.config.decoder is not None:
        target, seen = batch(network, seed + 1, model.config.pad_token)
        given |= {"decoder_input_ids": torch.tensor(target), "decoder_attention_mask": torch.tensor(seen.astype(int))}
        ours |= {"decoder_input_ids": target, "decoder_attention_mask": seen}
    with torch.no_grad():
        want = network(**given, output_hidden_states=True)
    got = model(ids, mask, **ours, output_hidden_states=True)
    pairs = [(got.hidden_states, want.get("hidden_states"), mask)]
    if ours:
        pairs = [(got.encoder_hidden_states, want.encoder_hidden_states, mask)]
        pairs += [(got.hidden_states, want.decoder_hidden_states, seen)]
        mask = seen
    for mine, theirs, real in pairs:
        for a, b in zip(mine, theirs, strict=True):
            close(a, b, real)
    if head != "none":
        close_logits(got.logits, logits_of(want, head), head, mask)
    elif getattr(want, "pooler_output", None) is not None:
        close(got.pooled, want.pooler_output)


@SOME
def test_a_round_trip_gives_identical_tensors(family, head, tmp_path):
    network, _ = drawn(family, head, 0, tmp_path / "theirs")
    fc.export(fc.load(tmp_path / "theirs"), tmp_path / "ours", format="torch-dense")
    again = type(network).from_pretrained(tmp_path / "ours")
    want = {n: t for n, t in network.state_dict().items() if "position_ids" not in n}
    got = again.state_dict()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@EVERY
def test_names_are_a_bijection_and_counts_equal_transformers(family, head, tmp_path):
    network, _ = drawn(family, head, 1, tmp_path)
    config = fc.load(tmp_path).config
    names = FAMILIES[family].names(config)
    flat = abstract_flat(config)
    assert set(names) == set(flat)
    assert len({(where.name, where.part) for where in names.values()}) == len(names)
    counts = [int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(flat)]
    assert sum(counts) == sum(p.numel() for p in weights(network).values())


@SOME
def test_a_saved_folder_computes_the_same_in_pytorch(family, head, tmp_path):
    from flaxcompress.export import modeling_flaxcompress as ours
    from flaxcompress.export.torch import check_folder

    network, seed = drawn(family, head, 2, tmp_path / "theirs")
    model = fc.load(tmp_path / "theirs")
    fc.save(model, tmp_path / "ours")
    again = fc.load(tmp_path / "ours")
    for a, b in zip(tree.flatten(model.params).values(), tree.flatten(again.params).values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.config == model.config
    assert check_folder(again, tmp_path / "ours") <= 1e-4
    if head == "none":
        return
    ids, mask = batch(network, seed, model.config.pad_token)
    name = json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"][0]
    more = {} if model.config.decoder is None else {"decoder_input_ids": ids[:, :3]}
    tensors = {name: torch.tensor(array) for name, array in more.items()}
    with torch.no_grad():
        network = getattr(ours, name).from_pretrained(tmp_path / "ours").eval()
        out = network(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **tensors)
    close_logits(model(ids, mask, **more).logits, logits_of(out, head), head, None if more else mask)


@pytest.mark.parametrize(
    ("config_class", "head_class"),
    quick([("GPT2Config", "GPT2"), ("Qwen3Config", "Qwen3")], [("Qwen3Config", "Qwen3")]),
)
def test_without_a_padding_token_a_sequence_ends_where_the_mask_does(config_class, head_class, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "intermediate_size": 9}
    config = getattr(transformers, config_class)(
        vocab_size=20, hidden_size=8, head_dim=4, max_position_embeddings=12, num_labels=3, **sizes
    )
    assert config.pad_token_id is None
    network = perturbed(getattr(transformers, f"{head_class}ForSequenceClassification")(config), 0)
    network.save_pretrained(tmp_path / "theirs")
    model = fc.load(tmp_path / "theirs")
    ids = np.array([[3, 4, 5, 0]])  # 0 is an ordinary token here
    with torch.no_grad():
        want, shorter = network(torch.tensor(ids)).logits, network(torch.tensor(ids[:, :3])).logits
    close(model(ids).logits, want)
    close(model(ids, np.array([[1, 1, 1, 0]])).logits, shorter)
    fc.export(model, tmp_path / "stock")
    assert type(network).from_pretrained(tmp_path / "stock").config.pad_token_id is None

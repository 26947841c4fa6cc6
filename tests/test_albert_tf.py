"""ALBERT under the names of Google's TensorFlow variables, against transformers."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from family_cases import close, perturbed  # noqa: E402

import flaxcompress as fc  # noqa: E402
from flaxcompress.families import albert_tf  # noqa: E402
from flaxcompress.families.base import write_tensors  # noqa: E402
from flaxcompress.tree import flatten  # noqa: E402

SIZES = {
    "vocab_size": 30,
    "embedding_size": 5,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_hidden_groups": 2,
    "inner_group_num": 1,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
}
GOOGLE = {**SIZES, "hidden_act": "gelu", "net_structure_type": 0, "gap_size": 0, "down_scale_factor": 1}
GROUP = "bert/encoder/transformer/group_{}/inner_group_0"


def variables(network) -> dict[str, np.ndarray]:
    """The TensorFlow variables of a network in transformers, written out by hand; kernels [in, out]."""
    state = {name.removeprefix("albert."): tensor.numpy() for name, tensor in network.state_dict().items()}
    out = {}

    def linear(theirs, ours):
        out[f"{theirs}/kernel"], out[f"{theirs}/bias"] = state[f"{ours}.weight"].T, state[f"{ours}.bias"]

    def norm(theirs, ours):
        out[f"{theirs}/gamma"], out[f"{theirs}/beta"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        out[f"bert/embeddings/{name}"] = state[f"embeddings.{name}.weight"]
    norm("bert/embeddings/LayerNorm", "embeddings.LayerNorm")
    linear("bert/encoder/embedding_hidden_mapping_in", "encoder.embedding_hidden_mapping_in")
    for number in range(2):
        theirs, ours = GROUP.format(number), f"encoder.albert_layer_groups.{number}.albert_layers.0"
        for name in ("query", "key", "value"):
            linear(f"{theirs}/attention_1/self/{name}", f"{ours}.attention.{name}")
        linear(f"{theirs}/attention_1/output/dense", f"{ours}.attention.dense")
        linear(f"{theirs}/ffn_1/intermediate/dense", f"{ours}.ffn")
        linear(f"{theirs}/ffn_1/intermediate/output/dense", f"{ours}.ffn_output")
        norm(f"{theirs}/LayerNorm", f"{ours}.attention.LayerNorm")
        norm(f"{theirs}/LayerNorm_1", f"{ours}.full_layer_layer_norm")
    linear("bert/pooler/dense", "pooler")
    if "classifier.weight" in state:
        out["output_weights"], out["output_bias"] = state["classifier.weight"], state["classifier.bias"]
        return out
    linear("cls/predictions/transform/dense", "predictions.dense")
    norm("cls/predictions/transform/LayerNorm", "predictions.LayerNorm")
    out["cls/predictions/output_bias"] = state["predictions.bias"]
    out["cls/seq_relationship/output_weights"] = state["sop_classifier.classifier.weight"]
    out["cls/seq_relationship/output_bias"] = state["sop_classifier.classifier.bias"]
    return out


def network_of(kind="PreTraining", **changes):
    config = transformers.AlbertConfig(**{**SIZES, "hidden_act": "gelu_new", **changes})
    return perturbed(getattr(transformers, f"AlbertFor{kind}")(config), 3)


def write(folder, arrays, config=GOOGLE, name="albert_config.json"):
    folder.mkdir(exist_ok=True)
    np.savez(folder / "albert.npz", **arrays)
    (folder / name).write_text(json.dumps(config))
    return folder


IDS = np.array([[2, 7, 8, 9, 3], [2, 11, 3, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
SEGMENTS = np.array([[0, 0, 0, 1, 1], [0, 1, 1, 0, 0]])


def check(model, network):
    with torch.no_grad():
        want = network(torch.tensor(IDS), attention_mask=torch.tensor(MASK), token_type_ids=torch.tensor(SEGMENTS))
    got = model(IDS, MASK, SEGMENTS)
    if model.config.head == "sequence_classification":
        return close(got.logits, want.logits)
    close(got.logits.masked_lm, want.prediction_logits, MASK == 1)
    return close(got.logits.sentence_order, want.sop_logits)


def hub(name):
    return f"module/{name}"


def unnumbered(name):
    return name.replace("attention_1", "attention").replace("ffn_1", "ffn")


def tensor(name):
    return f"{name}:0"


@pytest.mark.parametrize("spelling", [str, hub, unnumbered, tensor], ids=lambda f: f.__name__)
def test_the_outputs_are_those_of_transformers(spelling, tmp_path):
    network = network_of()
    arrays = variables(network)
    kernel = next(n for n in arrays if n.endswith("query/kernel"))
    extra = {f"{kernel}/adam_m": arrays[kernel], f"{kernel}/adam_v": arrays[kernel], "global_step": np.asarray(7)}
    folder = write(tmp_path / "m", {spelling(n): a for n, a in {**arrays, **extra}.items()})
    for path in (folder, folder / "albert.npz"):
        model = fc.load(path)
        assert (model.config.family, model.config.head) == ("albert", "pretraining")
        check(model, network)


def test_a_fine_tuned_classifier(tmp_path):
    network = network_of("SequenceClassification", num_labels=3)
    model = fc.load(write(tmp_path / "m", variables(network), name="config.json"))
    assert model.config.classes == 3
    check(model, network)


def test_the_names_are_a_bijection_and_write_back_what_was_read(tmp_path):
    arrays = variables(network_of())
    model = fc.load(write(tmp_path / "m", arrays))
    names = albert_tf.names(model.config)
    assert set(names) == set(flatten(model.params)) and len({w.name for w in names.values()}) == len(names)
    again = write_tensors(names, {a: np.asarray(n) for a, n in flatten(model.params).items()})
    assert again.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_without_heads_the_body_is_loaded_and_another_head_put_on_it(tmp_path):
    network = network_of()
    arrays = {n: a for n, a in variables(network).items() if n.startswith("bert/")}
    folder = write(tmp_path / "m", arrays)
    assert fc.load(folder).config.head == "none"
    with torch.no_grad():
        want = network.albert(torch.tensor(IDS), attention_mask=torch.tensor(MASK)).pooler_output
    close(fc.load(folder)(IDS, MASK).pooled, want)
    with pytest.raises(ValueError, match="give a random key"):
        fc.load(folder, head="masked_lm")


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"bert/pooler/dense/bias": None}, {}, "1 variables are missing: bert/pooler/dense/bias"),
        ({"bert/odd": np.ones(2)}, {}, "1 variables that ALBERT does not have: bert/odd"),
        (
            {"bert/pooler/dense/bias": np.full(12, np.nan)},
            {},
            "dense/bias holds float64 values that are not all",
        ),
        ({"bert/pooler/dense/bias": np.array([{}])}, {}, "cannot be read: Object arrays cannot be loaded"),
        ({"bert/pooler/dense/bias": np.ones(3)}, {}, r"pooler/dense/bias has shape \[3\], its config implies \[12\]"),
        ({"module/bert/pooler/dense/bias": np.ones(12)}, {}, "are the same weight"),
        ({}, {"inner_group_num": 2}, "inner_group_num 2 is not supported"),
        ({}, {"gap_size": 1}, "gap_size 1 is not supported"),
        ({}, None, "needs its config beside it: albert_config.json or config.json"),
    ],
)
def test_what_is_wrong_is_named(change, config, message, tmp_path):
    arrays = {n: a for n, a in {**variables(network_of()), **change}.items() if a is not None}
    folder = write(tmp_path / "m", arrays, {**GOOGLE, **(config or {})})
    if config is None:
        (folder / "albert_config.json").unlink()
    with pytest.raises(ValueError, match=message):
        fc.load(folder)


def test_other_archives_are_not_taken_for_one(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    assert albert_tf.find(tmp_path) is None
    (tmp_path / "a.npz").write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match=r"damaged or not an \.npz file"):
        fc.load(tmp_path / "a.npz")
    for name in ("b.npz", "a.npz"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("bert/encoder/transformer/group_0/inner_group_0/LayerNorm/beta.npy", b"")
    with pytest.raises(ValueError, match=r"holds 2 ALBERT checkpoints; name one: a\.npz, b\.npz"):
        fc.load(tmp_path)

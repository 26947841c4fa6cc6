"""Bad input: each one clear line that says where, what was given and what to do, and nothing half written."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flaxcompress import encoding, storage, tree
from flaxcompress import model as model_file
from flaxcompress.config import ModelConfig
from flaxcompress.families.bert import names, write_config
from flaxcompress.folder import load, save
from flaxcompress.formats import Quantized, QuantizedSpec
from flaxcompress.model import Model
from flaxcompress.text import Assets

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s"]
CONFIG = ModelConfig(
    vocabulary=len(VOCABULARY), width=8, layers=2, heads=2, feed_forward_width=12, positions=16
).with_rule("layers/.*/kernel", {"kind": "quantized", "bits": 4, "group": 4})
WEIGHTS = "model.safetensors"


def one_line(caught) -> str:
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@functools.cache
def tiny(dense: bool = False) -> Model:
    """Random weights made on the host: nothing to compile."""
    config = CONFIG.replace(formats=()) if dense else CONFIG
    rng = np.random.default_rng(0)
    flat = {}
    for address, node in model_file.abstract_flat(config).items():
        if isinstance(node, Quantized):
            levels = jnp.asarray(rng.integers(-7, 8, node.shape[::-1]), jnp.float32)
            scale = jnp.asarray(rng.uniform(0.01, 0.1, node.scale.shape), jnp.float32)
            flat[address] = Quantized.from_levels(levels, scale, QuantizedSpec(bits=4, group=4), table=False)
        else:
            flat[address] = jnp.asarray(rng.normal(size=node.shape), jnp.float32)
    files = (("vocab.txt", "\n".join(VOCABULARY).encode()),)
    return Model(params=tree.unflatten(flat), config=config, assets=Assets(files=files, max_length=16))


@pytest.fixture
def own(tmp_path):
    """A folder that `save` wrote."""
    return save(tiny(), tmp_path / "own")


@pytest.fixture
def hf(tmp_path):
    """A stock Hugging Face folder."""
    folder = tmp_path / "hf"
    folder.mkdir()
    flat = tree.flatten(tiny(dense=True).params)
    tensors = {}
    for address, (name, transposed, *_) in names(tiny(dense=True).config).items():
        array = np.asarray(flat[address])
        tensors[name] = np.ascontiguousarray(array.T if transposed else array)
    save_file(tensors, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(write_config(tiny(dense=True).config)))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    return folder


@pytest.fixture(params=["own", "hf"])
def folder(request):
    return request.getfixturevalue(request.param)


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / WEIGHTS)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_both_folders_load(folder):
    assert load(folder).encode([]).shape == (0, 8)


# ── damaged files ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_weights(folder, kept):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors.*(truncated|damaged)"):
        load(folder)


def test_weights_that_are_something_else(folder):
    (folder / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\n")
    with pytest.raises(ValueError, match=r"model\.safetensors.*not a safetensors file") as caught:
        load(folder)
    one_line(caught)


def test_a_flipped_bit_of_our_data_fails_its_checksum(own):
    path = own / WEIGHTS
    clean = path.read_bytes()
    start = 8 + int.from_bytes(clean[:8], "little")
    for position in np.linspace(start, len(clean) - 1, 25).astype(int):
        damaged = bytearray(clean)
        damaged[position] ^= 1
        path.write_bytes(bytes(damaged))
        with pytest.raises(ValueError, match=r"model\.safetensors: tensor '.*' does not match its checksum") as caught:
            load(own)
        one_line(caught)


def test_a_flipped_bit_of_our_header_never_loads_other_weights(own):
    path = own / WEIGHTS
    clean, want = path.read_bytes(), load(own)
    end = 8 + int.from_bytes(clean[:8], "little")
    refused = 0
    for number, position in enumerate(np.linspace(0, end - 1, 150).astype(int)):
        damaged = bytearray(clean)
        damaged[position] ^= 1 << number % 8
        path.write_bytes(bytes(damaged))
        try:
            got = load(own)
        except ValueError as error:
            refused += 1
            assert str(own) in str(error), f"byte {position}: {error} does not say where"
        else:  # the flip hit what does not matter, e.g. a space or the name of a checksum
            jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
    assert refused > 100


def test_values_that_are_not_finite(hf):
    def change(tensors):
        tensors["encoder.layer.1.output.dense.weight"][3, 4] = np.nan
        tensors["encoder.layer.1.output.dense.weight"][0, 1] = np.inf

    change_tensors(hf, change)
    with pytest.raises(ValueError, match=r"'encoder.layer.1.output.dense.weight' holds 2 values that are not finite"):
        load(hf)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe"])
def test_damaged_config(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        load(folder)
    one_line(caught)


# ── folders that are not what they should be ─────────────────────────────────────────────────────────────────────────


def test_missing_tensors(hf):
    change_tensors(hf, lambda t: t.pop("encoder.layer.0.output.dense.bias"))
    with pytest.raises(ValueError, match=r"1 tensor is missing: encoder.layer.0.output.dense.bias"):
        load(hf)


def test_extra_tensors(hf):
    change_tensors(hf, lambda t: t.update({"encoder.layer.2.output.dense.bias": np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match=r"does not have: encoder.layer.2.output.dense.bias"):
        load(hf)


def test_one_weight_under_two_names(hf):
    change_tensors(hf, lambda t: t.update({"bert.pooler.dense.bias": np.zeros(8, np.float32)}))
    with pytest.raises(ValueError, match="are the same weight"):
        load(hf)


def test_missing_and_extra_tensors_of_ours(own):
    def change(tensors):
        tensors["embedding/tokens"] = tensors.pop("embedding/token")

    change_tensors(own, change)
    with pytest.raises(ValueError, match="missing embedding/token; unexpected embedding/tokens"):
        load(own)


def test_shapes_against_config(hf):
    change_config(hf, intermediate_size=13)
    with pytest.raises(ValueError, match=r"intermediate.dense.weight has shape \[12, 8\].*\[13, 8\]"):
        load(hf)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"feed_forward_width": 13}, r"has shape .*config\.json implies"),
        ({"layers": 3, "sharing": None, "local": None}, "missing"),
        ({"formats": []}, "missing layers/0/attention"),
        ({"formats": [["layers/.*/kernel", {"kind": "quantized", "bits": 8}]]}, "config.json implies"),
        ({"formats": [["layers/.*/kernel", {"kind": "quantise"}]]}, "unknown format 'quantise'.*'quantized'"),
        ({"formats": [["layers/.*/bias", {"kind": "quantized"}]]}, "a vector can only be stored dense"),
        ({"widht": 8}, "unknown key 'widht'.*did you mean 'width'"),
        ({"heads": 3}, "width 8 is not divisible by heads 3"),
    ],
)
def test_our_config_against_our_weights(own, change, message):
    config = json.loads((own / "config.json").read_text())["flaxcompress"]
    change_config(own, flaxcompress=config | change)
    with pytest.raises(ValueError, match=message) as caught:
        load(own)
    one_line(caught)


def test_our_config_without_structure(own):
    config = json.loads((own / "config.json").read_text())
    del config["flaxcompress"]
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the key 'flaxcompress' is missing"):
        load(own)


def test_dtypes_against_config(own):
    def change(tensors):
        tensors["layers/0/attention/query/kernel.values"] = tensors["layers/0/attention/query/kernel.values"].view("i1")

    change_tensors(own, change)
    with pytest.raises(ValueError, match=r"query/kernel\.values has dtype int8, config.json implies uint8"):
        load(own)


def test_unknown_model_type(hf):
    change_config(hf, model_type="bertt")
    with pytest.raises(ValueError, match=r"model_type 'bertt' is not supported; known: .*bert.*did you mean 'bert'"):
        load(hf)
    change_config(hf, model_type=None)
    with pytest.raises(ValueError, match="model_type None is not supported"):
        load(hf)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported; known: gelu"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not supported, only 'absolute'"),
        ({"is_decoder": True}, "as a decoder is not supported"),
        ({"num_attention_heads": 3}, "not divisible"),
        ({"vocab_size": "9"}, "vocabulary must be a positive integer, got '9'"),
    ],
)
def test_configs_that_are_not_supported(hf, change, message):
    change_config(hf, **change)
    with pytest.raises(ValueError, match=message):
        load(hf)


def test_config_that_lacks_a_size(hf):
    config = json.loads((hf / "config.json").read_text())
    del config["hidden_size"]
    (hf / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="a bert config needs hidden_size"):
        load(hf)


def test_an_output_matrix_of_its_own_is_not_taken_for_the_token_table(hf):
    """`tie_word_embeddings: false`: leaving the decoder out would give other logits without a word."""

    def change(tensors):
        tensors["cls.predictions.transform.dense.weight"] = np.eye(8, dtype=np.float32)
        for name in ("transform.dense.bias", "transform.LayerNorm.weight", "transform.LayerNorm.bias"):
            tensors[f"cls.predictions.{name}"] = np.ones(8, np.float32)
        tensors["cls.predictions.bias"] = np.zeros(9, np.float32)
        tensors["cls.predictions.decoder.weight"] = np.ones((9, 8), np.float32)

    change_tensors(hf, change)
    change_config(hf, architectures=["BertForMaskedLM"], tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"decoder|tie_word_embeddings"):
        load(hf)


def test_head_that_the_checkpoint_lacks(hf):
    with pytest.raises(ValueError, match=r"'masked_lm' has no weights in this checkpoint.*key=jax.random.key"):
        load(hf, head="masked_lm")
    with pytest.raises(ValueError, match="unknown head 'mlm'"):
        load(hf, head="mlm")


def test_pickled_weights_are_refused_with_the_way_out(hf):
    (hf / WEIGHTS).unlink()
    (hf / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin: pickled weights are never read.*safe_serialization"
    ) as e:
        load(hf)
    one_line(e)


def test_no_weights_no_config_no_folder(hf, tmp_path, monkeypatch):
    (hf / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load(hf)
    (hf / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(hf)
    with pytest.raises(FileNotFoundError, match=r"no such folder, hub id \(owner/name\) or alias \(minilm\)"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        load(tmp_path / "file")


@pytest.fixture
def sharded(hf):
    tensors = load_file(hf / WEIGHTS)
    (hf / WEIGHTS).unlink()
    ordered = sorted(tensors)
    shards = {"model-1.safetensors": ordered[::2], "model-2.safetensors": ordered[1::2]}
    for shard, held in shards.items():
        save_file({n: tensors[n] for n in held}, hf / shard)
    weight_map = {n: shard for shard, held in shards.items() for n in held}
    (hf / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return hf, weight_map


def test_sharded_loads(sharded):
    jax.tree.map(np.testing.assert_array_equal, load(sharded[0]).params, tiny(dense=True).params)


@pytest.mark.parametrize("outside", ["../evil.safetensors", "/tmp/evil.safetensors", "sub/x.safetensors", "..", ""])
def test_sharded_index_pointing_outside(sharded, outside):
    folder, weight_map = sharded
    index = {"weight_map": weight_map | {next(iter(weight_map)): outside}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lies outside the folder; refused"):
        load(folder)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_damaged_index(sharded, index):
    (sharded[0] / f"{WEIGHTS}.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load(sharded[0])


def test_missing_shard(sharded):
    (sharded[0] / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names 'model-2\.safetensors', which does not exist"):
        load(sharded[0])


# ── saving ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def listing(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_existing_folder_is_left_alone(own, tmp_path):
    before = listing(tmp_path)
    with pytest.raises(ValueError, match="exists and is not empty; choose another output or add --overwrite"):
        save(tiny(dense=True), own)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="exists and is not a folder"):
        save(tiny(), tmp_path / "file")
    assert listing(tmp_path) == {**before, "file": b"x"}


def test_empty_and_overwritten_folders_are_written(own, tmp_path):
    (tmp_path / "empty").mkdir()
    save(tiny(), tmp_path / "empty")
    (own / "old.txt").write_text("of the model before")
    save(tiny(dense=True), own, overwrite=True)
    assert load(own).config == tiny(dense=True).config
    assert not (own / "old.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "own"]


def full_disk(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["safetensors.numpy.save_file", "os.fsync", "flaxcompress.storage.write_files"])
def test_a_full_disk_leaves_no_partial_folder(where, overwrite, tmp_path, monkeypatch):
    out = tmp_path / "deep" / "out"
    if overwrite:
        save(tiny(dense=True), out)
    before = listing(tmp_path)
    monkeypatch.setattr(where, full_disk)
    with pytest.raises(
        ValueError, match=r"out: cannot be written \(No space left on device\); nothing was changed"
    ) as e:
        save(tiny(), out, overwrite=overwrite)
    one_line(e)
    assert listing(tmp_path) == before
    assert [p.name for p in (tmp_path / "deep").iterdir()] == (["out"] if overwrite else [])


def test_a_disk_that_really_fails(tmp_path):
    """The safetensors writer is no Python code: its error is not an OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ValueError, match="out: cannot be written") as caught:
            save(tiny(), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    one_line(caught)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_save_leaves_nothing(error, tmp_path, monkeypatch):
    def stop(*args, **options):
        raise error("stop")

    monkeypatch.setattr(storage, "write_files", stop)
    with pytest.raises(error):
        save(tiny(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "out", "/proc/nowhere/out"):
        with pytest.raises(ValueError, match=r"cannot be written|is not a folder") as caught:
            save(tiny(), out)
        one_line(caught)
    if os.geteuid() == 0:
        return  # root writes anywhere
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(ValueError, match="cannot be written to"):
        save(tiny(), locked / "out")


def test_a_failed_exchange_brings_the_old_folder_back(own, tmp_path, monkeypatch):
    before = listing(own)
    rename = type(own).rename

    def fail(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(type(own), "rename", fail)
    with pytest.raises(ValueError, match="nothing was changed"):
        save(tiny(dense=True), own, overwrite=True)
    assert listing(own) == before
    assert [p.name for p in tmp_path.iterdir()] == ["own"]


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_tokenizer(folder):
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink(missing_ok=True)
    model = load(folder)  # the network itself works
    assert not model.assets.has_tokenizer
    with pytest.raises(ValueError, match=r"no tokenizer: put tokenizer\.json beside its config\.json"):
        model.encode(["the cat"])


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("tokenizer.json", b"{}", r"tokenizer\.json cannot be read"),
        ("tokenizer.json", b"\xff\xfe", r"tokenizer\.json cannot be read"),
        ("vocab.txt", b"just\nwords\n", r"vocab\.txt has no '\[UNK\]' among its 2 entries"),
        ("vocab.txt", b"\xff\xfe\n", r"vocab\.txt"),
        ("tokenizer_config.json", b"{", r"tokenizer_config\.json"),
    ],
)
def test_damaged_tokenizer(hf, file, content, message):
    (hf / file).write_bytes(content)
    model = load(hf)
    with pytest.raises(ValueError, match=message):
        model.encode(["the cat"])


def fake_vectors(params, ids, mask, *rest):
    """Stands in for the network, which these tests are not about."""
    return np.stack([ids.sum(1), mask.sum(1)] * 4, axis=1).astype(np.float32)


@pytest.mark.parametrize(
    "text, tokens",
    [("", 2), (" \t\n ", 2), ("x" * 100_000, 3), ("the cat " * 12_500, 16), ("\x00\ufffd", 2), ("the", 3)],
    ids=["empty", "whitespace", "long-word", "long-line", "controls", "plain"],
)
def test_odd_texts_are_encoded(text, tokens, monkeypatch):
    monkeypatch.setattr(encoding, "_sentence_vectors", fake_vectors)
    vectors = tiny().encode([text, "the cat"])
    assert vectors[:, 1].tolist() == [tokens, 4]


@pytest.mark.slow
def test_vectors_of_odd_texts_are_finite():
    vectors = tiny().encode(["", "   ", "x" * 100_000, "the cat"])
    assert np.isfinite(vectors).all()
    np.testing.assert_array_equal(vectors[0], vectors[1])


def test_invalid_unicode_is_named():
    with pytest.raises(ValueError, match=r"text 1 is not valid Unicode: 'bad") as caught:
        tiny().encode(["good", "bad \udcff"])
    one_line(caught)


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["a", "list"]])
def test_texts_that_are_no_strings(text):
    with pytest.raises(TypeError, match=f"text 1 is {type(text).__name__}, not a string"):
        tiny().encode(["good", text])


def test_ids_outside_the_vocabulary():
    with pytest.raises(ValueError, match="values 0 … 9 lie outside the vocabulary 0 … 8"):
        tiny()([[0, 9]])
    with pytest.raises(ValueError, match="values -1 … 3 lie outside the vocabulary"):
        tiny()([[-1, 3]])


def test_a_tokenizer_with_more_entries_than_the_table():
    """`encode` would read the table's last row for every id past it."""
    files = (("vocab.txt", "\n".join([*VOCABULARY, "dog"]).encode()),)
    model = tiny().replace(assets=dataclasses.replace(tiny().assets, files=files))
    with pytest.raises(ValueError, match="vocabulary"):
        model.encode(["the dog"])


def test_too_many_tokens():
    with pytest.raises(ValueError, match="17 tokens, but the model has 16 positions"):
        tiny()(np.ones((1, 17), int))


def test_a_folder_copied_without_its_weights_says_so(own, tmp_path):
    shutil.copytree(own, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"copy: no model\.safetensors"):
        load(tmp_path / "copy")

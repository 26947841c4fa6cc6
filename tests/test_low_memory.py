"""Compressing a folder layer by layer: equal to compressing in memory, resumable, one layer held at a time."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
from quick import quick
from safetensors.numpy import load_file, save_file
from tiny_models import make_model, make_sentences, words

import flaxcompress as fc
from flaxcompress import storage, tree
from flaxcompress.compress.layer_store import LayerStore
from flaxcompress.config import Rotary, Sharing
from flaxcompress.data import CalibrationText
from flaxcompress.families import FAMILIES
from flaxcompress.families.base import write_tensors
from flaxcompress.folder import open_model, tensors_of
from flaxcompress.formats import materialize
from flaxcompress.weights import FamilyWeights

VOCABULARY = words(60)
SENTENCES = make_sentences(VOCABULARY, 90)
TEXT = CalibrationText("words", tuple(SENTENCES[:70]), tuple(SENTENCES[70:]))
LAYERS = 3
LLAMA = {
    **{"family": "llama", "width": 16, "layers": LAYERS, "feed_forward_width": 24, "key_value_heads": 2},
    **{"positions": 32, "segments": 0, "activation": "silu", "pooler": False, "position_embedding": "none"},
    **{"embedding_norm": False, "rotary": Rotary(), "causal": True, "gated": True, "norm": "rms", "norm_place": "pre"},
    **{"final_norm": True, "attention_bias": False, "output_bias": False, "feed_forward_bias": False},
    **{"head": "causal_lm", "tied": False, "dropout": 0.0, "attention_dropout": 0.0, "head_bias": False},
}
BERT = {"width": 16, "layers": LAYERS, "feed_forward_width": 24, "positions": 32, "pooler": True}
KERNELS = r"layers/\d+/.*/kernel"


def write_source(name, folder):
    """A Hugging Face folder: bfloat16, in shards of a few tensors."""
    folder.mkdir(exist_ok=True)
    model = make_model(VOCABULARY, **{"llama": LLAMA, "bert": BERT}[name])
    family = FAMILIES[model.config.family]
    flat = {a: np.asarray(node) for a, node in tree.flatten(model.params).items()}
    tensors = write_tensors(family.names(model.config), flat)
    names = sorted(tensors)
    shards = {f"model-{i}.safetensors": names[i::4] for i in range(4)}
    for file, held in shards.items():
        save_file({n: np.ascontiguousarray(tensors[n]).astype(ml_dtypes.bfloat16) for n in held}, folder / file)
    index = {"weight_map": {n: file for file, held in shards.items() for n in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(family.write_config(model.config)))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    return folder


def recipe(*steps):
    return fc.Recipe(list(steps), scrambled=0.0)


SEQUENTIAL = recipe(fc.LowRank(KERNELS, keep=0.6, sequential=True, sentences=40), fc.Quantize(bits=8, sentences=40))
# Whose matrices come from the same programs on the same inputs, bit for bit.
EQUAL = {
    "sequential": SEQUENTIAL,
    "plain": recipe(
        fc.LowRank(r"layers/\d+/feed_forward/.*/kernel", keep=0.5, whitening="none"),
        fc.Quantize(bits=4, group=8, rounding="mse"),
    ),
    "mixed": recipe(
        fc.Trim(dtype="float16"),
        fc.Quantize(bits=4, sentences=40, pattern=KERNELS, overrides=(fc.BitsFor(pattern=r".*/query/kernel", bits=3),)),
    ),
    "pruned": recipe(
        fc.Prune(n_of_m="2:4", by="sparsegpt", sentences=40),
        fc.Quantize(bits=8, pattern=r"layers/\d+/attention/.*/kernel|embedding/token", sentences=40),
    ),
    "wanda": recipe(fc.Prune(sparsity=0.5, sentences=40)),
    "tensors": recipe(
        fc.Tensorize(
            r"layers/[12]/feed_forward/.*/kernel", kind="tensor_train", keep=0.7, input_modes=2, whitened=False
        )
    ),
}


CASES = quick(itertools.product(["llama", "bert"], EQUAL), {("llama", "sequential"), ("bert", "mixed")})


@pytest.mark.parametrize(("family", "name"), CASES)
def test_equals_compression_in_memory(family, name, tmp_path):
    source = write_source(family, tmp_path / family)
    report = fc.compress_folder(source, EQUAL[name], tmp_path / "out", calibration=TEXT, work=tmp_path / "work")
    want = fc.compress(fc.load(source), EQUAL[name], calibration=TEXT, key=jax.random.key(0))[0]
    small = fc.load(tmp_path / "out")
    assert small.config.replace(formats=()) == want.config.replace(formats=())
    got = tensors_of(small)
    for address, array in tensors_of(want).items():
        np.testing.assert_array_equal(got.pop(address), array, err_msg=address)
    assert not got and not (tmp_path / "work").exists()
    assert report.bytes["after"] == (tmp_path / "out" / storage.WEIGHTS).stat().st_size
    assert [row["layer"] for row in report.layers if row["layer"].startswith("layers")] == [
        f"layers/{i}" for i in range(LAYERS)
    ]
    assert sum(row["bytes"] for row in report.layers) == small.nbytes
    assert report.params["after"] == small.parameters == report.steps[-1]["params"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["layers"]


@pytest.mark.parametrize(
    "step",
    [
        fc.LowRank(KERNELS, keep=0.6, sentences=70),
        pytest.param(fc.LowRank(KERNELS, rank=4, whitening="asvd", sentences=70), marks=pytest.mark.slow),
        pytest.param(fc.Tensorize(r"layers/\d+/feed_forward/.*/kernel", keep=0.6), marks=pytest.mark.slow),
    ],
    ids=["activation", "asvd", "tucker"],
)
def test_statistics_of_one_layer_at_a_time(step, tmp_path):
    """Second moments are summed in another order there; factors turn with them, their products do not."""
    source = write_source("bert", tmp_path / "bert")
    fc.compress_folder(source, recipe(step), tmp_path / "out", calibration=TEXT, work=tmp_path / "work")
    small = tree.View(fc.load(tmp_path / "out").params)
    want = tree.View(fc.compress(fc.load(source), recipe(step), calibration=TEXT, key=jax.random.key(0))[0].params)
    assert small.keys() == want.keys()
    tokens = sum(len(s.split()) + 2 for s in TEXT.train)
    for address, node in want.items():
        found, dense = np.asarray(materialize(small[address])), np.asarray(materialize(node))
        # The sums' rounding, √tokens·ε, in the eigenvalues; eigenvectors take it by the gaps, 100 times that at most.
        atol = 100 * np.finfo(np.float32).eps * np.sqrt(tokens) * np.abs(dense).max()
        np.testing.assert_allclose(found, dense, rtol=0, atol=atol, err_msg=address)


@pytest.mark.parametrize("after", quick([0, 4, 10], {4}))
def test_an_interrupted_run_goes_on_at_its_layer(after, tmp_path, monkeypatch):
    source = write_source("llama", tmp_path / "llama")
    write, written = LayerStore.write, []

    def failing(self, group, *rest):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append((self.folder.name, group))
        write(self, group, *rest)

    run = functools.partial(fc.compress_folder, source, SEQUENTIAL, calibration=TEXT, work=tmp_path / "work")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LayerStore, "write", failing)
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    before = list(written)
    with monkeypatch.context() as patch:
        patch.setattr(LayerStore, "write", lambda *args: (written.append((args[0].folder.name, args[1])), write(*args)))
        report = run(tmp_path / "out")
    assert len(written) == len(set(written)) == 2 * len(report.layers) and written[: len(before)] == before
    want = run(tmp_path / "whole")
    assert [s["rank"] for s in report.spectra] == [s["rank"] for s in want.spectra]
    got, whole = (load_file(tmp_path / name / storage.WEIGHTS) for name in ("out", "whole"))
    assert got.keys() == whole.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_one_layer_is_held(tmp_path, monkeypatch):
    """Of the original's matrices, at most those of one layer are alive while another one's are read."""
    source = write_source("llama", tmp_path)
    read, alive, most = FamilyWeights.__getitem__, {}, [0]

    def watched(self, address):
        found = read(self, address)
        alive[address] = weakref.ref(found)
        gc.collect()
        at = tree.place(address)
        held = {p.number for a, ref in alive.items() if ref() is not None and (p := tree.place(a))}
        most[0] = max(most[0], len(held - {at.number} if at else held))
        return found

    monkeypatch.setattr(FamilyWeights, "__getitem__", watched)
    fc.compress_folder(source, SEQUENTIAL, tmp_path / "out", calibration=TEXT, work=tmp_path / "work")
    assert most[0] <= 1 and len(alive) == len(open_model(source).weights)


@pytest.mark.slow
def test_the_folder_computes_the_same_in_pytorch(tmp_path):
    pytest.importorskip("torch")
    from flaxcompress.export.torch import check_folder

    source = write_source("llama", tmp_path)
    fc.compress_folder(source, SEQUENTIAL, tmp_path / "out", calibration=TEXT, work=tmp_path / "work")
    check_folder(fc.load(tmp_path / "out"), tmp_path / "out")


@pytest.mark.slow
def test_a_compressed_folder_is_a_source(tmp_path):
    """Low rank from one run, its factors rounded by another."""
    source, (first, second) = write_source("llama", tmp_path), SEQUENTIAL.steps
    fc.compress_folder(source, recipe(first), tmp_path / "a", calibration=TEXT, work=tmp_path / "work")
    fc.compress_folder(tmp_path / "a", recipe(second), tmp_path / "b", calibration=TEXT, work=tmp_path / "work")
    fc.compress_folder(source, SEQUENTIAL, tmp_path / "both", calibration=TEXT, work=tmp_path / "work")
    got, want = (load_file(tmp_path / name / storage.WEIGHTS) for name in ("b", "both"))
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([fc.Heal(steps=1)], "Heal needs .*; what works layer by layer: LowRank, Prune, Quantize, Tensorize, Trim"),
        ([fc.LowRank(KERNELS, keep=0.5, allocation="energy")], "LowRank: allocation 'energy' .* use uniform"),
        ([fc.LowRank(KERNELS, keep=0.5, whitening="two_sided")], "needs gradient_moments; use none, pca, asvd"),
        ([fc.Quantize(average_bits=3.0)], "Quantize: average_bits .* set bits"),
    ],
)
def test_what_needs_the_whole_model_is_refused(steps, message, tmp_path):
    source = write_source("bert", tmp_path)
    with pytest.raises(ValueError, match=message):
        fc.compress_folder(source, recipe(*steps), tmp_path / "out", calibration=TEXT, work=tmp_path / "work")
    assert not (tmp_path / "work").exists() and not (tmp_path / "out").exists()


def test_shared_layers_are_refused(tmp_path):
    model = make_model(VOCABULARY, **BERT, sharing=Sharing.named("all", layers=LAYERS))
    fc.save(model, tmp_path / "shared")
    with pytest.raises(ValueError, match="share their attention, feed_forward, norms"):
        fc.compress_folder(tmp_path / "shared", SEQUENTIAL, tmp_path / "out", calibration=TEXT, work=tmp_path / "work")


def test_a_checkpoint_without_safetensors_is_refused(tmp_path):
    width, inner, vocabulary, length = 8, 16, 10, 4
    header = np.asarray([width, inner, 1, 2, 2, vocabulary, length], "<i4")  # llama2.c's, of one layer
    values = vocabulary * width + 4 * width**2 + 3 * width * inner + 3 * width + length * width // 2
    (tmp_path / "stories.bin").write_bytes(header.tobytes() + bytes(4 * values))
    with pytest.raises(ValueError, match="no Hugging Face folder, and is read whole; leave out --low-memory"):
        fc.compress_folder(tmp_path / "stories.bin", SEQUENTIAL, tmp_path / "out", work=tmp_path / "work")
    assert not (tmp_path / "work").exists() and not (tmp_path / "out").exists()


def test_joining_files_keeps_every_tensor(tmp_path):
    rng = np.random.default_rng(0)
    parts = [
        {"a": rng.normal(size=(3, 5)).astype(np.float32), "b": rng.integers(0, 255, 7).astype(np.uint8)},
        {"c": rng.normal(size=3).astype(ml_dtypes.bfloat16), "d": np.zeros((0, 4), np.float16)},
    ]
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for file, part in zip(files, parts, strict=True):
        storage.write_tensors(file, part)
    storage.join_tensors(tmp_path / "all.safetensors", files)
    found = storage.Tensors([tmp_path / "all.safetensors"])
    assert sorted(found) == ["a", "b", "c", "d"]
    for name, array in (parts[0] | parts[1]).items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    with pytest.raises(ValueError, match="'a' is in another"):
        storage.join_tensors(tmp_path / "twice.safetensors", [files[0], files[0]])


def test_rows_are_read_in_the_order_asked_for(tmp_path):
    source = open_model(write_source("llama", tmp_path))
    ids = np.array([5, 2, 5, 60])
    table = source.weights["embedding/token"]
    np.testing.assert_array_equal(source.weights.rows("embedding/token", ids), table[ids])  # pyright: ignore[reportAttributeAccessIssue]

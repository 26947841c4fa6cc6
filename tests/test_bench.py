"""The comparison with other runtimes: what it returns, not how fast anything is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from quick import quick
from rich.console import Console

from flaxcompress.bench import (
    RIVALS,
    BenchResult,
    Contestant,
    bench,
    bench_encode,
    cold_start,
    compare,
    energy,
    make_batch,
)
from flaxcompress.bench.pytorch import Torch
from flaxcompress.config import ModelConfig
from flaxcompress.export import export
from flaxcompress.folder import load, save
from flaxcompress.model import Model
from flaxcompress.text import Assets, Pooling

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "cats", "see", "dogs"]


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A saved folder of ours, with an int8 matrix."""
    config = ModelConfig(
        vocabulary=len(VOCABULARY), width=16, layers=1, heads=2, feed_forward_width=32, positions=16, pooler=False
    ).with_rule("layers/0/feed_forward/up/kernel", {"kind": "quantized", "bits": 8})
    assets = Assets(
        files=(("vocab.txt", "\n".join(VOCABULARY).encode()),), pooling=Pooling("mean", True), max_length=16, source="x"
    )
    folder = tmp_path_factory.mktemp("bench") / "own"
    return save(Model.init(config, key=jax.random.key(0), assets=assets), folder)


@pytest.fixture(scope="module")
def stock(own) -> Path:
    """The same weights as a stock folder."""
    return export(load(own), own.parent / "stock")


def show(result: BenchResult) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result.table())
    return console.export_text()


def contestant(**changes) -> Contestant:
    values = dict(
        model="small",
        runtime="flaxcompress",
        median_ms=2.5,
        tokens_per_second=1e4,
        speed={"median": 1.5, "q1": 1.4, "q3": 1.6},
        latency_p50_ms=1.0,
        latency_p95_ms=2.0,
        import_seconds=1.0,
        load_seconds=0.5,
        first_call_seconds=3.0,
        peak_bytes=300_000_000,
        bytes=9_100_000,
    )
    return Contestant(**{**values, **changes})


@pytest.mark.slow
def test_bench_against_torch(own, stock):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found = bench([stock, own], batch=3, length=8, rounds=3)
    names = [(Path(one.model).name, one.runtime) for one in found.contestants]
    assert names == [("stock", "flaxcompress"), ("own", "flaxcompress"), ("stock", "torch"), ("own", "torch")]
    assert found.baseline == f"{stock} torch" and found.contestants[2].speed == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    for one in found.contestants:
        assert 0 < one.latency_p50_ms <= one.latency_p95_ms and one.median_ms > 0
        assert one.tokens_per_second == pytest.approx(3 * 8 / one.median_ms * 1e3)
        assert one.speed["q1"] <= one.speed["median"] <= one.speed["q3"]
        assert one.import_seconds > 0 and one.load_seconds > 0 and one.first_call_seconds > 0
        assert one.peak_bytes > 50e6  # the runtime itself
        assert (one.difference is None) == (one.runtime == "flaxcompress")
        assert one.difference is None or one.difference < 1e-4
    sizes = [one.bytes for one in found.contestants]
    assert sizes[0] == sizes[2] == (stock / "model.safetensors").stat().st_size and sizes[1] < sizes[0]
    assert json.loads(json.dumps(found.to_json()))["rounds"] == 3
    assert "tokens per second" in show(found)


def test_a_runtime_that_is_not_installed_is_left_out_with_a_note(stock, monkeypatch):
    monkeypatch.setitem(RIVALS, "torch", ("torch_that_nobody_has",))
    monkeypatch.setattr(compare, "in_process_of_its_own", lambda *_: COLD)
    found = bench([stock], batch=2, length=8, rounds=2)
    assert [one.runtime for one in found.contestants] == ["flaxcompress"] and found.baseline.endswith("flaxcompress")
    assert any("torch_that_nobody_has" in note and "pip install" in note for note in found.notes)
    assert "pip install" in " ".join(show(found).split())


COLD = {"import_seconds": 1.0, "load_seconds": 1.0, "first_call_seconds": 1.0, "peak_bytes": 1}


def test_bench_encode(own):
    pytest.importorskip("sentence_transformers")
    sentences = ["one cat", "two dogs see cats", "one"] * 7
    found = bench_encode(load(own), own, sentences, 2, name="own")
    assert (found.model, found.n, found.rounds) == ("own", 21, 2) and found.difference < 2e-3
    assert found.sentences_per_second > 0 and found.rival_sentences_per_second > 0
    result = BenchResult(
        batch=1,
        length=8,
        rounds=2,
        latency_length=8,
        threads=1,
        device="cpu",
        baseline="own torch",
        contestants=(contestant(model="own"), contestant(model="own", runtime="torch"), contestant(model="other")),
        encode=(found,),
    )
    assert "encode 21 sentences" in show(result) and "of the rival's" in show(result)
    with pytest.raises(ValueError, match="sentences"):
        bench_encode(load(own), own, [])


def test_a_process_of_its_own_reports_or_says_why_not(stock):
    shapes = {"batch": 2, "length": 4, "vocabulary": len(VOCABULARY), "seed": 0}
    found = cold_start.in_process_of_its_own("flaxcompress", stock, shapes)
    assert set(found) == set(COLD) and all(value > 0 for value in found.values())
    with pytest.raises(RuntimeError, match=r"nowhere.*flaxcompress failed"):
        cold_start.in_process_of_its_own("flaxcompress", stock.parent / "nowhere", shapes)


def test_code_of_a_folder_is_run_only_when_it_is_ours(own, tmp_path):
    pytest.importorskip("torch")
    folder = save(load(own), tmp_path / "changed")
    (folder / "modeling_flaxcompress.py").write_text("raise SystemExit('this must not run')")
    for use in (Torch, lambda folder: bench_encode(load(folder), folder, ["one"])):
        with pytest.raises(ValueError, match="no other code is run"):
            use(folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"models": []}, "no model"),
        ({"models": ["a", "a"]}, "twice"),
        ({"against": ["tourch"]}, "did you mean 'torch'"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"encode": -1}, "encode must be at least 0"),
        ({"length": 17}, "16 positions"),
    ],
)
def test_arguments_are_checked(arguments, words, stock):
    with pytest.raises(ValueError, match=words):
        bench(**{"models": [stock], **arguments})


def test_make_batch():
    ids, mask = make_batch(batch=50, length=10, vocabulary=7, seed=3)
    assert ids.shape == mask.shape == (50, 10) and ids.dtype == np.int32 and 0 <= ids.min() <= ids.max() < 7
    lengths = mask.sum(1)
    assert lengths[0] == 10 and set(lengths) == set(range(5, 11)) and not ids[~mask].any()
    assert (np.sort(mask, axis=1)[:, ::-1] == mask).all()  # padding stands at the end
    for one, other in zip(make_batch(batch=50, length=10, vocabulary=7, seed=3), (ids, mask), strict=True):
        np.testing.assert_array_equal(one, other)
    assert make_batch(batch=1, length=1, vocabulary=2)[1].tolist() == [[True]]


def test_energy_counters(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "_POWER", tmp_path)
    assert not energy.Energy().readable
    for name, used in (("intel-rapl:0", 900), ("intel-rapl:1", 100), ("intel-rapl:0:0", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{used}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000\n")
    meter = energy.Energy()
    assert meter.readable and meter.read() == [900, 100]
    before = meter.read()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("50\n")  # wrapped around
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("130\n")
    assert meter.since(before) == pytest.approx((150 + 30) / 1e6)
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("denied\n")
    assert not energy.Energy().readable


def test_the_probe_loads_without_heavy_libraries():
    source = (Path(cold_start.__file__).parent / "probe.py").read_text()
    top = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert not any(name in line for line in top for name in ("jax", "torch", "flax", "transformers"))


@pytest.mark.parametrize("kind", quick(["own", "stock"], ["own"]))
def test_pytorch_pays_for_nothing_of_jax(kind, request):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    shapes = {"batch": 2, "length": 4, "vocabulary": len(VOCABULARY), "seed": 0}
    folder = request.getfixturevalue(kind)
    code = f"""
        import json, runpy, sys
        sys.argv[1:] = [json.dumps({{"runtime": "torch", "folder": {str(folder)!r}, "shapes": {shapes}}})]
        runpy.run_path({str(Path(cold_start.__file__).parent / "probe.py")!r}, run_name="__main__")
        print(json.dumps(sorted(sys.modules)))
    """
    command = [sys.executable, "-P", "-c", "\n".join(line.strip() for line in code.splitlines())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found, modules = map(json.loads, done.stdout.strip().splitlines()[-2:])
    assert set(found) == set(COLD) and all(value > 0 for value in found.values())
    assert {"torch", "transformers"} <= set(modules)
    assert [name for name in modules if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax")] == []
    ours = {name for name in modules if name.split(".")[0] == "flaxcompress"}
    files = ("bench.batch", "bench.pytorch", "bench.runtimes", "export.code", "export.quiet", "machine")
    assert ours <= {"flaxcompress", "flaxcompress.bench", "flaxcompress.export"} | {f"flaxcompress.{f}" for f in files}

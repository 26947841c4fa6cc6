"""The command line: exit codes, one-line errors, and the verbs on a tiny model."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from flaxcompress import bench as bench_module
from flaxcompress import cli
from flaxcompress.cli.compress import work_folder
from flaxcompress.cli.files import write_vectors
from flaxcompress.cli.parse import parse
from flaxcompress.config import ModelConfig
from flaxcompress.evaluate import TASKS, options_of
from flaxcompress.folder import load, save
from flaxcompress.model import Model
from flaxcompress.text import Assets, Pooling

# The package exports functions of these names, so attribute paths do not lead to the modules.
COMPRESS_RUN = importlib.import_module("flaxcompress.compress.run")
EXPORT_TORCH = importlib.import_module("flaxcompress.export.torch")

ROOT = Path(__file__).resolve().parent.parent
WORDS = [
    "the",
    "a",
    "one",
    "two",
    "red",
    "blue",
    "green",
    "small",
    "large",
    "old",
    "new",
    "cat",
    "dog",
    "tree",
    "house",
]
WORDS += ["river", "bird", "stone", "sees", "finds", "likes", "holds"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
RECIPE = "steps:\n  - Quantize: {bits: 8}\n"
# Files and folders that the commands below name, made anew for each: {name: content, None for a folder}.
FILES = {
    "empty.txt": b"",
    "blank.txt": b" \n\n",
    "latin.txt": b"one cat\nr\xe9d\n",
    "few.txt": b"the old cat sees a dog\n",
    "table.csv": b"a,b\n",
    "pairs.tsv": b"sentence1\tsentence2\tscore\na cat\ta dog\thigh\n",
    "not-empty/file": b"precious",
    "no-config/file": b"",
    "pickle/config.json": b'{"model_type": "bert", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, '
    b'"num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 8}',
    "pickle/pytorch_model.bin": b"",
    "odd/config.json": b'{"model_type": "brt"}',
    "torn/config.json": b'{"model_type": ',
    "bad-step.yaml": b"steps:\n  - Quantise: {bits: 8}\n",
    "bad-key.yaml": b"steps:\n  - Quantize: {bit: 8}\n",
    "bad-bits.yaml": b"steps:\n  - Quantize: {bits: 7}\n",
    "bad.yaml": b"steps: [",
    "recipe.yaml": RECIPE.encode(),
}
# command -> what its one line must say
WRONG = {
    "": ["no command", "inspect"],
    "inspct {tiny}": ["inspct", "did you mean 'inspect'"],
    "--jsn x": ["--jsn"],
    "inspect": ["inspect", "MODEL"],
    "inspect {tiny} other": ["other"],
    "inspect {tiny} --jsn x": ["--jsn", "did you mean '--json'"],
    "inspect {tiny} --json": ["--json"],
    "inspect {tiny} --json not-empty": ["not-empty", "folder"],
    "inspect {tiny} --json nowhere/x.json": ["nowhere", "create it"],
    "inspect nowhere": ["nowhere", "no such folder"],
    "inspect few.txt": ["few.txt", "file"],
    "inspect no-config": ["no-config", "config.json"],
    "inspect pickle": ["pytorch_model.bin", "save_pretrained"],
    "inspect odd": ["'brt'", "did you mean 'bert'"],
    "inspect torn": ["torn", "JSON"],
    "compress {tiny}": ["--out"],
    "compress {tiny} --out": ["--out"],
    "compress {tiny} --out small --heal-steps x": ["--heal-steps", "'x'"],
    "compress {tiny} --out small --heal-steps -1": ["heal-steps", "-1"],
    "compress {tiny} --out small --steps 3": ["unknown flag '--steps'", "--heal-steps"],
    "compress {tiny} --out not-empty": ["not-empty", "--overwrite"],
    "compress {tiny} --out few.txt": ["few.txt", "not a folder"],
    "compress nowhere --out small": ["nowhere"],
    "compress {tiny} --out small --recipe balancd": ["balancd", "did you mean 'balanced'"],
    "compress {tiny} --out small --recipe nowhere.yaml": ["nowhere.yaml", "no such"],
    "compress {tiny} --out small --recipe bad.yaml": ["bad.yaml", "YAML"],
    "compress {tiny} --out small --recipe bad-step.yaml": ["Quantise", "did you mean 'Quantize'"],
    "compress {tiny} --out small --recipe bad-key.yaml": ["'bit'", "did you mean 'bits'"],
    "compress {tiny} --out small --recipe bad-bits.yaml": ["7"],
    "compress {tiny} --out small --target huge": ["huge", "8x"],
    "compress {tiny} --out small --target 0x": ["0x"],
    "compress {tiny} --out small --target 2x --max-drop 1%": ["--target", "--max-drop", "give one"],
    "compress {tiny} --out small --low-memory --target 2x": ["--low-memory", "--target", "leave one out"],
    "compress {tiny} --out small --low-memory": ["needs the whole model", "LowRank", "Quantize"],
    "compress {tiny} --out small --max-drop 1": ["--max-drop", "1%"],
    "compress {tiny} --out small --target 100x": ["cannot be reached", "smallest"],
    "compress {tiny} --out small --mesh data=3": ["data=3", "devices"],
    "compress {tiny} --out small --mesh date=1": ["'date'", "did you mean 'data'"],
    "sensitivity {tiny}": ["--out"],
    "sensitivity {tiny} --out not-empty": ["not-empty", "--overwrite"],
    "sensitivity {tiny} --out minds --recipes balancd": ["balancd", "did you mean 'balanced'"],
    "sensitivity {tiny} --out minds --data nowhere": ["nowhere", "no such file"],
    "compress {tiny} --out small --data": ["--data", "at least one"],
    "compress {tiny} --out small --recipe recipe.yaml --data nowhere": ["nowhere", "no such file"],
    "compress {tiny} --out small --recipe recipe.yaml --data empty.txt": ["empty.txt", "empty"],
    "compress {tiny} --out small --recipe recipe.yaml --data blank.txt": ["blank.txt"],
    "compress {tiny} --out small --recipe recipe.yaml --data latin.txt": ["latin.txt, line 2", "UTF-8"],
    "compress {tiny} --out small --recipe recipe.yaml --data few.txt": ["few.txt", "at least 32"],
    "compress {tiny} --out small --recipe recipe.yaml --data table.csv": ["table.csv", "convert"],
    "evaluate {tiny}": ["--task"],
    "evaluate {tiny} --task stss": ["stss", "did you mean 'sts'"],
    "evaluate {tiny} --task sts": ["sts", "no data"],
    "evaluate {tiny} --task sts --data nowhere.tsv": ["nowhere.tsv", "no such file"],
    "evaluate {tiny} --task sts --data pairs.tsv": ["pairs.tsv, line 2", "high"],
    "evaluate {tiny} --task fidelity": ["--reference"],
    "evaluate {tiny} --task fidelity --reference nowhere": ["nowhere"],
    "evaluate {tiny} --task sts --data pairs.tsv --beams 3": ["'sts' does not read --beams", "translation"],
    "evaluate {tiny} --task zero-shot --data pairs.tsv --batch 3": ["--batch", "classification"],
    "evaluate {tiny} --task lm --data few.txt": ["'causal_lm'", "has 'none'", "flaxcompress train"],
    "evaluate {tiny} --task images --data few.txt": ["'sequence_classification'"],
    "evaluate {tiny} --task zero-shot --data few.txt": ["few.txt", "'label'"],
    "evaluate {tiny} --task zero-shot --data empty.txt": ["empty.txt", "empty"],
    "evaluate {tiny} --task zero-shot --data pairs.tsv --columns sentense1 score": ["sentense1", "did you mean"],
    "encode {tiny} nowhere.txt": ["nowhere.txt", "no such file"],
    "encode {tiny} empty.txt": ["empty.txt", "empty"],
    "encode {tiny} latin.txt": ["latin.txt, line 2", "UTF-8"],
    "encode {tiny} few.txt --batch 0": ["batch", "0"],
    "encode {tiny} few.txt --out not-empty": ["not-empty", "folder"],
    "encode {tiny} few.txt --out nowhere/x.npy": ["nowhere", "create it"],
    "encode {tiny} few.txt:column": ["column"],
    "bench": ["MODEL"],
    "bench nowhere": ["nowhere"],
    "bench {tiny} {tiny}": ["twice"],
    "bench {tiny} --against tourch": ["tourch", "did you mean 'torch'"],
    "bench {tiny} --batch 0": ["batch", "at least 1"],
    "bench {tiny} --length 512": ["positions", "--length 128"],
    "export {tiny} --format torch-dense": ["--out"],
    "export {tiny} --format torch-dens --out dense": ["torch-dens", "did you mean 'torch-dense'"],
    "export {tiny} --format torch-dense --out not-empty": ["not-empty", "--overwrite"],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A saved model that knows a few words."""
    config = ModelConfig(
        vocabulary=len(VOCABULARY), width=16, layers=2, heads=2, feed_forward_width=32, positions=128, pooler=False
    )
    files = (("vocab.txt", "\n".join(VOCABULARY).encode()),)
    assets = Assets(files=files, pooling=Pooling("mean", True), max_length=32, source="tiny")
    return save(Model.init(config, key=jax.random.key(0), assets=assets), tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sentences(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(4, 12))) for _ in range(count)]


def run(command: str, **names) -> int:
    return cli.main([word.format(**names) for word in command.split()])


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", WRONG)
def test_a_mistake_is_one_line_and_exit_2_and_writes_nothing(command, tiny, here, capsys):
    for name, content in FILES.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(content)
    before = tree(here)
    assert run(command, tiny=tiny) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and len(lines) == 1 and lines[0].startswith("flaxcompress: "), err
    for words in WRONG[command]:
        assert words in lines[0]
    left = {name: content for name, content in tree(here).items() if not name.startswith(".small.work")}
    assert left == before


@pytest.mark.parametrize(
    "command", ["inspect nowhere", "compress {tiny} --out out --recipe nowhere", "encode {tiny} no"]
)
def test_debug_shows_the_traceback_of_a_mistake(command, tiny, here, capsys):
    assert run(f"{command} --debug", tiny=tiny) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.splitlines()[-1].startswith("flaxcompress: ")


def test_an_unexpected_failure_is_exit_1(tiny, here, capsys, monkeypatch):
    monkeypatch.setattr("flaxcompress.folder.load", lambda name: {}["weights"])
    assert run("inspect {tiny}", tiny=tiny) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "KeyError" in first and "--debug" in second


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_has_an_example_that_parses(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    example = re.split(r" (?:╭|positional)", shown.partition("For example: ")[2])[0]
    words = example.rpartition("| ")[2].split()  # past what feeds a pipe
    assert words[:2] == ["flaxcompress", verb]
    assert type(parse(words[1:])) is cli.VERBS[verb]


def test_help_lists_the_verbs(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in cli.VERBS)


# ── the verbs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_inspect(tiny, here, capsys):
    assert run("inspect {tiny} --json cost.json", tiny=tiny) == 0
    found = json.loads((here / "cost.json").read_text())
    assert found["bytes"] == load(tiny).nbytes and found["parts"]
    assert f"{found['params']:,}" in capsys.readouterr().out
    assert sorted(tree(here)) == ["cost.json"]


@pytest.mark.parametrize("from_file", [True, False])
def test_encode(from_file, tiny, here, capsys, monkeypatch):
    texts = sentences(40)
    content = "\n".join([*texts[:20], " ", *texts[20:]]).encode()
    if from_file:
        (here / "in.txt").write_bytes(content)
    else:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    (here / "vectors.npy").write_bytes(b"old")
    assert run(f"encode {{tiny}} {'in.txt' if from_file else ''} --json out.json", tiny=tiny) == 0
    vectors = np.load("vectors.npy")
    np.testing.assert_array_equal(vectors, load(tiny).encode(texts))
    found = json.loads(Path("out.json").read_text())
    assert (found["n"], found["width"]) == vectors.shape == (40, 16)
    assert capsys.readouterr().err == ""


def test_encode_warns_in_one_line_of_texts_that_were_cut(tiny, here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"cat " * 100)))
    assert run("encode {tiny} -", tiny=tiny) == 0
    err = capsys.readouterr().err
    assert err.startswith("flaxcompress: warning: 1 ") and err.count("\n") == 1


def test_encode_refuses_bytes_that_are_no_text_and_keeps_the_old_file(tiny, here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a cat\n\xff\n")))
    (here / "vectors.npy").write_bytes(b"old")
    assert run("encode {tiny}", tiny=tiny) == 2
    assert "line 2" in capsys.readouterr().err and tree(here) == {"vectors.npy": b"old"}


def test_vectors_are_written_as_they_come(here):
    parts = [np.arange(n * 3, dtype=np.float32).reshape(n, 3) for n in (2, 5, 1)]
    assert write_vectors(Path("v.npy"), iter(parts), "parts") == (8, 3)
    np.testing.assert_array_equal(np.load("v.npy"), np.concatenate(parts))


def test_a_full_disk_leaves_the_old_file(here, monkeypatch):
    Path("v.npy").write_bytes(b"old")

    def parts():
        yield np.ones((2, 3), np.float32)
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="No space left"):
        write_vectors(Path("v.npy"), parts(), "parts")
    assert tree(here) == {"v.npy": b"old"}


def test_evaluate_sts(tiny, here, capsys):
    texts = sentences(40)
    rows = [f"{a}\t{b}\t{i % 5}" for i, (a, b) in enumerate(zip(texts[:20], texts[20:], strict=True))]
    Path("pairs.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *rows]))
    assert run("evaluate {tiny} --task sts --data pairs.tsv --reference {tiny} --json e.json", tiny=tiny) == 0
    found = json.loads(Path("e.json").read_text())
    assert found["n"] == 20 and found["spearman"] == found["reference_spearman"] and found["mean_cosine"] == 1.0
    assert f"{found['spearman']:.4f}" in capsys.readouterr().out


def test_evaluate_fidelity(tiny, here):
    Path("in.txt").write_text("\n".join(sentences(30)))
    assert run("evaluate {tiny} --task fidelity --data in.txt --reference {tiny} --json e.json", tiny=tiny) == 0
    found = json.loads(Path("e.json").read_text())
    assert found["mean_cosine"] == pytest.approx(1) and found["neighbour_overlap_10"] == 1


def test_evaluate_zero_shot(tiny, here, capsys):
    rows = [f"{text}\t{WORDS[i % 2]}" for i, text in enumerate(sentences(20))]
    Path("texts.tsv").write_text("\n".join(["text\tclass", *rows]))
    options = "--template it_{{}} --hold-out 12 --json e.json --columns text class"
    assert run(f"evaluate {{tiny}} --task zero-shot --data texts.tsv --reference {{tiny}} {options}", tiny=tiny) == 0
    found = json.loads(Path("e.json").read_text())
    assert (found["n"], found["agreement"], found["classes"]) == (12, 1.0, sorted(WORDS[:2]))
    assert f"f1 of {WORDS[0]}" in " ".join(capsys.readouterr().out.split())


def test_every_option_of_a_task_is_a_flag():
    fields = {field.name for field in dataclasses.fields(cli.VERBS["evaluate"])}
    assert all(set(options_of(task)) <= fields for task in TASKS.values())


def test_export(tiny, here, capsys):
    assert run("export {tiny} --format torch-dense --out dense", tiny=tiny) == 0
    report = json.loads(Path("dense/report.json").read_text())
    assert report["bytes"]["after"] == Path("dense/model.safetensors").stat().st_size
    texts = sentences(8)
    np.testing.assert_allclose(load("dense").encode(texts), load(tiny).encode(texts), atol=1e-6)
    assert sorted(p.name for p in here.iterdir()) == ["dense"]
    assert "written to" in capsys.readouterr().out


def test_export_fails_when_pytorch_disagrees(tiny, here, capsys, monkeypatch):
    def disagree(model, folder):
        raise ValueError(f"{folder}: vectors differ")

    monkeypatch.setattr(EXPORT_TORCH, "check_folder", disagree)
    assert run("export {tiny} --format torch-dense --out dense", tiny=tiny) == 1
    assert capsys.readouterr().err == f"flaxcompress: {here / 'dense'}: vectors differ; nothing was written\n"
    assert not tree(here)


@pytest.fixture
def corpus(here) -> Path:
    path = here / "corpus.txt"
    path.write_text("\n".join(sentences(400)))
    (here / "recipe.yaml").write_text(RECIPE)
    return path


COMPRESS = "compress {tiny} --recipe recipe.yaml --data corpus.txt --out small"


def test_compress(tiny, here, corpus, capsys):
    assert run(COMPRESS, tiny=tiny) == 0
    shown = capsys.readouterr().out
    report = json.loads(Path("small/report.json").read_text())
    assert report["bytes"]["after"] == Path("small/model.safetensors").stat().st_size < report["bytes"]["before"]
    assert report["calibration"] == "corpus.txt" and f"{report['bytes']['after'] / 1e6:,.2f}" in shown
    assert load("small").encode("the old cat").shape == (16,)
    assert sorted(p.name for p in here.iterdir()) == ["corpus.txt", "recipe.yaml", "small"]


def test_compress_again_needs_overwrite(tiny, here, corpus):
    Path("small").mkdir()
    Path("small/old").write_text("old")
    assert run(COMPRESS, tiny=tiny) == 2
    assert run(f"{COMPRESS} --overwrite", tiny=tiny) == 0
    assert not Path("small/old").exists() and Path("small/report.json").exists()


def test_dry_run_writes_nothing(tiny, here, corpus, capsys):
    before = tree(here)
    assert run(f"{COMPRESS} --heal-steps 3 --dry-run", tiny=tiny) == 0
    shown = capsys.readouterr().out
    assert "Quantize" in shown and "Heal" in shown and tree(here) == before


def test_dry_run_of_a_target_shows_choices_and_their_loss(tiny, here, corpus, capsys):
    before = tree(here)
    assert run("compress {tiny} --out small --target 2x --data corpus.txt --dry-run", tiny=tiny) == 0
    shown = capsys.readouterr().out
    assert "Allocate" in shown and "predicted loss" in shown and "all, before healing" in shown
    assert tree(here) == before


@pytest.mark.slow
def test_sensitivity(tiny, here, corpus, capsys):
    command = "sensitivity {tiny} --out minds --data corpus.txt --recipes light --statistics kept"
    assert run(command, tiny=tiny) == 0
    shown = capsys.readouterr().out
    assert "attention/query" in shown and "written to minds" in shown
    report = json.loads(Path("minds/report.json").read_text())
    assert len(report["matrices"]) == 12 and report["recipes"][0]["name"] == "light" and report["calibration"]
    assert "<img" in Path("minds/report.html").read_text() and len(list(Path("kept").iterdir())) >= 3


def test_compress_hands_its_settings_on(tiny, here, corpus, monkeypatch):
    seen = {}

    def compress(model, recipe, **options):
        seen.update(options, recipe=recipe)
        raise ValueError("enough")

    monkeypatch.setattr(COMPRESS_RUN, "compress", compress)
    assert run(f"{COMPRESS} --seed 7 --heal-steps 5", tiny=tiny) == 2
    assert seen["calibration"] == ["corpus.txt"] and seen["work"] == here / ".small.work"
    assert jax.random.key_data(seen["key"]).tolist() == jax.random.key_data(jax.random.key(7)).tolist()
    assert [step.name for step in seen["recipe"].steps] == ["Quantize", "Heal"] and seen["recipe"].steps[-1].steps == 5
    assert run("compress {tiny} --out small --heal-steps 0", tiny=tiny) == 2
    assert seen["calibration"] is None and "Heal" not in [step.name for step in seen["recipe"].steps]


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: a job that a shell runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_exit_1_and_says_how_to_go_on(number, tiny, here, corpus, capsys, monkeypatch):
    def compress(model, recipe, *, work, **options):
        work.mkdir()
        os.kill(os.getpid(), number)
        time.sleep(10)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(COMPRESS_RUN, "compress", compress)
    assert run(COMPRESS, tiny=tiny) == 1
    err = capsys.readouterr().err
    assert err == "flaxcompress: interrupted; run the same command again to go on from the last checkpoint\n"
    assert Path(".small.work").is_dir() and not Path("small").exists()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_bench_writes_json(tiny, here, capsys, monkeypatch):
    def bench(models, **options):
        assert models == (str(tiny),) and options["against"] == ["torch"] and options["batch"] == 4
        return bench_module.BenchResult(
            batch=4,
            length=8,
            rounds=1,
            latency_length=8,
            threads=1,
            device="cpu",
            baseline="x",
            contestants=(),
            notes=("left out",),
        )

    monkeypatch.setattr(bench_module, "bench", bench)
    assert run("bench {tiny} --batch 4 --json b.json", tiny=tiny) == 0
    assert json.loads(Path("b.json").read_text())["notes"] == ["left out"]
    assert "left out" in capsys.readouterr().out


# ── what a verb leaves behind in the process ─────────────────────────────────────────────────────────────────────────


def test_logging_is_as_it_was_after_a_command(tiny, here):
    ours, root = logging.getLogger("flaxcompress"), logging.getLogger()
    before = (list(ours.handlers), ours.propagate, list(root.handlers), logging.getLogger("jax").level)
    run("inspect {tiny}", tiny=tiny)
    assert before == (list(ours.handlers), ours.propagate, list(root.handlers), logging.getLogger("jax").level)


def test_other_libraries_are_silent_and_ours_is_not(tiny, here, capsys, monkeypatch):
    def noisy(name):
        logging.getLogger("some_library").warning("noise")
        logging.getLogger("flaxcompress").warning("two\nlines")
        return load(name)

    monkeypatch.setattr("flaxcompress.folder.load", noisy)
    assert run("inspect {tiny}", tiny=tiny) == 0
    assert capsys.readouterr().err == "flaxcompress: warning: two lines\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_complaints_are_understood_in_every_encoding(encoding, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert run("compress x --out y --heal-steps x") == 2
    want = "flaxcompress: compress: --heal-steps: 'x' is no INT (see flaxcompress compress --help)\n"
    assert capsys.readouterr().err == want
    assert run("compress --help") == 0


def test_python_m_flaxcompress(tiny, here):
    command = [sys.executable, "-m", "flaxcompress", "encode", str(tiny), "--out", "v.npy"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, input=b"the old cat\n", capture_output=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert np.load("v.npy").shape == (1, 16) and b"v.npy" in done.stdout


def test_the_work_folder_is_a_hidden_sibling():
    assert work_folder(Path("/a/b")) == Path("/a/.b.work")

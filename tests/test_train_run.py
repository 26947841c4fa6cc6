"""`flaxcompress train` from end to end, on tiny models and texts."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from flaxcompress import cli, tree
from flaxcompress.config.yaml_file import dump_yaml, read_yaml, with_changes
from flaxcompress.data.images import pixel_scale
from flaxcompress.folder import load, save
from flaxcompress.train import outputs
from flaxcompress.train.config import TrainConfig
from flaxcompress.train.metrics import read_metrics
from flaxcompress.train.outputs import Outputs
from flaxcompress.train.run import run
from flaxcompress.train.task_model import make_model
from flaxcompress.tuning.lora import adapters, without_lora

WORDS = ["the", "a", "one", "two", "red", "blue", "green", "small", "large", "old", "new", "cat", "dog", "tree"]
WORDS += ["house", "river", "bird", "stone", "sees", "finds", "likes"]


def sentences(rng, count):
    return [" ".join(rng.choice(WORDS, rng.integers(3, 7))).capitalize() + "." for _ in range(count)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with documents, labelled texts and parallel texts."""
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for name, count in (("train", 40), ("validation", 8)):
        documents = [" ".join(sentences(rng, 4)) for _ in range(count)]
        (folder / f"{name}.txt").write_text("\n".join(documents) + "\n", "utf-8")
        rows = [(text, "cat" if "cat" in text.lower() else "other") for text in sentences(rng, count)]
        lines = "".join(f"{text}\t{label}\n" for text, label in rows)
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + lines, "utf-8")
        tagged = [[(word, "B-x" if word == "cat" else "O") for word in text.split()] for text, _ in rows]
        lines = "\n\n".join("\n".join("\t".join(pair) for pair in sentence) for sentence in tagged)
        (folder / f"{name}.conll").write_text(lines + "\n", "utf-8")
        left = sentences(rng, count)
        (folder / f"{name}.en").write_text("\n".join(left) + "\n", "utf-8")
        (folder / f"{name}.xx").write_text("\n".join(text[::-1] for text in left) + "\n", "utf-8")
        labels = rng.integers(0, 3, count)
        images = np.where(labels[:, None, None] == 1, 200, 20) + np.zeros((count, 8, 8))
        np.savez(folder / f"{name}.npz", images=images.astype(np.uint8), labels=labels)
    return folder


def small(texts, out, **changes):
    """Settings of a masked LM with sentence order."""
    settings = {
        "model": {"config": {"width": 8, "embedding_width": 4, "layers": 2, "heads": 2, "feed_forward_width": 16}},
        "tokenizer": {"kind": "wordpiece", "vocabulary": 90, "lowercase": True},
        "task": {"name": "masked_lm", "sentence_order": True, "ngram": 1},
        "data": {"train": str(texts / "train.txt"), "validation": str(texts / "validation.txt"), "threads": 0},
        "training": {"steps": 6, "batch_size": 8, "length": 32, "save_every": 2, "evaluate_every": 3},
        "optimizer": {"learning_rate": 1e-2},
        "out": str(out),
    }
    settings["model"]["config"]["sharing"] = "all"
    return with_changes(settings, [f"{name.replace('__', '.')}={value}" for name, value in changes.items()])


def arrays(folder):
    return {name: np.asarray(x) for name, x in tree.flatten(load(folder).params).items()}


@pytest.fixture(scope="module")
def checkpoint(texts, tmp_path_factory):
    """The model that a run with `small`'s settings starts with, saved."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = TrainConfig.from_dict(small(texts, folder / "run"))
    return save(make_model(config, config.task_data, folder, key=jax.random.key(0)), folder / "model")


def call(path, *arguments):
    return cli.main(["train", str(path), *arguments])


def written(tmp_path, settings):
    path = tmp_path / "settings.yaml"
    path.write_text(dump_yaml(settings), "utf-8")
    return path


def test_pretraining_leaves_a_model_and_a_report(texts, tmp_path, capsys):
    out = tmp_path / "run"
    assert call(written(tmp_path, small(texts, out))) == 0
    assert "masked_lm, 6 steps" in capsys.readouterr().out
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in (out / "tokenizer").iterdir()}
    model = load(out / "model")
    assert model.config.head == "pretraining" and model.config.sharing.attention == (0, 0)
    assert model.config.positions == 32 and model.assets.has_tokenizer
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert report["params"]["after"] == model.parameters and report["training"]["steps"] == 6
    assert [row["step"] for row in report["training"]["evaluations"]] == [3, 6]
    assert {"loss", "cross_entropy", "order_cross_entropy"} <= set(report["training"]["evaluations"][0])
    assert "<img" in (out / "report.html").read_text("utf-8")
    assert json.loads((out / "model" / "report.json").read_text("utf-8")) == report
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["tokens_per_second"] > 0 and row["learning_rate"] >= 0 for row in rows)
    assert TrainConfig.from_dict(read_yaml(out / "config.yaml")) == TrainConfig.from_dict(small(texts, out))
    assert "pretraining" in (out / "model" / "config.json").read_text("utf-8")


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_end(texts, tmp_path, monkeypatch, capsys):
    """Stopped by SIGTERM after a step, and given again: the same weights, and every step in the metrics once."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(written(tmp_path, small(texts, whole))) == 0
    # The library learns other pieces, of equal count, each time.
    path = written(tmp_path, small(texts, parts, tokenizer=f"{whole / 'tokenizer'}"))
    original, made = jax.random.fold_in, []

    def fold_in(key, number):  # the loop draws each step's key; the third one brings a signal with it
        if isinstance(number, int) and number == 3 and not made:
            made.append(number)
            signal.raise_signal(signal.SIGTERM)
        return original(key, number)

    monkeypatch.setattr(jax.random, "fold_in", fold_in)
    assert call(path, "--stopped-status", "75") == 75
    monkeypatch.undo()
    assert made and "give the same command again" in capsys.readouterr().err
    assert not (parts / "model").exists()
    assert call(path) == 0
    want, got = arrays(whole / "model"), arrays(parts / "model")
    assert want.keys() == got.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert [row["step"] for row in read_metrics(parts)] == [1, 2, 3, 4, 5, 6]
    losses = [[row["loss"] for row in read_metrics(folder)] for folder in (whole, parts)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_fine_tuning_a_checkpoint_to_classes(texts, checkpoint, tmp_path):
    settings = small(texts, tmp_path / "second", task="{name: classification}")
    del settings["tokenizer"]
    settings["model"] = {"load": str(checkpoint)}
    settings["data"] |= {"train": str(texts / "train.tsv"), "validation": str(texts / "validation.tsv")}
    report = run(TrainConfig.from_dict(settings))
    model = load(tmp_path / "second" / "model")
    assert model.config.head == "sequence_classification" and model.config.classes == 2
    assert 0 <= report.last()["validation/accuracy"] <= 1


def test_adapters_alone_are_trained_with_the_head(texts, checkpoint, tmp_path):
    """The kernels stay as they are, bit for bit; PEFT's format can be written from the folder."""
    settings = small(texts, tmp_path / "run", task="{name: classification}")
    del settings["tokenizer"]
    settings["model"] = {
        "load": str(checkpoint),
        "tuning": {"name": "lora", "rank": 2, "pattern": ".*/(query|value)/kernel"},
    }
    settings["data"] |= {"train": str(texts / "train.tsv"), "validation": str(texts / "validation.tsv")}
    run(TrainConfig.from_dict(settings))
    before, after = load(checkpoint), load(tmp_path / "run" / "model")
    found = adapters(after)
    assert sorted(found) == ["layers/0/attention/query/kernel", "layers/0/attention/value/kernel"]
    assert all(np.abs(np.asarray(node.delta.right)).max() > 0 for node in found.values())
    plain = tree.flatten(without_lora(after).params)
    for address, node in tree.flatten(before.params).items():
        if not address.startswith("head/"):
            np.testing.assert_array_equal(plain[address], node, err_msg=address)


@pytest.mark.parametrize(
    "model, message",
    [
        ({"config": {"width": 8}, "tuning": "lora"}, "give load"),
        ({"load": "minilm", "tuning": {"name": "lora", "rank": 0}}, "rank must be at least 1"),
        ({"load": "minilm", "tuning": {"name": "lora", "initializer": "eva"}}, "'eva' is not allowed"),
        ({"load": "minilm", "tuning": {"name": "lorax"}}, "unknown kind 'lorax'; known: adapters, biases, lora"),
        ({"load": "minilm", "tuning": {"rank": 2}}, "expected a name, or settings with a name"),
    ],
)
def test_adapters_that_cannot_be(texts, tmp_path, model, message):
    settings = small(texts, tmp_path / "run")
    settings["model"] = model
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(settings)


TASKS = {
    "causal": {"task": "{name: causal_lm}", "model__config__sharing": "own"},
    "corruption": {"task": "{name: span_corruption}", "tokenizer__vocabulary": 200},
    "translation": {"task": "{name: translation, label_smoothing: 0.0}"},
    "images": {"task": "{name: images, flip: true}"},
    "distill": {"task": "{name: distill, teacher: TEACHER}"},
    "tokens": {"task": "{name: tokens, class_weights: [1.0, 4.0]}"},
}


def plain(settings, texts, name):
    """The settings of a task of `TASKS`, or of classification, with its files."""
    fields = settings["model"]["config"]
    del fields["embedding_width"]
    if name in ("classification", "tokens"):
        end = "tsv" if name == "classification" else "conll"
        settings["data"] = {part: str(texts / f"{part}.{end}") for part in ("train", "validation")} | {"threads": 0}
    if name == "translation":
        fields["decoder"] = {"layers": 1}
        train, targets = str(texts / "train.en"), str(texts / "train.xx")
        settings["data"] = {"train": train, "train_targets": targets, "threads": 0}
    if name == "images":
        del settings["tokenizer"]
        fields |= {"patches": {"size": 4, "channels": 1, "height": 8, "width": 8}}
        settings["data"] = {"train": str(texts / "train.npz"), "threads": 0}
    return settings


@pytest.mark.parametrize("name", ["causal", "translation", "images", "classification", "tokens"])
def test_what_is_held_out_is_not_trained_on(texts, tmp_path, name):
    """Of 40 examples 7 are for validation: other ones than the 33 that are trained on."""
    more = TASKS.get(name, {"task": "{name: classification}"})
    settings = plain(small(texts, tmp_path / "run", **more), texts, name)
    settings["data"] |= {"hold_out": 7}
    settings["data"].pop("validation", None)
    if name == "causal":
        settings["task"]["pack"] = False
    settings["training"] |= {"batch_size": 1, "length": 128, "buckets": [8, 128], "evaluate_every": 0}
    config = TrainConfig.from_dict(settings)
    data = config.task_data
    model = make_model(config, data, tmp_path, key=jax.random.key(0))
    assert model.assets.classes == {"classification": ("cat", "other"), "tokens": ("O", "B-x")}.get(name, ())
    assert pixel_scale(model.assets) == (((0.5,), (0.5,)) if name == "images" else None)
    train, validation = data.train(model.assets, model.config), data.validation(model.assets, model.config)
    assert (train.rows, validation.rows) == (33, 7)
    given = "pixel_values" if name == "images" else "input_ids"
    all_of_it = dataclasses.replace(config, data=dataclasses.replace(config.data, hold_out=0))
    whole = all_of_it.task_data
    every = whole.train(model.assets, model.config)
    seen = [
        sorted(next(batches)[given].tobytes().rstrip(b"\0") for _ in range(batches.rows))
        for batches in (train, validation, every)
    ]
    assert sorted(seen[0] + seen[1]) == seen[2]
    if name != "images":
        assert {next(train)[given].shape[1] for _ in range(33)} <= {8, 128}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_other_tasks(texts, checkpoint, tmp_path, name):
    settings = small(texts, tmp_path / "run", **TASKS[name], training__steps=2, training__evaluate_every=2)
    fields = settings["model"]["config"]
    del fields["embedding_width"]
    if name in ("corruption", "translation"):
        fields["decoder"] = {"layers": 3, "sharing": {"name": "cycle_rev", "sets": 2}}
    if name == "translation":
        data = {
            f"{part}{more}": str(texts / f"{part}.{end}")
            for part in ("train", "validation")
            for more, end in (("", "en"), ("_targets", "xx"))
        }
        settings["data"] = {**data, "threads": 0}
    if name == "images":
        del settings["tokenizer"]
        fields |= {"patches": {"size": 4, "channels": 1, "height": 8, "width": 8}}
        settings["data"] = {part: str(texts / f"{part}.npz") for part in ("train", "validation")} | {"threads": 0}
    if name == "tokens":
        settings["data"] = {part: str(texts / f"{part}.conll") for part in ("train", "validation")} | {"threads": 0}
    if name == "distill":
        settings["task"]["teacher"] = str(checkpoint)
        settings["model"] = {"load": str(checkpoint)}
        del settings["tokenizer"]
    report = run(TrainConfig.from_dict(settings))
    assert report.steps == 2 and np.isfinite(report.last()["validation/loss"])
    assert (
        load(tmp_path / "run" / "model").config.head
        == {
            "causal": "causal_lm",
            "corruption": "seq2seq_lm",
            "translation": "seq2seq_lm",
            "images": "sequence_classification",
            "distill": "pretraining",
            "tokens": "token_classification",
        }[name]
    )


@pytest.mark.slow
def test_changed_settings_are_refused_and_named(texts, tmp_path, capsys):
    out = tmp_path / "run"
    path = written(tmp_path, small(texts, out, training__steps=2, training__evaluate_every=0))
    assert call(path) == 0
    capsys.readouterr()
    assert call(path, "optimizer.learning_rate=0.5", "training.save_every=1") == 2
    said = capsys.readouterr().err
    assert "optimizer/learning_rate: 0.01 -> 0.5" in said and "--allow-config-change" in said
    assert "save_every" not in said  # harmless
    assert call(path, "training.steps=3", "--allow-config-change") == 0
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3]


MISTAKES = {
    "training.stepz=3": ["unknown key 'stepz'", "did you mean 'steps'"],
    "training.steps=ten": ["training/steps: expected int, got 'ten'"],
    "data.train=nowhere.txt": ["nowhere.txt", "no such file"],
    "training.length=3": ["length 3"],
    "model.config.vocabulary=20": ["the tokenizer has", "20 entries", "do not belong together"],
    "model.config.widht=9": ["model/config", "'widht'", "did you mean 'width'"],
    "tokenizer=null": ["tokenizer", "drawn anew"],
    "task.name=causal_lm": ["task", "unknown key"],
    "mesh=data=3": ["mesh", "3 devices"],
    "training.z_loss=-1": ["training/z_loss"],
    "training.dtype=float8": ["training/dtype"],
    "model={load: nowhere}": ["a loaded model has its own"],
}


@pytest.mark.parametrize("change", MISTAKES)
def test_mistakes_are_one_line_and_status_2(texts, tmp_path, capsys, change):
    path = written(tmp_path, small(texts, tmp_path / "run"))
    assert call(path, change) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in MISTAKES[change]), said


@pytest.mark.slow
def test_a_run_that_failed_at_once_does_not_bind_the_next(texts, tmp_path, capsys):
    path = written(tmp_path, small(texts, tmp_path / "run", training__steps=1, training__evaluate_every=0))
    assert call(path, "training.length=3") == 2
    tokenizer = (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_text("utf-8")
    assert call(path, "tokenizer.vocabulary=80") == 0
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_text("utf-8") != tokenizer
    assert load(tmp_path / "run" / "model").config.vocabulary == 80


def test_a_folder_that_holds_something_else_is_left_alone(texts, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("x", "utf-8")
    assert call(written(tmp_path, small(texts, tmp_path / "run"))) == 2
    assert "holds no run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]


@pytest.mark.slow
def test_a_trace_is_written(texts, tmp_path):
    out = tmp_path / "run"
    path = written(tmp_path, small(texts, out, training__evaluate_every=0))
    assert call(path, "--profile") == 0
    assert list((out / "profile").rglob("*.xplane.pb"))


def test_teacher_and_student_need_one_tokenizer(texts, checkpoint, tmp_path):
    settings = small(texts, tmp_path / "student", task=f"{{name: distill, teacher: {checkpoint}}}")
    settings["tokenizer"]["vocabulary"] = 80
    with pytest.raises(ValueError, match=r"task/teacher: .* need the same tokenizer"):
        run(TrainConfig.from_dict(settings))


def test_an_address_gets_copies_and_gives_them_back(tmp_path, monkeypatch):
    """Stands in for a bucket: addresses are mapped to a folder."""
    from etils import epath

    place = lambda name: epath.Path(str(name).replace("bucket://", f"{tmp_path}/"))  # noqa: E731
    monkeypatch.setattr(outputs, "_path", place)
    with Outputs("bucket://run") as first:
        (first.folder / "metrics.jsonl").write_text("1", "utf-8")
        (first.folder / "tokenizer").mkdir()
        (first.folder / "tokenizer" / "vocab.txt").write_text("a", "utf-8")
        first.copy_now_and_then()
        assert not (tmp_path / "run").exists()  # not yet
    assert not first.folder.exists() and (tmp_path / "run" / "metrics.jsonl").read_text("utf-8") == "1"
    with Outputs("bucket://run") as second:
        assert (second.folder / "tokenizer" / "vocab.txt").read_text("utf-8") == "a"
        (second.folder / "report.json").write_text("{}", "utf-8")
    assert (tmp_path / "run" / "report.json").exists()
    with Outputs("bucket://run", writes=False) as other:
        (other.folder / "report.json").write_text("other", "utf-8")
    assert (tmp_path / "run" / "report.json").read_text("utf-8") == "{}"


def start(path, *arguments, **environment):
    """`flaxcompress train` in a process of its own."""
    command = [sys.executable, "-m", "flaxcompress", "train", str(path), *arguments]
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "XLA_FLAGS")
    rest = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.Popen(
        command, env={**rest, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_end(texts, checkpoint, tmp_path):
    tokenizer = f"tokenizer={checkpoint}"
    assert start(written(tmp_path, small(texts, tmp_path / "whole")), tokenizer).wait() == 0
    path, lines = written(tmp_path, small(texts, tmp_path / "parts")), tmp_path / "parts" / "metrics.jsonl"
    killed = start(path, tokenizer)
    while killed.poll() is None and not (lines.exists() and lines.read_bytes().count(b"\n") >= 2):
        time.sleep(0.02)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    again = start(path, tokenizer)
    said = again.communicate()[0]
    assert again.returncode == 0, said
    want, got = arrays(tmp_path / "whole" / "model"), arrays(tmp_path / "parts" / "model")
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert [row["step"] for row in read_metrics(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]


def start_pair(path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    known = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    return [start(path, "--mesh", "data=2", **known, JAX_PROCESS_ID=str(number)) for number in (0, 1)]


@pytest.mark.slow
def test_a_process_whose_peer_was_killed_ends_soon_and_says_why(texts, tmp_path):
    pair = start_pair(written(tmp_path, small(texts, tmp_path / "run", training__steps=100000)))
    lines = tmp_path / "run" / "metrics.jsonl"
    while not lines.exists() and all(process.poll() is None for process in pair):
        time.sleep(0.05)
    pair[1].kill()
    said = pair[0].communicate(timeout=60)[0]
    assert pair[0].returncode == 1 and "another process of the run has ended" in said, said
    assert "start all of them again" in said and "Traceback" not in said
    pair[1].communicate()


@pytest.mark.slow
def test_two_processes_find_each_other_and_write_one_folder(texts, tmp_path):
    pair = start_pair(written(tmp_path, small(texts, tmp_path / "run", training__steps=2, training__evaluate_every=2)))
    said = [process.communicate()[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert "2 steps" in said[0] and "2 steps" not in said[1]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]
    assert load(tmp_path / "run" / "model").config.head == "pretraining"

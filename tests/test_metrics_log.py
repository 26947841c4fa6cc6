"""What a run writes down as it goes, and how fast it says it is."""

from __future__ import annotations

import json
import math
import sys
import types

import jax
import numpy as np
import pytest

import flaxcompress as fc
from flaxcompress.config import ModelConfig
from flaxcompress.train.metrics import Metrics, read_metrics
from flaxcompress.train.throughput import BatchShape, Throughput, measured_flops, peak_flops, peak_of, step_flops


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_every_step_is_a_line(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write(1, {"loss": np.float32(2.5)})
        metrics.write(2, {"loss": 2.0})
        metrics.write(2, {"validation/loss": 2.25})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}, {"step": 2, "validation/loss": 2.25}]
    assert read_metrics(tmp_path)[1] == {"step": 2, "loss": 2.0, "validation/loss": 2.25}


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write(1, {"loss": math.nan, "a": math.inf, "b": -math.inf})
    text = (tmp_path / "metrics.jsonl").read_text("utf-8")
    assert "NaN" not in text and "Infinity" not in text
    assert lines(tmp_path) == [{"step": 1, "loss": None, "a": None, "b": None}]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    with Metrics(tmp_path) as metrics:
        for step in range(1, 8):
            metrics.write(step, {"loss": float(step)})
    with Metrics(tmp_path) as metrics:  # the checkpoint was of step 4
        metrics.write(5, {"loss": 50.0})
        metrics.write(6, {"loss": 60.0})
    assert [(x["step"], x["loss"]) for x in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (6, 60)]


def test_a_resumed_run_writes_its_last_step_once(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write(1, {"loss": 1.0})
        metrics.write(2, {"loss": 2.0})
    with Metrics(tmp_path) as metrics:
        metrics.write(2, {"loss": 2.0})
        metrics.write(2, {"validation/loss": 3.0})
    assert [x["step"] for x in lines(tmp_path)] == [1, 2, 2]


def test_a_run_that_goes_back_drops_the_steps_it_makes_again(tmp_path):
    with Metrics(tmp_path) as metrics:
        for step in (1, 2, 3, 4):
            metrics.write(step, {"loss": 1.0})
        metrics.write(3, {"loss": 9.0})
        metrics.write(4, {"loss": 9.0})
    assert [(x["step"], x["loss"]) for x in lines(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 9.0), (4, 9.0)]


def test_a_torn_last_line_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo', "utf-8")
    with Metrics(tmp_path) as metrics:
        metrics.write(2, {"loss": 2.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


def test_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    with Metrics(tmp_path, tensorboard=True) as metrics:
        metrics.write(1, {"loss": 1.5})
        metrics.write(2, {"loss": 1.0})
        metrics.write(2, {"validation/loss": 2.0})
        metrics.write(1, {"loss": 1.25})
    points, purged = [], []
    for path in sorted((tmp_path / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        content, at = path.read_bytes(), 0
        while at < len(content):  # records: length, its checksum, content, its checksum
            length = int.from_bytes(content[at : at + 8], "little")
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            points += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            purged += [event.step] * (event.session_log.status == 1)
    assert (1, "loss", 1.5) in points and (2, "validation/loss", 2.0) in points and (1, "loss", 1.25) in points
    assert purged == [1]


class Project:
    """Stands in for the library wandb."""

    def __init__(self):
        self.opened, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.opened.append(options)
        return types.SimpleNamespace(
            id=options["id"] or "run-7",
            define_metric=lambda name, **more: None,
            log=self.logged.append,
            finish=lambda: setattr(self, "finished", self.finished + 1),
        )


def test_weights_and_biases_go_on_in_one_run(tmp_path, monkeypatch):
    project = Project()
    monkeypatch.setitem(sys.modules, "wandb", project)
    for step in (1, 2):
        with Metrics(tmp_path, wandb="small", settings={"steps": 2}) as metrics:
            metrics.write(step, {"loss": 1.0})
    assert [x["id"] for x in project.opened] == [None, "run-7"]
    assert project.opened[0]["project"] == "small" and project.opened[0]["config"] == {"steps": 2}
    assert project.logged == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}] and project.finished == 2


@pytest.mark.parametrize("library, options", [("tensorboardX", {"tensorboard": True}), ("wandb", {"wandb": "small"})])
def test_a_library_that_is_missing(tmp_path, monkeypatch, library, options):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=f"pip install {library}"):
        Metrics(tmp_path, **options)


def device(kind, platform="gpu"):
    return types.SimpleNamespace(device_kind=kind, platform=platform)


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_peaks_of_known_chips(kind, teraflops):
    assert peak_flops(device(kind)) == teraflops * 1e12


@pytest.mark.parametrize("kind", ["cpu", "TPU v4 lite", "NVIDIA GeForce GTX 1080"])
def test_no_peak_is_made_up(kind):
    assert peak_flops(device(kind)) is None


def test_a_peak_is_measured_where_that_is_asked_for():
    assert peak_of(jax.devices("cpu"), measure=False) is None
    assert measured_flops(jax.devices("cpu")[0], size=64, rounds=1) > 0


def test_flops_of_a_step_by_hand():
    """Layers of width 8 with F 12, 2·(4·64 + 2·96) per token, and attention's 4·T·8; the head on 3 of 16 tokens."""
    config = ModelConfig(
        vocabulary=20, width=8, layers=3, heads=2, feed_forward_width=12, positions=16, pooler=False, head="masked_lm"
    )
    layer = 2 * (4 * 64 + 2 * 96) + 4 * 16 * 8
    head = 2 * (64 + 8 * 20)
    want = 3 * 5 * (16 * 3 * layer + 3 * head)
    shape = BatchShape(rows=5, length=16, predicted=3)
    assert step_flops(config, shape) == want
    shared = config.replace(sharing=fc.Sharing.named("all", layers=3))
    assert step_flops(shared, shape) == want  # a shared set works every time it is used
    assert step_flops(config, shape, teacher=config) == want * 4 / 3


def test_shapes_of_batches():
    ids, short = np.zeros((4, 16), np.int32), np.zeros((4, 3), np.int32)
    assert BatchShape.of({"input_ids": ids, "label_positions": short}, processes=2) == (8, 16, 0, 3)
    assert BatchShape.of({"input_ids": ids, "decoder_input_ids": short}) == (4, 16, 3, None)
    assert BatchShape.of({"pixel_values": np.zeros((4, 1, 8, 8)), "labels": np.zeros(4)}) == (4, 0, 0, None)


def test_throughput_is_over_the_last_steps():
    shape, flops = BatchShape(rows=10, length=100), lambda shape: 5e9 * shape.rows * shape.length
    speed = Throughput(flops=flops, peak=100e12, devices=2)
    assert speed.after(0.5, shape) == {"tokens_per_second": 2000.0, "mfu": 0.05}
    for _ in range(20):
        found = speed.after(0.25, shape)
    assert found == {"tokens_per_second": 4000.0, "mfu": 0.1}
    assert speed.after(0.25, BatchShape(rows=10, length=20))["tokens_per_second"] == (19 * 1000 + 200) / 5
    assert Throughput(flops=flops, peak=None).after(1.0, shape) == {"tokens_per_second": 1000.0}
    assert Throughput(flops=flops, peak=None).after(0.0, shape) == {}
    assert Throughput(flops=flops, peak=None).after(2.0, BatchShape(8, 0)) == {"images_per_second": 4.0}

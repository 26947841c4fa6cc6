"""What a run says of itself while it goes: lines where stderr is no terminal, and the learning rate of every step."""

import types

import numpy as np
import pytest
from tiny_models import make_model, words

from flaxcompress import progress
from flaxcompress.train.report import TrainReport
from flaxcompress.train.schedule import SCHEDULES, make_schedule
from flaxcompress.train.watch import ShapedBatches, Watcher, _note


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_minute_tells_what_is_left(clock, capsys):
    with progress.progress_bar("training", 1000, show=True) as advance:
        advance(100)  # which an earlier run did
        for second in range(1, 141):
            clock[0] = float(second)
            advance(1, f"loss {second}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training: 160 of 1,000, 0:14:00 left, loss 60",
        "training: 220 of 1,000, 0:13:00 left, loss 120",
    ]


def test_a_total_that_is_not_known(clock, capsys):
    with progress.progress_bar("encode", None, show=True) as advance:
        clock[0] = 3700.0
        advance(5000)
    assert capsys.readouterr().err == "encode: 5,000\n"


@pytest.mark.parametrize("show", [True, False])
def test_what_is_over_soon_says_nothing(clock, capsys, show):
    with progress.progress_bar("training", 10, show=show) as advance:
        clock[0] = 3700.0 if not show else 59.0
        advance(10)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [1, 4])
def test_the_rate_that_is_written_is_that_of_the_step(schedule, warmup):
    rates, found = make_schedule(schedule, peak=0.5, steps=12, warmup=warmup), []
    metrics = types.SimpleNamespace(write=lambda step, values: found.append(values["learning_rate"]))
    watcher = Watcher(metrics, ShapedBatches(iter(())), None, rates=rates, steps=12)
    for step in range(1, 13):
        watcher(step, {"loss": 1.0})
    np.testing.assert_allclose(found, [float(rates(step)) for step in range(12)], rtol=1e-6, atol=1e-9)


def test_a_rate_that_never_changes():
    found = []
    metrics = types.SimpleNamespace(write=lambda step, values: found.append(values["learning_rate"]))
    rates = make_schedule("constant", peak=0.5, steps=3, warmup=0)
    Watcher(metrics, ShapedBatches(iter(())), None, rates=rates, steps=3)(3, {"loss": 1.0})
    assert found == [0.5]


def test_a_line_of_several_steps_has_all_their_time():
    """With lines that are rare the times still add up, refused steps are counted, and the last step has a line."""
    rows = []
    metrics = types.SimpleNamespace(write=lambda step, values: rows.append({"step": step, **values}))
    rates = make_schedule("constant", peak=0.5, steps=8, warmup=0)
    watcher = Watcher(metrics, ShapedBatches(iter(())), None, rates=rates, steps=8, every=3)
    for step in (1, 2, 3, 4, 5, 4, 5, 6, 7, 8):  # after 5 the run went back to 3
        taken = {"seconds": float(step), "waiting": 0.5, "saving": 0.25}
        watcher(step, {"loss": 10.0 - step, "accepted": float(step not in (2, 4)), **taken})
    assert [row["step"] for row in rows] == [3, 6, 8]
    assert [row["seconds"] for row in rows] == [6, 15, 15]
    assert [row["waiting"] for row in rows] == [1.5, 1.5, 1.0] and [row["loss"] for row in rows] == [7, 4, 2]
    model = make_model(words(8), width=16, layers=1, feed_forward_width=32)
    config = {"task": {"name": "causal_lm"}}
    report = TrainReport.of(model, rows, config=config, devices="1 × cpu")
    assert (report.seconds, report.refused, report.steps) == (36, 2, 8)
    np.testing.assert_allclose((report.waiting, report.saving), (4.0 / 36, 2.0 / 36))


def test_images_are_counted_beside_the_bar():
    assert _note({"images_per_second": 1234.5, "mfu": 0.5}) == "1,234 images/s MFU 50.0%"

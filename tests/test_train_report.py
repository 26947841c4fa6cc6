"""The report of a training run."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from base64 import b64decode

import jax
import pytest
from rich.console import Console

from flaxcompress.config import ModelConfig
from flaxcompress.model import Model
from flaxcompress.train.report import TrainReport

CONFIG = {"task": {"name": "masked_lm"}, "training": {"steps": 40}}
MODEL = Model.init(
    ModelConfig(vocabulary=20, width=8, layers=1, heads=2, feed_forward_width=12, positions=16), key=jax.random.key(0)
)


def make_metrics(steps=40, **more):
    rows = [
        {"step": n, "loss": 5.0 / n, "learning_rate": 1e-3, "accepted": 1.0, "seconds": 0.5, "waiting": 0.01, **more}
        for n in range(1, steps + 1)
    ]
    rows[steps // 2 - 1] |= {"validation/loss": 2.0, "validation/accuracy": 0.25}
    rows[-1] |= {"validation/loss": 1.0, "validation/accuracy": 0.5, "mfu": 0.4}
    return rows


def make_report(metrics=None):
    return TrainReport.of(MODEL, make_metrics() if metrics is None else metrics, config=CONFIG, devices="2 × cpu")


def test_what_report_json_holds():
    found = json.loads(json.dumps(make_report().to_json(), allow_nan=False))
    assert found["params"] == {"before": MODEL.parameters, "after": MODEL.parameters}
    assert found["bytes"]["after"] == MODEL.nbytes and found["flops_per_token"]["after"] > 0
    assert found["seconds"] == 20.0 and found["steps"][0]["name"] == "train" and found["versions"]["jax"]
    training = found["training"]
    assert training["steps"] == 40 and training["refused"] == 0 and training["config"] == CONFIG
    assert training["waiting"] == pytest.approx(0.02) and training["saving"] is None
    assert training["evaluations"] == [
        {"step": 20, "loss": 2.0, "accuracy": 0.25},
        {"step": 40, "loss": 1.0, "accuracy": 0.5},
    ]
    assert len(training["curve"]) == 40 and "validation/loss" not in training["curve"][-1]


def test_long_curves_are_thinned_and_keep_their_ends():
    curve = make_report(make_metrics(9000)).curve
    assert len(curve) == 2000 and curve[0]["step"] == 1 and curve[-1]["step"] == 9000


def test_the_page_draws_loss_evaluations_and_rate():
    page = make_report().to_html()
    assert not re.search(r"<script|<link|https?://(?!www\.w3\.org)", page)
    images = re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)">', page)
    assert [alt.split()[0] for alt, _ in images] == ["Loss", "accuracy", "Learning"]
    for _, content in images:
        assert ElementTree.fromstring(b64decode(content)).tag.endswith("svg")
    assert "masked_lm on 2 × cpu" in page and "trained" in page and "0.5" in page


def test_a_loss_that_was_not_finite_is_left_out_of_the_plot_and_counted():
    metrics = make_metrics()
    metrics[3] |= {"loss": None, "accepted": 0.0}
    report = make_report(metrics)
    assert report.refused == 1 and "1 refused" in report.to_html()


def test_a_run_without_steps():
    report = make_report([])
    assert report.steps == 0 and report.last() == {} and "<img" not in report.to_html()
    json.dumps(report.to_json(), allow_nan=False)


def test_without_matplotlib_the_page_says_so(monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = make_report().to_html()
    assert "<img" not in page and "matplotlib is not installed" in page


def test_the_table_sums_up():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(make_report().table())
    text = console.export_text()
    assert "validation/accuracy" in text and "0.5" in text and "40.0%" in text and "20.0 s" in text
    assert "waiting for data" in text and "2 × cpu" in text

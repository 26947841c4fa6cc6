import base64
import dataclasses
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from rich.console import Console

from flaxcompress.config import ModelConfig, Sharing
from flaxcompress.evaluate import Profile, Report, profile, versions
from flaxcompress.evaluate.plots import kept_energy, smooth
from flaxcompress.evaluate.profile import describe
from flaxcompress.formats import nbytes
from flaxcompress.model import Model, init_params

V, D, F, L, T = 50, 16, 40, 3, 8


def make(**changes):
    values = dict(vocabulary=V, width=D, layers=L, heads=2, feed_forward_width=F, positions=12, segments=2, pooler=True)
    return abstract(ModelConfig(**{**values, **changes}))


def abstract(config):
    """A model whose parameters are shapes only: counting needs no more."""
    return Model(params=jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0)), config=config)


def by_part(found):
    return {part.part: part for part in found.parts}


INT4 = {"kind": "quantized", "bits": 4, "group": 8, "scale_dtype": "float16"}
LOW_RANK = {"kind": "low_rank", "rank": 4, "left": INT4, "right": INT4}


def test_profile_of_a_dense_model():
    model = make(head="masked_lm")
    found = profile(model, length=T)
    parts = by_part(found)
    assert list(parts) == [
        "token table",
        "positions and segments",
        "attention",
        "feed_forward",
        "norms and biases",
        "pooler",
        "head",
    ]
    weights = {name: part.weights for name, part in parts.items()}
    assert weights == {
        "token table": V * D,
        "positions and segments": (12 + 2) * D,
        "attention": L * 4 * D * D,
        "feed_forward": L * 2 * D * F,
        "norms and biases": 2 * D + L * (4 * D + F + D + 4 * D),
        "pooler": D * D + D,
        "head": D * D + 3 * D + V,
    }
    assert all(part.bytes == 4 * part.weights for part in found.parts)
    assert found.params == model.parameters and found.bytes == model.nbytes
    flops = {name: part.flops_per_token for name, part in parts.items() if part.flops_per_token}
    assert flops == {
        "attention": L * (4 * 2 * D * D + 4 * T * D),
        "feed_forward": L * 2 * 2 * D * F,
        "pooler": 2 * D * D / T,
        "head": 2 * D * D + 2 * V * D,
    }
    assert found.flops_per_token == sum(flops.values()) and found.cache_bytes_per_token == 0
    assert {part.format for part in found.parts} == {"dense float32"}


def test_profile_counts_a_shared_set_once_in_bytes_and_every_time_in_flops():
    own = by_part(profile(make(), length=T))
    sharing = Sharing(attention=(0, 0, 0), feed_forward=(0, 1, 0), norms=(0, 1, 2))
    shared = by_part(profile(make(sharing=sharing), length=T))
    for part, sets in (("attention", 1), ("feed_forward", 2)):
        assert shared[part].flops_per_token == own[part].flops_per_token
        assert shared[part].bytes * L == own[part].bytes * sets


def test_profile_of_compressed_formats():
    tiers = [{"rows": 20, "format": INT4}, {"rows": 30, "format": LOW_RANK}]
    rules = (
        ("embedding/token", {"kind": "bucketed", "tiers": tiers}),
        ("layers/0/attention/.*/kernel", INT4),
        (".*/attention/.*/kernel", {"kind": "quantized", "bits": 8}),
        (".*/feed_forward/.*/kernel", LOW_RANK),
        ("embedding/position", {"kind": "dense", "dtype": "float16"}),
    )
    config = ModelConfig.from_json({**make().config.to_json(), "formats": rules})
    model = abstract(config)
    found = profile(model, length=T)
    parts = by_part(found)
    assert parts["token table"].format == "bucketed 20×16 int4 + 30×4 int4"
    assert parts["token table"].flops_per_token == 2 * 4 * D  # the low-rank tier's product
    assert parts["token table"].bytes == nbytes(model.params["embedding"]["token"])
    assert parts["positions and segments"].format == "1× dense float16, 1× dense float32"
    assert parts["attention"].format == "8× int8, 4× int4, g8"
    assert parts["feed_forward"].format == "low_rank 4 (int4, g8)"
    assert parts["feed_forward"].flops_per_token == L * 2 * 2 * 4 * (D + F)
    assert found.params == model.parameters and found.bytes == model.nbytes


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ({"kind": "dense", "dtype": "bfloat16"}, "dense bfloat16"),
        ({"kind": "quantized", "bits": 8, "group": None}, "int8"),
        (
            {"kind": "low_rank", "rank": 96, "left": {"kind": "dense", "dtype": "float32"}, "right": INT4},
            "low_rank 96 (float32 · int4, g8)",
        ),
        ({"kind": "banded", "bands": [[128, 4], [96, 3]], "scale_dtype": "float16"}, "banded 128@4 96@3"),
        (
            {"kind": "tensor_train", "rows": [20, 30, 51], "columns": [8, 8, 6], "ranks": [16, 12], "dtype": "float32"},
            "tensor_train 20·30·51×8·8·6, rank 16",
        ),
        (
            {"kind": "cp", "rows": [384], "columns": [16, 24], "rank": 96, "dtype": "float32"},
            "cp 384×16·24, rank 96",
        ),
        (
            {"kind": "tucker", "rows": [384], "columns": [16, 24], "ranks": [96, 8, 20], "dtype": "float32"},
            "tucker 384×16·24, rank 96·8·20",
        ),
        ({"kind": "unknown", "ranks": [1, 2], "order": 3}, "unknown order 3"),
    ],
)
def test_describe(spec, want):
    assert describe(spec) == want


def test_inspect_says_how_decomposed_tensors_are_applied():
    cheap = {"kind": "cp", "rows": [D], "columns": [4, D // 4], "rank": 3}
    config = make().config.replace(layers=1, sharing=None, formats=())
    config = config.with_rule("layers/.*/feed_forward/down/kernel", {**cheap, "rows": [F]})
    config = config.with_rule("layers/.*/attention/.*/kernel", {**cheap, "rank": 3 * D}).with_rule(
        "embedding/token", {**cheap, "rows": [config.vocabulary]}
    )
    parts = {part.part: part for part in profile(abstract(config), length=T).parts}
    assert parts["attention"].format.endswith(f"rank {3 * D}, multiplied back")
    assert "rank 3, decomposed" in parts["feed_forward"].format
    assert parts["token table"].format == f"cp {config.vocabulary}×4·{D // 4}, rank 3"
    dense = profile(abstract(config.replace(formats=())), length=T)
    flops = {part.part: part.flops_per_token for part in dense.parts}
    assert parts["attention"].flops_per_token == flops["attention"]
    assert parts["feed_forward"].flops_per_token < flops["feed_forward"]


def test_profile_is_the_same_for_real_parameters():
    config = make().config.replace(layers=1, sharing=None)
    model = Model.init(config, key=jax.random.key(0))
    assert profile(model, length=T) == profile(abstract(config), length=T)


def test_profile_checks_the_length():
    model = make()
    for length in (0, 13):
        with pytest.raises(ValueError, match=f"length must lie in 1 … 12 .*, got {length}"):
            profile(model, length=length)


def rendered(table):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_profile_table_and_json():
    found = profile(make(), length=T)
    text = rendered(found.table())
    for word in ("token table", "feed_forward", "dense float32", f"{found.params:,}", "8 tokens, 0 cache bytes"):
        assert word in text
    data = json.loads(json.dumps(found.to_json()))
    assert data["bytes"] == sum(part["bytes"] for part in data["parts"]) == found.bytes
    odd = Profile(name="[red]a/b[/x]", length=1, parts=())
    assert "[red]a/b[/x]" in rendered(odd.table())


def make_report(**changes):
    rng = np.random.default_rng(0)
    before, after = (profile(make(**kind), length=T).to_json()["parts"] for kind in ({}, {"pooler": False}))
    values = dict(
        params={"before": 22_713_216, "after": np.int64(19_000_000)},
        bytes={"before": 90_864_192, "after": 8_950_000},
        flops_per_token={"before": 2.2e7, "after": np.float32(2.25e7)},
        fidelity={
            "data": "held <out>",
            "n": 600,
            "mean_cosine": 0.98765,
            "rank_correlation": 0.9812,
            "neighbour_overlap_10": 0.9012,
        },
        steps=[
            {"name": "FactorizeEmbedding", "params": 2, "bytes": 3_210_000, "seconds": 12.3},
            {"name": "Heal <b>$1$ & more", "params": 1, "bytes": 3, "seconds": 345.6},
        ],
        seconds=401.5,
        parts={"before": before, "after": after},
        spectra=[
            {"address": "embedding/token", "singular_values": np.exp(-np.arange(100) / 20.0), "rank": 64},
            {"address": "layers/0/x", "singular_values": [3.0, 2.0, 0.0], "rank": None},
        ],
        healing=[{"step": i, "loss": float(np.exp(-i / 50) + 0.1 * rng.random())} for i in range(300)],
        recipe={"steps": [{"FactorizeEmbedding": {"note": "<script>alert('x')</script>"}}]},
        calibration="docstrings of Python 3.11's standard library",
        source="owner/model<i>",
    )
    return Report(**{**values, **changes})


def test_report_json_round_trip():
    report = make_report()
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert Report.from_json(data) == report
    contract = {"params", "bytes", "flops_per_token", "fidelity", "steps", "seconds", "versions"}
    assert contract <= set(data)
    assert data["bytes"] == {"before": 90_864_192, "after": 8_950_000} and data["params"]["after"] == 19_000_000
    assert data["flops_per_token"]["after"] == 22_500_000.0
    assert len(data["spectra"][0]["singular_values"]) == 100
    smallest = Report(**{k: {"before": 1, "after": 1} for k in ("params", "bytes", "flops_per_token")})
    assert Report.from_json(smallest.to_json()) == smallest and smallest.versions == versions()


def test_numbers_that_are_not_finite_become_null():
    report = make_report(healing=[{"step": 0, "loss": float("nan")}, {"step": 1, "loss": 0.5}])
    assert report.to_json()["healing"] == [{"step": 0, "loss": None}, {"step": 1, "loss": 0.5}]
    assert "1 points" not in report.to_html() and "loss 0.5 at first" in report.to_html()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bytes": {"before": 1}}, ValueError, "report: bytes: missing after"),
        ({"encoded_per_second": {"after": 1.0}}, ValueError, "report: encoded_per_second: missing before"),
        ({"fidelity": {"n": 3}}, ValueError, "report: fidelity: missing data, mean_cosine"),
        ({"steps": [{"name": "x"}]}, ValueError, "report: steps: missing params, bytes, seconds"),
        ({"healing": [{"loss": 1.0}]}, ValueError, "report: healing: missing step"),
        (
            {"parts": {"before": [], "after": [{"part": "x"}]}},
            ValueError,
            "report: parts/after: missing weights, bytes",
        ),
        ({"recipe": {"a": object()}}, TypeError, "report: recipe/a: object cannot be held in JSON"),
    ],
)
def test_report_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        make_report(**changes)


def test_from_json_refuses():
    data = make_report().to_json()
    with pytest.raises(ValueError, match=r"report: unknown key 'stepz'; known: .*did you mean 'steps'\?"):
        Report.from_json({**data, "stepz": 1})
    with pytest.raises(ValueError, match="report: missing params, bytes"):
        Report.from_json({k: v for k, v in data.items() if k not in ("params", "bytes")})


class Page(HTMLParser):
    """Collects tags, text and links; checks that tags are closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.images, self.texts = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_html_is_whole_escaped_and_needs_nothing_else():
    html = make_report().to_html()
    page = Page(html)
    assert not {"script", "link", "iframe", "i", "a"} & set(page.tags)
    assert "url(" not in html and "@import" not in html
    text = " ".join(page.texts)
    for word in (
        "<script>alert('x')</script>",
        "owner/model<i>",
        "Heal <b>$1$ & more",
        "held <out>",
        "0.9877",
        "1.0000",
    ):
        assert word in text
    for word in ("8.95 MB", "10.15× smaller", "from 90.86 MB", "6 min 42 s", "left out", "energy kept", "600 texts"):
        assert word in text
    assert [image["alt"].split()[0] for image in page.images] == ["Bytes", "Singular", "Loss", "Seconds"]
    for image in page.images:
        kind, content = image["src"].split(",")
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(content)
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        links = re.findall(rb'(?:href|src)="([^#"][^"]*)"', svg)
        assert not links
    assert len(html) < 1_000_000


def test_html_is_the_same_every_time():
    assert make_report().to_html() == make_report().to_html()


def test_plots_leave_pyplot_and_the_backend_alone():
    import matplotlib

    backend = matplotlib.rcParams._get("backend")
    make_report().to_html()
    assert matplotlib.rcParams._get("backend") == backend


def test_html_without_matplotlib_says_so(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(make_report().to_html())
    assert page.images == []
    text = " ".join(page.texts)
    assert text.count("matplotlib is not installed (pip install matplotlib)") == 4
    assert "FactorizeEmbedding" in text and "0.9877" in text


def test_html_of_a_report_with_little_in_it():
    same = {"before": 0, "after": 0}
    page = Page(Report(params=same, bytes=same, flops_per_token=same).to_html())
    text = " ".join(page.texts)
    assert "A model, compressed" in text and "Not measured." in text and page.images == []
    one = make_report(
        healing=[{"step": 5, "loss": 0.0}],
        spectra=[
            {"address": "x", "singular_values": [], "rank": 3},
            {"address": "y", "singular_values": [0.0], "rank": 0},
        ],
        steps=[{"name": "Heal", "params": 1, "bytes": 1, "seconds": 0}],
        fidelity={**make_report().fidelity, "mean_cosine": None},
    )
    assert len(Page(one.to_html()).images) == 4


def test_report_table():
    text = rendered(make_report(source="[bold]a/b").table())
    for word in ("[bold]a/b", "90.86", "8.95", "10.15x", "0.9877", "1.0000", "600 texts: held <out>"):
        assert word in text
    assert "0.9877" not in rendered(make_report(fidelity=None).table())


@pytest.mark.parametrize(("after", "slower"), [(1800.0, False), (990.0, False), (700.0, True)])
def test_a_slower_model_is_said_to_be_slower(after, slower):
    report = make_report(encoded_per_second={"before": 1000.0, "after": after})
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert report.is_slower == slower == ("slower" in rendered(report.table()))
    assert ("make the model slower" in report.to_html()) == slower
    assert f"{after:,.0f}" in rendered(report.table()) and f"{after / 1000:.2f}× as many as 1,000" in report.to_html()


def test_choices_are_listed():
    choices = [{"address": "layers/0/x/kernel", "choice": "3 bits", "kind": "bits", "bytes": 60_364, "loss": 1.5e-3}]
    page = make_report(choices=choices).to_html()
    for word in ("What each matrix became", "layers/0/x/kernel", "3 bits", "0.060", "1.50e-03"):
        assert word in page
    assert "What each matrix became" not in make_report().to_html()


def test_layers_are_listed_with_their_times():
    layers = [{"layer": "layers/0", "seconds": 12.34, "bytes": 5_500_000}, {"layer": "x", "seconds": 1.0, "bytes": 10}]
    page = make_report(layers=layers).to_html()
    for word in ("Layer by layer", "layers/0", "12.3", "5.50", "Seconds spent on each layer"):
        assert word in page
    assert "Layer by layer" not in make_report().to_html()


def test_smooth_and_kept_energy():
    loss = np.random.default_rng(0).random(400) + np.linspace(2, 1, 400)
    smoothed = smooth(loss)
    assert smoothed[0] == loss[0]
    assert np.abs(np.diff(smoothed[20:])).max() < 0.1 * np.abs(np.diff(loss)).max()  # each value weighs a twentieth
    np.testing.assert_allclose(smooth(np.full(50, 3.0)), 3.0, rtol=8 * np.finfo(np.float64).eps * 50)
    assert (
        kept_energy([3.0, 4.0], 1) == 9 / 25 and kept_energy([3.0, 4.0], None) == 1.0 and kept_energy([0.0], 1) == 1.0
    )


def test_versions():
    found = versions()
    assert list(found) == ["python", "jax", "jaxlib", "flax", "numpy", "flaxcompress"]
    assert found["jax"] == jax.__version__ and found["numpy"] == np.__version__


def test_report_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_report().seconds = 1


def test_an_encoder_and_its_decoder_are_counted_part_by_part():
    same = {"width": 8, "heads": 2, "feed_forward_width": 12, "positions": 16, "segments": 0, "pooler": False}
    sharing = Sharing.own(3, cross_attention=True)
    decoder = ModelConfig(vocabulary=0, layers=3, causal=True, sharing=sharing, **same)
    config = ModelConfig(vocabulary=20, layers=2, decoder=decoder, head="seq2seq_lm", **same)
    found = profile(Model.init(config, key=jax.random.key(0)), length=10)
    flops = {part.part: part.flops_per_token for part in found.parts}
    attention, fed = 2 * 4 * 8 * 8 + 4 * 10 * 8, 2 * 2 * 8 * 12  # of a layer
    assert flops["attention"] == 2 * attention and flops["feed_forward"] == 2 * fed
    assert flops["decoder attention"] == flops["decoder cross-attention"] == 3 * attention
    assert flops["decoder feed_forward"] == 3 * fed and flops["head"] == 2 * 8 * 20
    assert found.cache_bytes_per_token == 3 * 2 * 8 * 4

"""`flaxcompress plan`: what is read from compiled programs, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from sharded import FORMATS, structures

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.train import chips
from flaxcompress.train.abstract import abstract_params
from flaxcompress.train.chips import devices_of, parse_topology
from flaxcompress.train.config import TrainConfig
from flaxcompress.train.hlo import Listing, shape_bytes, spanned
from flaxcompress.train.plan import Plan, _others, plan
from flaxcompress.train.plan_settings import planned_structure, read_plan_settings
from flaxcompress.train.run import run as train_run
from flaxcompress.train.trainable import thaw_model

MODEL = {
    "vocabulary": 64,
    "width": 32,
    "layers": 6,
    "heads": 8,
    "feed_forward_width": 48,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}


def settings_of(folder, **changes):
    """The settings of a plan, read from a file in the folder; training's change what stands under it."""
    training = {"batch_size": 8, "length": 32, "dtype": "float32", **changes.get("training", {})}
    given = {"model": {"config": MODEL}, "task": "causal_lm", **changes, "training": training}
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in given.items() if value is not None}))
    return read_plan_settings(path)


# ── programs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def compiled(function, *arguments):
    return Listing(jax.jit(function).lower(*arguments).compile().as_text())


def test_products_in_loops_are_counted_as_often_as_they_run():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    body = lambda x, _: (jnp.tanh(x @ w), None)  # noqa: E731
    assert compiled(lambda x: jax.lax.scan(body, x, None, length=7)[0], x).flops() == 7 * 2 * 4 * 8 * 8

    def nested(x):
        return jax.lax.scan(lambda x, _: (jax.lax.scan(body, x, None, length=3)[0] + 1, None), x, None, length=5)[0]

    assert compiled(nested, x).flops() == 15 * 2 * 4 * 8 * 8
    batched = lambda a, b: jnp.einsum("bhtd,bhsd->bhts", a, b)  # noqa: E731
    assert compiled(batched, jnp.ones((2, 3, 40, 50)), jnp.ones((2, 3, 60, 50))).flops() == 2 * 2 * 3 * 40 * 60 * 50


def test_traffic_counts_slices_and_not_what_they_are_cut_from():
    layers, x = jnp.ones((50, 64, 64)), jnp.ones((64, 64))
    found = compiled(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], x, layers).traffic()
    assert 50 * 3 * 64 * 64 * 4 <= found < 50 * 8 * 64 * 64 * 4  # and not 50 times all layers


TPU = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter (input: f32[8,16]) -> f32[8,4] {
  %input = f32[8,16]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[8,16]{1,0:T(8,128)} all-reduce(%input), channel_id=4, replica_groups=[2,4]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[8,4]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={8,4}
}

%start (p: bf16[1,16]) -> (bf16[1,16], bf16[4,16]) {
  %p = bf16[1,16]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[4,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %both = (bf16[1,16]{1,0}, bf16[4,16]{1,0}) tuple(%p, %all-gather.1)
}

%beside (q: bf16[1,16], r: bf16[4,16], b: bf16[16,8]) -> bf16[4,8] {
  %q = bf16[1,16]{1,0:T(8,128)(2,1)} parameter(0)
  %r = bf16[4,16]{1,0:T(8,128)(2,1)} parameter(1)
  %b = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(2)
  %all-gather.2 = bf16[4,16]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %product = bf16[4,8]{1,0:T(8,128)(2,1)} convolution(%r, %b), dim_labels=bf_io->bf
}

%body (carry: (s32[], bf16[1,16], f32[8,16])) -> (s32[], bf16[1,16], f32[8,16]) {
  %carry = (s32[]{:T(128)}, bf16[1,16]{1,0:T(8,128)(2,1)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %w = bf16[1,16]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %g = f32[8,16]{1,0:T(8,128)} get-tuple-element(%carry), index=2
  %made = bf16[16,8]{1,0:T(8,128)(2,1)} constant({...})
  %begin = (bf16[1,16]{1,0}, bf16[4,16]{1,0:T(8,128)(2,1)S(1)}) fusion(%w), kind=kCustom, calls=%start
  %r.2 = bf16[4,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%begin), index=1
  %y = bf16[4,8]{1,0:T(8,128)(2,1)} fusion(%w, %r.2, %made), kind=kOutput, calls=%beside
  %scattered = f32[8,4]{1,0:T(8,128)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  ROOT %next = (s32[]{:T(128)}, bf16[1,16]{1,0:T(8,128)(2,1)}, f32[8,16]{1,0:T(8,128)}) tuple(%turn, %w, %g)
}

%condition (carry.2: (s32[], bf16[1,16], f32[8,16])) -> pred[] {
  %carry.2 = (s32[]{:T(128)}, bf16[1,16]{1,0:T(8,128)(2,1)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %turn.2 = s32[]{:T(128)} get-tuple-element(%carry.2), index=0
  %end = s32[]{:T(128)} constant(12)
  ROOT %more = pred[]{:T(512)} compare(%turn.2, %end), direction=LT
}

ENTRY %main (a: bf16[1,16], c: f32[8,16]) -> f32[8,16] {
  %a = bf16[1,16]{1,0:T(8,128)(2,1)} parameter(0)
  %c = f32[8,16]{1,0:T(8,128)} parameter(1)
  %none = s32[]{:T(128)} constant(0)
  %first = (s32[]{:T(128)}, bf16[1,16]{1,0:T(8,128)(2,1)}, f32[8,16]{1,0:T(8,128)}) tuple(%none, %a, %c)
  %loop = (s32[]{:T(128)}, bf16[1,16]{1,0:T(8,128)(2,1)}, f32[8,16]{1,0:T(8,128)}) while(%first), condition=%condition, body=%body
  %g.2 = f32[8,16]{1,0:T(8,128)} get-tuple-element(%loop), index=2
  ROOT %all-reduce.9 = f32[8,16]{1,0:T(8,128)} all-reduce(%g.2), channel_id=9, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}, to_apply=%add
}
"""  # noqa: E501


def test_a_tpus_program_is_read():
    """Loops without a stated count, collectives in pieces beside products, and reduce-scatters in their own dress."""
    program = Listing(TPU)
    found = {(c.kind, c.axes): c for c in program.collectives({"data": 2, "model": 4})}
    gather, scatter = found["all-gather", ("data", "model")], found["reduce-scatter", ("model",)]
    assert (gather.count, gather.bytes, gather.looped) == (12, 12 * 4 * 16 * 2, True)
    assert (scatter.count, scatter.bytes, scatter.group) == (12, 12 * 8 * 16 * 4, 4)
    assert scatter.sent == scatter.bytes * 3 / 4
    whole = found["all-reduce", ("data", "model")]
    assert (whole.count, whole.looped, whole.sent) == (1, False, 2 * 8 * 16 * 4 * 7 / 8)
    assert len(found) == 3 and program.flops() == 12 * 2 * 4 * 16 * 8


@pytest.mark.parametrize(
    "attributes, want",
    [
        ("replica_groups=[4,2]<=[8]", (("model",), 2)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (("data", "fsdp"), 4)),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", (("fsdp",), 2)),
        ("replica_groups={{0,1,2,3,4,5,6,7}}", (("data", "fsdp", "model"), 8)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b','c'}", (("fsdp", "model"), 4)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a'}", (("data",), 2)),
        ("replica_groups={}", (("data", "fsdp", "model"), 8)),
    ],
)
def test_the_axes_of_a_collective_are_found_however_its_groups_are_written(attributes, want):
    assert spanned(attributes, {"data": 2, "fsdp": 2, "model": 2}) == want


def test_pairs_of_a_permutation_name_their_axis():
    pairs = "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}"
    assert spanned(pairs, {"data": 2, "model": 2}, pairs=True)[0] == ("model",)


def test_dilated_windows_count_the_batched_products_that_they_stand_for():
    """How TPUs write a product batched over 64×16: dilated so far that each place meets its own partner only."""
    lines = [
        "ENTRY %main (a: bf16[64,16,512,64], b: bf16[64,16,64,512]) -> f32[64,16,512,512] {",
        "  %a = bf16[64,16,512,64] parameter(0)",
        "  %b = bf16[64,16,64,512] parameter(1)",
        "  ROOT %c = f32[64,16,512,512] convolution(%a, %b), "
        "window={size=64x16 stride=63x15 lhs_dilate=64x16}, dim_labels=01bf_01io->01bf",
        "}",
    ]
    assert Listing("\n".join(lines)).flops() == 2 * 64 * 16 * 512 * 512 * 64


def test_bytes_of_shapes():
    assert shape_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)}, s4[3], pred[5], f32[])") == 12 + 2 + 5 + 4
    assert shape_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[4]{0})", hbm_only=True) == 16


# ── plans ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_plan_of_one_device_has_the_sizes_of_the_step(tmp_path):
    settings = settings_of(tmp_path, training={"batch_size": 2, "length": 16})
    found, config = plan(settings, topology="cpu:1", mesh={}), planned_structure(settings)
    weights = fc.profile(fc.Model(jax.tree.map(jnp.zeros_like, abstract_params(config)), config), length=16)
    assert found.parameters == weights.params and found.parameter_bytes == 4 * weights.params
    assert found.optimizer_bytes - 2 * found.parameter_bytes in (4, 8)  # counts of steps
    assert found.batch_bytes == 3 * 2 * 16 * 4 + 4  # ids, labels, packs, and whether to stop
    forward = 2 * 16 * sum(part.flops_per_token for part in weights.parts)
    assert forward * 2.7 < found.flops < forward * 3.3  # once forward, twice backward
    assert found.fits and found.step_seconds is None and not found.collectives
    assert json.loads(json.dumps(found.to_json()))["mesh"] == {}


def test_a_plan_is_of_the_step_that_training_runs(tmp_path):
    """Every setting of the step changes what is compiled: microbatches, averages, what learns, the optimizer."""

    def of(**changes):
        return plan(settings_of(tmp_path, **changes), topology="cpu:1", mesh={})

    plain = of()
    assert of(training={"accumulate": 4}).temporary_bytes < plain.temporary_bytes
    assert of(training={"ema": 0.9}).optimizer_bytes == plain.optimizer_bytes + plain.parameter_bytes
    assert of(training={"trainable": "layers/.*"}).optimizer_bytes < plain.optimizer_bytes
    assert of(optimizer={"name": "lion"}).optimizer_bytes < 0.6 * plain.optimizer_bytes


def gathers_of(found):
    """{in loops: how many} of what "fsdp" cuts."""
    each = [c for c in found["collectives"] if c["kind"] == "all-gather" and c["axes"] == ["fsdp"]]
    return {c["looped"]: c["count"] for c in each}


@pytest.mark.parametrize("sharing", ["all", pytest.param("own", marks=pytest.mark.slow)])
def test_a_shared_block_is_put_together_once_and_own_ones_layer_by_layer(sharing, tmp_path):
    """Through the command, for 8 devices; six layers, each matrix of which "fsdp" cuts."""
    settings_of(tmp_path, model={"config": {**MODEL, "sharing": sharing}}, training={"remat": "full"})
    command = [sys.executable, "-m", "flaxcompress", "plan", "plan.yaml", "--topology", "cpu:8"]
    command += ["--mesh", "fsdp=8", "--json", "plan.json"]
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert "all-gather over fsdp" in run.stdout and "compiled in" in run.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["parameter_bytes"] < found["parameters"] * 4 / 6
    if sharing == "all":
        assert True not in gathers_of(found)
    else:
        assert gathers_of(found)[True] >= 2 * 6 * 4  # forward and backward, the kernels of six layers


def test_other_ways_are_tried_from_near_to_far():
    config = fc.ModelConfig(**MODEL)
    sizes = {"parameter_bytes": 10**6, "optimizer_bytes": 2 * 10**6, "peak_bytes": 9 * 10**6, "capacity": 4 * 10**6}
    counts = dict.fromkeys(("parameters", "batch_bytes", "flops", "traffic", "compile_seconds"), 0)
    rest = dict.fromkeys(("temporary_bytes", "compute_seconds", "memory_seconds", "link_seconds"))
    where = {"topology": "v5e:2x2", "chips": 4, "mesh": {"data": 4}, "remat": "none", "accumulate": 1}
    first = Plan(**where, dtype="bfloat16", batch_size=16, length=8, collectives=(), **sizes, **counts, **rest)
    ways = [str(way) for way in _others(config, first)]
    assert ways[:6] == [
        "--mesh data=4 training.remat=dots",
        "--mesh data=4 training.remat=full",
        "--mesh data=4 training.remat=full training.accumulate=2",
        "--mesh data=4 training.remat=full training.accumulate=4",
        "--mesh fsdp=4 training.remat=none",
        "--mesh fsdp=4 training.remat=full",
    ]
    assert "--mesh fsdp=2,model=2 training.remat=full" in ways and len(ways) <= 8
    small = dataclasses.replace(first, capacity=first.parameter_bytes)  # whose weights have to be cut
    assert all("fsdp" in str(way) or "model" in str(way) for way in _others(config, small))
    few = dataclasses.replace(first, batch_size=4)  # of which microbatches would leave devices without rows
    assert not any("data=4" in str(way) and way.accumulate > 1 for way in _others(config, few))


@pytest.mark.parametrize(
    "task, structure",
    [
        ({"name": "masked_lm", "sentence_order": True}, {}),
        ({"name": "masked_lm", "pack": True}, {}),
        ("causal_lm", {}),
        ({"name": "causal_lm", "pack": False}, {}),
        ("translation", {"decoder": {"layers": 1}}),
        ("span_corruption", {"decoder": {"layers": 1}}),
        ("classification", {}),
        ({"name": "classification", "regression": True}, {}),
        ("images", {"patches": {"height": 8, "width": 8, "size": 4, "channels": 1}}),
    ],
    ids=str,
)
def test_batches_are_those_of_training(task, structure, tmp_path, monkeypatch):
    """The abstract batch is the first batch of a run with these settings, arrays and dtypes; lengths are buckets'."""
    words = ["One two. Six ten." for _ in range(8)]
    data = {"train": str(tmp_path / "text.txt"), "separator": ""}
    (tmp_path / "text.txt").write_text("\n\n".join(words))
    name = task if isinstance(task, str) else task["name"]
    if name == "translation":
        data |= {"train_targets": data["train"], "separator": None}
        (tmp_path / "text.txt").write_text("\n".join(words))
    if name == "classification":
        rows = [f"{i % 2}\t{text}" for i, text in enumerate(words)]
        (tmp_path / "text.tsv").write_text("\n".join(["label\ttext", *rows]))
        data = {"train": str(tmp_path / "text.tsv")}
    if name == "images":
        images = {"images": np.zeros((8, 8, 8), np.uint8), "labels": np.arange(8, dtype=np.uint8) % 2}
        np.savez(tmp_path / "images.npz", **images)
        data = {"train": str(tmp_path / "images.npz")}
    small = {key: value for key, value in MODEL.items() if key != "vocabulary"}
    model = {"config": {**small, "layers": 1, **structure}}
    tokenizer = None if name == "images" else {"kind": "wordpiece", "vocabulary": 200}
    settings = {"model": model, "task": task, "data": data, "tokenizer": tokenizer, "out": str(tmp_path / "run")}
    settings |= {"training": {"batch_size": 4, "length": 32, "steps": 1}}
    config = TrainConfig.from_dict({k: v for k, v in settings.items() if v is not None})
    given = {}

    class Seen(Exception):
        pass

    def fit(model, objective, batches, **_):
        given["batch"] = next(batches)
        raise Seen

    monkeypatch.setattr("flaxcompress.train.run.fit", fit)
    with pytest.raises(Seen):
        train_run(config)
    shape = lambda x: (x.dtype, x.ndim, len(x))  # noqa: E731
    training = config.training
    planned = config.task.shapes(training.batch_size, training.length, planned_structure(config))
    assert {n: shape(x) for n, x in given["batch"].items()} == {
        n: (x.dtype, x.ndim, x.shape[0]) for n, x in planned.items()
    }
    assert all(x.size <= planned[n].size for n, x in given["batch"].items())


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_an_abstract_trainable_form(name):
    """As `plan` needs it of models too large to be drawn; that of `thaw_model` on real weights."""
    config = structures()[name]
    drawn = thaw_model(fc.Model.init(config, key=jax.random.key(0)))
    assert tree.signature(abstract_params(config)) == tree.signature(drawn)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text, message",
    [
        ("v5:4x4", "unknown kind 'v5' in 'v5:4x4'; known: cpu, v4, v5e, v5p, v6e; did you mean 'v5[ep]'"),
        ("v5e:16", "no shape of chips that v5e comes in; write for example v5e:16x16"),
        ("v4:4x4", "write for example v4:4x4x4"),
        ("cpu:0", "write for example cpu:8"),
        ("cpu", "write for example cpu:8"),
    ],
)
def test_what_is_no_topology_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(text)


def test_what_cannot_be_compiled_here_is_refused(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf'needs the TPU compiler: pip install "jax\[tpu\]=={jax.__version__}"'):
        devices_of("v5e:2x2")
    with pytest.raises(ValueError, match="JAX was started with 1 CPU devices"):
        devices_of("cpu:64")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"trainig": {}}, "unknown key 'trainig'.* did you mean 'training'"),
        ({"training": {"length": None}}, "training/length"),
        (
            {"model": {"config": {**MODEL, "positions": 16}}},
            "training/length: 32 tokens, but the model has 16 positions",
        ),
        ({"optimizer": "adam"}, "adam"),
        ({"model": {"architecture": "albert-huge"}}, "unknown 'albert-huge'.* did you mean 'albert-large'"),
        ({"model": {"config": {"model_type": "bart"}}}, "unknown model_type 'bart'"),
        ({"training": {"dtype": "int8"}}, "training/dtype"),
        ({"model": {"config": {**MODEL, "formats": [["a", 1]]}}}, "model/formats: .* needs an object with a 'kind'"),
        ({"model": {"config": {**MODEL, "vocabulary": None}}}, "vocabulary"),
        ({"task": "classification"}, "model/classes: a plan without data needs them"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan(settings_of(tmp_path, **change), topology="cpu:1", mesh={})


def test_settings_are_read(tmp_path):
    rules = [[r"layers/\d+/feed_forward/.*/kernel", {"kind": "low_rank", "keep": 0.5}]]
    found = planned_structure(settings_of(tmp_path, model={"config": {**MODEL, "formats": rules}}))
    assert found.format_rule("layers/1/feed_forward/up/kernel")["rank"] == 9  # of at most 9.6
    unsaid = {name: value for name, value in MODEL.items() if name != "vocabulary"}
    tokenizer = {"kind": "bpe", "vocabulary": 300}
    assert planned_structure(settings_of(tmp_path, model={"config": unsaid}, tokenizer=tokenizer)).vocabulary == 300
    with pytest.raises(ValueError, match="tokenizer: give it, or model/config/vocabulary"):
        planned_structure(settings_of(tmp_path, model={"config": unsaid}))
    task = {"name": "masked_lm", "sentence_order": True}
    config = planned_structure(settings_of(tmp_path, model={"architecture": "albert-xxlarge"}, task=task))
    assert (config.width, config.head, np.unique(config.sharing.attention).size) == (4096, "pretraining", 1)
    hf = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    hf |= {"intermediate_size": 96, "vocab_size": 100}
    assert planned_structure(settings_of(tmp_path, model={"config": hf})).head == "causal_lm"


def test_the_mesh_is_the_settings_unless_another_is_named(tmp_path):
    with pytest.raises(ValueError, match="mesh: neither the settings nor the command"):
        plan(settings_of(tmp_path), topology="cpu:1")
    assert plan(settings_of(tmp_path, mesh="data=1"), topology="cpu:1").mesh == {"data": 1}

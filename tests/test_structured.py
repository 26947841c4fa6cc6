"""Structured pruning: heads, channels and widths left out, and students begun so."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick
from tiny_models import numbered_text, numbered_words

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.compress import Calibration, Context
from flaxcompress.compress.selection import entries, forward_selection, leverage, made_from
from flaxcompress.config import ModelConfig, Rotary, Sharing
from flaxcompress.model import Model, abstract_flat

D, HEADS, HEAD, F, LAYERS = 16, 4, 6, 32, 3
PLAIN: dict[str, Any] = {
    **{"vocabulary": 60, "width": D, "layers": LAYERS, "heads": HEADS, "head_width": HEAD, "feed_forward_width": F},
    **{"positions": 20, "dropout": 0.0, "attention_dropout": 0.0, "pooler": False},
}
DECODER: dict[str, Any] = {
    **{"family": "llama", "causal": True, "head": "causal_lm", "norm_place": "pre", "final_norm": True, "norm": "rms"},
    **{"segments": 0, "position_embedding": "none", "embedding_norm": False, "norm_bias": False, "gated": True},
    **{"activation": "silu", "attention_bias": False, "output_bias": False, "feed_forward_bias": False},
    **{"key_value_heads": 2, "rotary": Rotary(), "query_key_norm": True},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "encoder": {},
    "grouped decoder": DECODER,
    "narrow queries": {"query_key_width": 4},
    "shared": {"sharing": Sharing(attention=(0, 0, 1), feed_forward=(0, 1, 1), norms=(0, 1, 2))},
    "relative bias": {"relative_buckets": 8, "relative_distance": 16, "position_embedding": "none", "segments": 0},
    "narrow table, masked LM": {"embedding_width": 8, "head": "masked_lm", "pooler": True},
}
QUICK = ("encoder", "grouped decoder")
LOW_RANK = {"kind": "low_rank", "rank": 2}


@functools.cache
def tiny(name: str) -> Model:
    """Random weights with large biases."""
    config, rng = ModelConfig(**{**PLAIN, **CONFIGS[name]}), np.random.default_rng(1)
    flat = {}
    for address, node in abstract_flat(config).items():
        value = rng.normal(size=node.shape) * (0.3 if len(node.shape) == 2 else 0.2)
        flat[address] = jnp.asarray(value + (1.0 if address.endswith("/scale") else 0.0), jnp.float32)
    return Model(params=tree.unflatten(flat), config=config, assets=numbered_words(55))


@functools.cache
def calibration() -> Calibration:
    return numbered_text(55, tiny("encoder").assets)


def applied(step, model: Model, text: bool = True) -> Model:
    context = Context(original=model, calibration=calibration() if text else None)
    return step(model, context, key=jax.random.key(0))


def changed(model: Model, **changes: Any) -> Model:
    """The model with some matrices exchanged; names as `layers_0_attention` would not be addresses."""
    return model.replace(params=tree.replace(model.params, changes))  # pyright: ignore[reportAttributeAccessIssue]


def hidden(model: Model) -> np.ndarray:
    rows = calibration().rows
    ids = np.asarray([row + [0] * (16 - len(row)) for row in rows])
    mask = np.arange(16) < np.asarray([[len(row)] for row in rows])
    return np.asarray(model(ids, mask).last_hidden_state, np.float64)[mask]


def kept_of(small: Model, model: Model, address: str, axis: int) -> list[int]:
    """Where the small model's slices of a matrix stand in the original's; every slice must be there once."""
    after, before = (np.moveaxis(np.asarray(tree.View(m.params)[address]), axis, 0) for m in (small, model))
    found = [np.flatnonzero([np.array_equal(one, other) for other in before]).tolist() for one in after]
    assert all(len(one) == 1 for one in found)
    return [one[0] for one in found]


NAMES = quick(list(CONFIGS), QUICK)
STEPS = {
    "heads": fc.PruneHeads(keep=0.5, by="magnitude", repair=False),
    "channels": fc.PruneChannels(keep=0.25, by="magnitude", repair=False),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", STEPS)
def test_sliced_models_compute_what_the_original_does_with_zeros_in_their_place(what, name):
    """The rows of the output and down maps that go, set to zero: the rest of a head or channel then says nothing."""
    model = tiny(name)
    small = applied(STEPS[what], model, text=False)
    part, reader = ("attention", "output") if what == "heads" else ("feed_forward", "down")
    zeroed, sets = {}, model.config.sharing.sets(part)
    for number in range(sets):
        address = f"layers/{number}/{part}/{reader}/kernel"
        rows, whole = kept_of(small, model, address, 0), np.array(tree.View(model.params)[address])
        assert rows == sorted(rows) and len(rows) == len(whole) // (2 if what == "heads" else 4)
        whole[np.setdiff1d(np.arange(len(whole)), rows)] = 0.0
        zeroed[address] = jnp.asarray(whole)
    want = hidden(changed(model, **zeroed))
    # Float32 sums in another order, through so many layers of norms, beside the largest value.
    np.testing.assert_allclose(hidden(small), want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert np.abs(hidden(model) - want).max() > 0.01 * np.abs(want).max()  # what goes did count


@pytest.mark.parametrize("step", [fc.PruneHeads(heads=2), fc.PruneChannels(width=11)], ids=lambda step: step.name)
@pytest.mark.parametrize("by", ["error", "leverage", "activation", "gradient", "magnitude"])
def test_what_says_nothing_goes_first(step, by):
    """Heads and channels that are silent, others in every layer: leaving those out changes nothing."""
    model, rng = tiny("encoder"), np.random.default_rng(5)
    silent = {}
    for number in range(LAYERS):
        for part, into, out, block in (("attention", "value", "output", HEAD), ("feed_forward", "up", "down", 1)):
            count = HEADS if block == HEAD else F
            gone = entries(rng.permutation(count)[: count - (2 if block == HEAD else 11)], block)
            for address, cut in (
                (f"layers/{number}/{part}/{into}/kernel", (slice(None), gone)),
                (f"layers/{number}/{part}/{into}/bias", gone),
                (f"layers/{number}/{part}/{out}/kernel", (gone, slice(None))),
            ):
                value = np.array(tree.View(model.params)[address])
                value[cut] = 0.0
                silent[address] = jnp.asarray(value)
    quiet = changed(model, **silent)
    small = applied(type(step)(**{**vars(step), "by": by, "ridge": 1e-6}), quiet)
    want = hidden(quiet)
    assert small.nbytes < 0.9 * model.nbytes
    # The repair is a fit with a ridge of 1e-6 to what is made exactly.
    np.testing.assert_allclose(hidden(small), want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_repair_makes_copies_of_heads_superfluous():
    """Heads 0 and 1 twice, with other output maps: by error the two stay, and read both maps; sliced, one is lost."""
    model = tiny("encoder")
    twice = {}
    for address, node in tree.flatten(model.params).items():
        if any(f"/attention/{name}/" in address for name in ("query", "key", "value")):
            half = np.asarray(node)[..., : 2 * HEAD]
            twice[address] = jnp.asarray(np.concatenate([half, half], -1))
    double = changed(model, **twice)
    want, size = hidden(double), np.abs(hidden(double)).max()
    repaired = hidden(applied(fc.PruneHeads(heads=2, ridge=1e-6), double))
    np.testing.assert_allclose(repaired, want, rtol=0, atol=1e-4 * size)
    sliced = hidden(applied(fc.PruneHeads(heads=2, repair=False, ridge=1e-6), double))
    assert np.abs(sliced - want).max() > 0.05 * size


def test_repair_loses_less_than_slicing_and_choosing_by_error_less_than_by_magnitude():
    model = tiny("encoder")
    want = hidden(model)
    lost = {
        (by, repair): float(
            np.square(hidden(applied(fc.PruneChannels(keep=0.5, by=by, repair=repair), model)) - want).mean()
        )
        for by, repair in (("error", True), ("error", False), ("magnitude", True))
    }
    assert lost["error", True] < 0.8 * lost["error", False]
    assert lost["error", True] < lost["magnitude", True]


def test_of_grouped_queries_the_groups_or_as_many_of_each_go():
    model = tiny("grouped decoder")
    groups = applied(fc.PruneHeads(heads=2), model)
    assert (groups.config.heads, groups.config.groups) == (2, 1)
    queries = applied(fc.PruneHeads(heads=2, unit="queries", repair=False), model)
    assert (queries.config.heads, queries.config.groups) == (2, 2)
    for number in range(LAYERS):
        at = f"layers/{number}/attention"
        for name in ("key", "value"):
            assert kept_of(queries, model, f"{at}/{name}/kernel", 1) == list(range(2 * HEAD))
        heads = sorted({column // HEAD for column in kept_of(queries, model, f"{at}/query/kernel", 1)})
        assert [head // 2 for head in heads] == [0, 1]  # one of each group
        assert kept_of(queries, model, f"{at}/output/kernel", 0) == entries(np.asarray(heads), HEAD).tolist()
        pair = {column // HEAD for column in kept_of(groups, model, f"{at}/query/kernel", 1)}
        (group,) = {column // HEAD for column in kept_of(groups, model, f"{at}/key/kernel", 1)}
        assert pair == {2 * group, 2 * group + 1}


@pytest.mark.slow
def test_with_a_shared_relative_bias_the_same_heads_stay_everywhere():
    model = tiny("relative bias")
    for by in ("error", "activation"):
        small = applied(fc.PruneHeads(heads=3, by=by, repair=False), model)
        rows = [kept_of(small, model, f"layers/{n}/attention/output/kernel", 0) for n in range(LAYERS)]
        assert rows[0] == rows[1] == rows[2]
        heads = kept_of(small, model, "relative_bias/table", 1)
        assert rows[0] == entries(np.asarray(heads), HEAD).tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by", quick(["activation", "gradient", "magnitude"], ["activation"]))
def test_the_same_entries_of_the_width_stay_everywhere(by, name):
    model = tiny(name)
    small = applied(fc.PruneWidth(width=10, by=by), model)
    config = small.config
    assert (config.width, config.heads, config.head_dim, config.groups) == (10, HEADS, HEAD, model.config.groups)
    kept = kept_of(small, model, "layers/0/feed_forward/down/kernel", 1)
    assert len(kept) == 10 and kept == sorted(kept)
    old, new = tree.View(model.params), tree.View(small.params)
    for address in old:
        before, after = np.asarray(old[address]), np.asarray(new[address])
        for axis, (wide, narrow) in enumerate(zip(before.shape, after.shape, strict=True)):
            assert (wide, narrow) in ((D, 10), (wide, wide))
            if wide != narrow:
                before = np.take(before, kept, axis)
        np.testing.assert_array_equal(after, before, err_msg=address)
    assert np.isfinite(hidden(small)).all()


def test_by_activation_the_loudest_entries_of_the_width_stay():
    """Norms make three entries of what the layers read loud."""
    model = tiny("encoder")
    loud = np.ones(D)
    loud[[2, 7, 11]] = 6.0
    scales = {
        a: jnp.asarray(n * loud, jnp.float32) for a, n in tree.flatten(model.params).items() if a.endswith("/scale")
    }
    small = applied(fc.PruneWidth(width=3), changed(model, **scales))
    assert kept_of(small, model, "layers/1/attention/output/kernel", 1) == [2, 7, 11]


@pytest.mark.slow
def test_what_was_made_narrower_heals_by_relations():
    """Vectors of other widths cannot be compared, which is said; relations fall, and the width stays."""
    model = tiny("encoder")
    small, context = applied(fc.PruneWidth(width=12), model), Context(original=model, calibration=calibration())
    with pytest.raises(ValueError, match=r"use cosine=0, or relations, which may differ in width"):
        fc.Heal(steps=2, batch=8)(small, context, key=jax.random.key(0))
    heal = fc.Heal(steps=40, batch=16, cosine=0.0, hidden=0.0, relations=1.0, weights=1e-2, warmup=2)
    healed = heal(small, context, key=jax.random.key(0))
    losses = [entry["loss"] for entry in context.healing if entry["step"] > 0]
    assert healed.config.width == 12
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    with pytest.raises(ValueError, match="calibration text has no labels"):
        fc.Heal(hard=1.0)


# ── in PyTorch, and as stock folders ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", quick(["encoder", "grouped decoder", "relative bias"], ["encoder"]))
@pytest.mark.parametrize("step", [fc.PruneHeads(heads=2), fc.PruneWidth(width=10)], ids=lambda step: step.name)
def test_pytorch_computes_the_same_from_the_folder(step, name, tmp_path):
    from flaxcompress.export.torch import check_folder

    small = applied(step, tiny(name))
    fc.save(small, tmp_path / "small")
    again = fc.load(tmp_path / "small")
    assert again.config == small.config
    jax.tree.map(np.testing.assert_array_equal, again.params, small.params)
    assert check_folder(again, tmp_path / "small") <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "step", "refused"),
    [
        ("grouped decoder", fc.PruneHeads(heads=2), None),
        ("grouped decoder", fc.PruneHeads(heads=2, unit="queries"), None),
        ("grouped decoder", fc.PruneChannels(width=9), None),
        ("grouped decoder", fc.PruneWidth(width=10), None),
        ("encoder", fc.PruneHeads(heads=2), "head"),
    ],
)
def test_a_stock_folder_where_transformers_has_such_a_model(name, step, refused, tmp_path):
    changes: dict[str, Any] = {"family": "qwen3", "norm_bias": True} if name == "grouped decoder" else {}
    model = tiny(name)
    model = model.replace(config=model.config.replace(**changes))  # pyright: ignore[reportAttributeAccessIssue]
    small = applied(step, model)
    if refused:
        with pytest.raises(ValueError, match=refused):
            fc.export(small, tmp_path / "stock", format="torch-dense")
        return
    fc.export(small, tmp_path / "stock", format="torch-dense")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    ids = np.arange(5, 17).reshape(1, 12)
    with torch.no_grad():
        want = network(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(small(ids).logits, want, rtol=0, atol=2e-4 * np.abs(want).max())


# ── students ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_student_is_its_teacher_sliced():
    teacher = tiny("encoder")
    student = fc.student_from(teacher, layers=2, widths={"model": 12, "heads": 2, "feed_forward": 20})
    config = student.config
    assert (config.layers, config.width, config.heads, config.head_dim) == (2, 12, 2, HEAD)
    assert config.feed_forward_width_of(0) == config.feed_forward_width_of(1) == 20
    assert kept_of(student, fc.student_from(teacher, layers=(0, 2)), "embedding/token", 1)  # pieces of the teacher's
    assert np.isfinite(hidden(student)).all()
    chosen = fc.student_from(teacher, layers=(0, 2), widths={"heads": 3}, calibration=calibration())
    again = applied(fc.PruneHeads(heads=3), applied(fc.DropLayers(layers=(1,)), teacher))
    jax.tree.map(np.testing.assert_array_equal, chosen.params, again.params)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give layers or widths"),
        ({"layers": 0}, r"layers 0 is not in 1 … 3"),
        ({"layers": (0, 5)}, r"there is no layer 5; the teacher has layers 0 … 2"),
        ({"layers": (2, 0)}, r"must rise"),
        ({"widths": {"feedforward": 3}}, r"feed_forward"),
        ({"widths": {"heads": 9}}, r"PruneHeads: heads 9 is not in 1 … 4"),
    ],
)
def test_students_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        fc.student_from(tiny("encoder"), **given)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("step", "more", "message"),
    [
        (fc.PruneHeads(heads=0), {}, "PruneHeads: heads 0 is not in 1 … 4"),
        (fc.PruneHeads(), {}, "PruneHeads: give either heads or keep"),
        (fc.PruneHeads(keep=0.0), {}, r"PruneHeads: keep 0.0 must lie in \(0, 1\], the fraction of the heads"),
        (fc.PruneHeads(heads=3), {"key_value_heads": 2}, r"heads 3 is not in 2 … 4, in steps of 2"),
        (fc.PruneHeads(heads=2, unit="queries"), {}, "every query head has its own keys and values"),
        (
            fc.PruneHeads(heads=2),
            {"formats": [[".*/output/kernel", LOW_RANK]]},
            "low_rank already",
        ),
        (fc.PruneWidth(width=17), {}, "PruneWidth: width 17 is not in 1 … 16"),
        (fc.PruneWidth(width=10, multiple=4), {}, "width 10 is not in 4 … 16, in steps of 4"),
        (fc.PruneChannels(width=33), {}, "PruneChannels: width 33 is not in 1 … 32"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_plan(step, more, message):
    config = ModelConfig.from_json({**ModelConfig(**PLAIN).to_json(), **more})
    with pytest.raises(ValueError, match=message):
        step.plan(config)


def test_text_is_asked_for_only_where_it_is_needed():
    applied(fc.PruneHeads(heads=2, by="magnitude", repair=False), tiny("encoder"), text=False)
    with pytest.raises(ValueError, match="PruneHeads: needs calibration text"):
        applied(fc.PruneHeads(heads=2, by="magnitude"), tiny("encoder"), text=False)
    with pytest.raises(ValueError, match="ridge must be positive"):
        fc.PruneHeads(heads=2, ridge=0.0)


# ── which variables stay ─────────────────────────────────────────────────────────────────────────────────────────────


def moment(samples: np.ndarray) -> np.ndarray:
    return samples.T @ samples / len(samples)


def samples(seed: int = 3, count: int = 24) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(200, 8)) @ rng.normal(size=(8, count)) + 0.05 * rng.normal(size=(200, count)) + 0.3


@pytest.mark.parametrize("kept", [[3], [0, 5, 6, 11], list(range(2, 20)), list(range(24))])
def test_the_others_are_made_by_ridge_regression(kept):
    """As least squares on the samples themselves: [H_S; √λI]·M = [H; 0] for the variables that are not kept."""
    h = samples()
    c, rest = moment(h), np.setdiff1d(np.arange(24), kept)
    made = made_from(c, np.asarray(kept))
    damping = 1e-2 * np.trace(c) / 24
    root = np.sqrt(damping * len(h)) * np.eye(len(kept))
    system, target = np.vstack([h[:, kept], root]), np.vstack([h[:, rest], np.zeros((len(kept), len(rest)))])
    naive = np.linalg.lstsq(system, target, rcond=None)[0]
    atol = 64 * np.finfo(np.float64).eps * np.linalg.cond(system) ** 2
    np.testing.assert_allclose(made[:, rest], naive, rtol=0, atol=atol)
    np.testing.assert_array_equal(made[:, kept], np.eye(len(kept)))
    scores = np.diagonal(c @ np.linalg.inv(c + damping * np.eye(24)))
    np.testing.assert_allclose(leverage(c), scores, rtol=0, atol=64 * np.finfo(np.float64).eps * 24)


@pytest.mark.parametrize("block", [1, 4])
def test_forward_selection_takes_at_each_step_what_leaves_least(block):
    """Against trying every block at the first two steps, of two readers at once."""
    moments = [moment(samples(seed)) for seed in (3, 4)]
    readers = [np.random.default_rng(seed).normal(size=(24, 5)) for seed in (5, 6)]

    def left(kept):
        lost = 0.0
        for c, w in zip(moments, readers, strict=True):
            rows = entries(np.asarray(kept), block)
            inner = c[np.ix_(rows, rows)] + 1e-2 * np.trace(c) / 24 * np.eye(len(rows))
            # Squared error and ridge penalty together, what the elimination lowers, beside the size of the output.
            lost -= np.einsum("km,km->", c[rows] @ w, np.linalg.solve(inner, c[rows] @ w)) / np.trace(w.T @ c @ w)
        return lost

    first = min(range(24 // block), key=lambda j: left([j]))
    second = min((j for j in range(24 // block) if j != first), key=lambda j: left([first, j]))
    assert set(forward_selection(moments, readers, 2, block=block)) == {first, second}


def test_forward_selection_passes_over_copies_and_what_nobody_reads():
    """Six variables that vary alike, their copies, and six loud ones that the reader ignores."""
    rng = np.random.default_rng(4)
    h = rng.normal(size=(400, 12))
    h = np.hstack([h[:, :6], h[:, :6], 10 * h[:, 6:]])
    reader = np.vstack([rng.normal(size=(12, 5)), np.zeros((6, 5))])
    c = moment(h)
    errors = []
    for kept in (
        forward_selection([c], [reader], 6, ridge=1e-6),
        np.argsort(-leverage(c, ridge=1e-6), kind="stable")[:6],
    ):
        made = made_from(c, np.sort(kept), ridge=1e-6)
        errors.append(np.square(h[:, np.sort(kept)] @ made @ reader - h @ reader).sum() / np.square(h @ reader).sum())
    assert errors[0] < 1e-6 < 0.5 < errors[1]  # leverage keeps the loud ones


def test_what_is_never_active_gives_finite_numbers():
    c = np.zeros((24, 24))
    assert list(forward_selection([c], [np.ones((24, 3))], 4)) == [0, 1, 2, 3]
    assert np.isfinite(made_from(c, np.arange(4))).all() and not leverage(c).any()

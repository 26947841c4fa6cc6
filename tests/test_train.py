"""The engine: steps, refusals, checkpoints, resumption, evaluation."""

import itertools
import logging
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import make_model, words

import flaxcompress as fc
from flaxcompress.data.batches import StepBatches
from flaxcompress.ops import label_scores
from flaxcompress.train import Limits, Recipe, Stopped, Term, train
from flaxcompress.train.checkpoint import Checkpoints
from flaxcompress.train.memory import parse_bytes, step_bytes, ways
from flaxcompress.train.objectives import IGNORED, Program, cross_entropy, mean_of
from flaxcompress.train.placement import OneDevice
from flaxcompress.train.state import start
from flaxcompress.train.step import train_step
from flaxcompress.train.trainable import partition, thaw_model

KEY = jax.random.key(0)
EPS = float(np.finfo(np.float32).eps)


# ── a run on a toy ──────────────────────────────────────────────────────────────────────────────────────────────────


def terms(params, constants, batch, key):
    """Squared error of a linear map, over the rows whose target is a number."""
    del constants, key
    counts = jnp.isfinite(batch["y"])
    error = jnp.square(batch["x"] @ params["w"] - jnp.where(counts, batch["y"], 0.0))
    return {"error": Term(jnp.where(counts, error, 0.0).sum(), counts.sum().astype(jnp.float32))}


def batch(number, *, bad=(), rows=8):
    rng = np.random.default_rng(number)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    y = (x @ np.array([1.0, -2.0, 0.5], np.float32)).astype(np.float32)
    return {"x": np.full_like(x, np.nan) if number in bad else x, "y": y}


def toy(*, steps=12, bad=(), recipe=None, make=None, **options):
    recipe = recipe or Recipe(terms, optax.adam(0.05))
    make = make or (lambda number: batch(number, bad=bad))
    return train({"w": jnp.zeros(3)}, StepBatches(make), recipe, steps=steps, **options)


def by_hand(numbers):
    """The same run as a plain loop."""
    w, optimizer = jnp.zeros(3), optax.adam(0.05)
    state = optimizer.init(w)
    for number in numbers:
        given = batch(number)
        gradient = jax.grad(lambda w, b=given: jnp.square(b["x"] @ w - b["y"]).mean())(w)
        updates, state = optimizer.update(gradient, state, w)
        w = w + updates
    return w


def test_a_run_equals_a_plain_loop():
    np.testing.assert_allclose(toy()["w"], by_hand(range(12)), rtol=1e-5)


def test_refused_steps_change_nothing_and_are_told():
    seen = {}
    got = toy(bad=(2, 3), watch=lambda step, values: seen.update({step: values}))
    np.testing.assert_allclose(got["w"], by_hand([0, 1, *range(4, 12)]), rtol=1e-5)
    assert [step for step, values in seen.items() if not values["accepted"]] == [3, 4]
    assert sorted(seen) == list(range(1, 13)) and np.isnan(seen[3]["loss"]) and np.isfinite(seen[5]["loss"])


def test_many_refusals_in_a_row_end_a_run_without_checkpoints():
    with pytest.raises(FloatingPointError, match="in 5 steps running"):
        toy(bad=range(4, 40), steps=40, limits=Limits(refused=5))


def test_gradients_that_are_not_finite_are_refused_too():
    def root(params, constants, batch, key):  # finite at 0, its derivative is not
        del constants, batch, key
        return {"root": Term(jnp.sqrt(params["w"]).sum(), jnp.float32(1))}

    with pytest.raises(FloatingPointError, match="not finite"):
        toy(recipe=Recipe(root, optax.sgd(0.1)), steps=40)


def test_a_run_goes_back_and_passes_over_the_batches_that_were_refused(tmp_path, caplog):
    with Checkpoints(tmp_path) as keeper, caplog.at_level(logging.WARNING, "flaxcompress"):
        got = toy(bad=range(10, 15), steps=14, limits=Limits(refused=4), checkpoints=keeper, save_every=4)
    assert "going on from step 12 with other batches" in caplog.text or "from step 8" in caplog.text
    # Checkpoints at 4 and 8, and at 12 with two refusals: taken up with the batches behind those that were refused.
    assert np.isfinite(got["w"]).all()
    accepted = [number for number in range(40) if number not in range(10, 15)]
    starts = [by_hand([*range(10), *accepted[10 : 10 + n]]) for n in range(8)] + [
        by_hand([*range(8), *accepted[10 : 10 + n]]) for n in range(8)
    ]
    assert any(np.allclose(got["w"], w, rtol=1e-4) for w in starts)


def test_going_back_has_a_limit(tmp_path):
    with Checkpoints(tmp_path) as keeper, pytest.raises(FloatingPointError, match="not finite"):
        toy(bad=range(6, 400), steps=300, limits=Limits(refused=3, rollbacks=2), checkpoints=keeper, save_every=3)


def test_spikes_are_refused_once_the_loss_has_settled():
    def make(number):
        given = batch(number)
        return {**given, "y": given["y"] + np.float32({20: 2.0, 150: 500.0}[number])} if number in (20, 150) else given

    refused = []
    recipe = Recipe(terms, optax.sgd(0.05), spike=20.0)
    toy(recipe=recipe, make=make, steps=160, watch=lambda n, v: refused.append(n) if not v["accepted"] else None)
    assert 151 in refused, "a spike after 100 steps"
    assert 21 not in refused, "but not before"


def test_microbatches_give_the_gradient_of_the_whole_batch():
    def make(number):
        given = batch(number)
        given["y"][: number % 5] = np.nan  # rows that do not count, unevenly over the microbatches
        return given

    whole = toy(make=make)
    parts = toy(make=make, recipe=Recipe(terms, optax.adam(0.05), accumulate=4))
    np.testing.assert_allclose(parts["w"], whole["w"], rtol=1e-4)
    with pytest.raises(ValueError, match="8 rows cannot be split into 3 microbatches"):
        toy(recipe=Recipe(terms, optax.adam(0.05), accumulate=3))


def test_the_average_is_the_recursion():
    recipe = Recipe(terms, optax.sgd(0.1), average=0.5)
    got = toy(recipe=recipe, steps=6)
    w, average = jnp.zeros(3), jnp.zeros(3)
    for number in range(6):
        given = batch(number)
        w = w - 0.1 * jax.grad(lambda w, b=given: jnp.square(b["x"] @ w - b["y"]).mean())(w)
        decay = min(0.5, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * w
    np.testing.assert_allclose(got["w"], average, rtol=1e-5)


# ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cut", [1, 5, 6, 9])
def test_a_stopped_run_goes_on_to_the_same_bits(cut, tmp_path):
    def watch(step, values):
        if step == cut:
            signal.raise_signal(signal.SIGTERM)

    whole, losses = toy(), []
    with Checkpoints(tmp_path) as keeper, pytest.raises(Stopped, match="stopped after step"):
        toy(checkpoints=keeper, save_every=5, watch=watch)
    with Checkpoints(tmp_path) as keeper:
        again = toy(checkpoints=keeper, save_every=5, watch=lambda step, values: losses.append(step))
    np.testing.assert_array_equal(again["w"], whole["w"])
    assert cut < losses[0] <= cut + 2 and losses[-1] == 12
    with Checkpoints(tmp_path) as keeper:  # a run that is over does nothing
        np.testing.assert_array_equal(toy(checkpoints=keeper, watch=pytest.fail)["w"], whole["w"])


STATE = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": {"n": np.arange(5, dtype=np.int32)}}


def state(change=lambda x: x):
    return jax.tree.map(lambda x: jnp.asarray(change(x)), STATE)


def fill(folder, steps=(1, 2, 3), **options):
    with Checkpoints(folder, **options) as keeper:
        for step in steps:
            keeper.save(step, state(lambda x, s=step: x + x.dtype.type(s)), {"at": step}, metric=abs(step - 2) + 1.0)


def kept(folder, like=None, **options):
    with Checkpoints(folder, **options) as keeper:
        return keeper.restore(state() if like is None else like)


def test_the_newest_and_the_best_are_kept(tmp_path):
    fill(tmp_path, steps=(1, 2, 3, 4, 5), keep_last=2, keep_best=1)
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as keeper:
        assert keeper.steps() == [2, 4, 5] and keeper.best() == 2
        step, found, extra = keeper.restore(state())
        assert (step, extra) == (5, {"at": 5})
        np.testing.assert_array_equal(found["a"], STATE["a"] + 5)
        assert keeper.restore(state(), step=2)[2] == {"at": 2}


def test_arrays_come_in_the_dtype_that_is_asked_for(tmp_path):
    fill(tmp_path)
    half = {**state(), "a": jnp.zeros((3, 4), jnp.bfloat16)}
    found = kept(tmp_path, half)[1]
    assert found["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["a"], jnp.asarray(STATE["a"] + 3, jnp.bfloat16))


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def test_a_flipped_bit_never_comes_back_as_data(tmp_path, caplog):
    """One bit of every file of the newest checkpoint, one at a time."""
    fill(tmp_path / "whole")
    newest = tmp_path / "whole" / "3"
    names = [p.relative_to(newest) for p in sorted(newest.rglob("*")) if p.is_file() and p.stat().st_size]
    aside = 0
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        fill(folder)
        files = [p.relative_to(folder / "3") for p in sorted((folder / "3").rglob("*")) if p.is_file()]
        files = [name for name in files if (folder / "3" / name).stat().st_size]
        flip(folder / "3" / files[min(number, len(files) - 1)], 0.6)
        step, found, extra = kept(folder)
        assert step in (2, 3) and extra == {"at": step}
        np.testing.assert_array_equal(found["a"], STATE["a"] + step)
        np.testing.assert_array_equal(found["b"]["n"], STATE["b"]["n"] + step)
        assert (folder / "damaged-3").is_dir() == (step == 2)
        aside += step == 2
    assert aside >= 3
    assert "checkpoint" in caplog.text and "is damaged" in caplog.text and "set aside as damaged-3" in caplog.text


def test_no_whole_checkpoint_is_none(tmp_path):
    fill(tmp_path, steps=(1,))
    for path in (tmp_path / "1").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert kept(tmp_path) is None
    assert kept(tmp_path / "new") is None


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {**s, "a": jnp.zeros((3, 5))}, r"a is \[3, 4\] there, \[3, 5\] in this run"),
        (lambda s: {**s, "c": jnp.zeros(1)}, "c is not in it"),
        (lambda s: {"a": s["a"]}, "b/n is not part of this run"),
    ],
)
def test_another_models_checkpoint_is_an_error_and_stays(change, message, tmp_path):
    fill(tmp_path)
    with pytest.raises(ValueError, match=message):
        kept(tmp_path, change(state()))
    assert kept(tmp_path)[0] == 3


def test_a_full_disk_is_a_warning_and_training_goes_on(tmp_path, caplog):
    big = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(1024, 512)), jnp.float32)}

    def flat(params, constants, batch, key):
        return {"size": Term(jnp.square(params["w"]).sum(), jnp.float32(1))}

    def run(keeper, steps, **options):
        recipe = Recipe(flat, optax.sgd(0.01))
        return train(big, StepBatches(batch), recipe, steps=steps, checkpoints=keeper, save_every=2, **options)

    with Checkpoints(tmp_path) as keeper:
        run(keeper, 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit is then an error, as on a full disk
    try:
        with Checkpoints(tmp_path) as keeper, caplog.at_level(logging.WARNING, "flaxcompress"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
            got = run(keeper, 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert "could not be written" in caplog.text and "training goes on, the newest one is 2" in caplog.text
    with Checkpoints(tmp_path) as keeper:
        assert keeper.steps() == [2], "the old one stays"
        np.testing.assert_array_equal(run(keeper, 6)["w"], got["w"])


# ── fit ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

WORDS = words(40)


def tiny(head="masked_lm", **config):
    config = {"width": 16, "layers": 2, "feed_forward_width": 32, "positions": 16, **config}
    return make_model(WORDS, head=head, pooler=head == "pretraining", **config)


def ordered(number, rows=4):
    rng = np.random.default_rng(number)
    ids = rng.integers(5, 45, (rows, 8)).astype(np.int32)
    places = np.sort(rng.permuted(np.tile(np.arange(8), (rows, 1)), axis=1)[:, :3], 1).astype(np.int32)
    labels = np.take_along_axis(ids, places, 1)
    np.put_along_axis(ids, places, 4, 1)
    labels[0, 2] = IGNORED
    return {
        "input_ids": ids,
        "attention_mask": np.ones(ids.shape, bool),
        "label_positions": places,
        "labels": labels,
        "order_labels": (ids[:, 1] % 2).astype(np.int32),
    }


def masked(number):
    given = ordered(number)
    del given["order_labels"]
    return given


def fit(model, objective, make=masked, **options):
    options = {"steps": 4, "key": KEY, "optimizer": optax.adam(1e-2), **options}
    return fc.fit(model, objective, StepBatches(make), **options)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True))


def test_masked_lm_with_sentence_order_learns_and_validates(tmp_path):
    values = {}
    made = fit(
        tiny("pretraining", classes=2),
        fc.MaskedLM(),
        make=lambda number: ordered(number % 2),
        steps=40,
        validation=[ordered(0), ordered(1)],
        evaluate_every=20,
        evaluation=lambda model: {"weights": float(model.parameters)},
        watch=lambda step, found: values.setdefault(step, {}).update(found),
    )
    assert values[1]["loss"] == pytest.approx(values[1]["cross_entropy"] + values[1]["order_cross_entropy"], rel=1e-5)
    assert values[40]["validation/loss"] < 0.7 * values[1]["loss"]
    assert values[20]["validation/weights"] == made.parameters and "validation/loss" not in values[19]
    # What validation measures, by hand: means over both batches' counted labels.
    total = weight = 0.0
    for number in (0, 1):
        given = masked(number)
        logits = made(given["input_ids"], given["attention_mask"]).logits.masked_lm
        chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), given["label_positions"][..., None], 1)
        counts = given["labels"] != IGNORED
        nll = -np.take_along_axis(chosen, np.where(counts, given["labels"], 0)[..., None], 2)[..., 0]
        total, weight = total + (nll * counts).sum(), weight + counts.sum()
    assert values[40]["validation/cross_entropy"] == pytest.approx(total / weight, rel=1e-4)


@pytest.mark.parametrize("how", ["ema", "bfloat16", "remat", "trainable"])
def test_options_do_what_they_say(how):
    model = tiny()
    plain = fit(model, fc.MaskedLM(dropout=False))
    options = {
        "ema": {"ema": 0.9},
        "bfloat16": {"dtype": "bfloat16"},
        "remat": {"remat": "full"},
        "trainable": {"trainable": "embedding/.*"},
    }[how]
    other = fit(model, fc.MaskedLM(dropout=False), **options)
    assert other.config == model.config
    if how == "remat":  # the same sums in another order, over four steps of Adam
        for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(other.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-3)
        return
    assert not same(plain, other)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(other.params)), "master weights are float32"
    if how == "trainable":
        for kept, before in zip(
            jax.tree.leaves(other.params["layers"]), jax.tree.leaves(model.params["layers"]), strict=True
        ):
            np.testing.assert_array_equal(kept, before)


def test_dropout_draws_from_the_key_and_the_step():
    model = tiny(dropout=0.3)
    first, again = (fit(model, fc.MaskedLM()) for _ in range(2))
    assert same(first, again)
    assert not same(first, fit(model, fc.MaskedLM(), key=jax.random.key(1)))
    assert not same(first, fit(model, fc.MaskedLM(dropout=False)))


def test_the_best_checkpoint_is_returned_when_asked_for(tmp_path):
    seen = {}
    options = {"steps": 12, "validation": [masked(100)], "evaluate_every": 3, "optimizer": optax.sgd(2.0)}
    best = fit(
        tiny(),
        fc.MaskedLM(dropout=False),
        out=tmp_path,
        keep_best=1,
        take_best=True,
        watch=lambda step, values: seen.update({step: values}) if "validation/loss" in values else None,
        **options,
    )
    least = min(seen, key=lambda step: seen[step]["validation/loss"])
    short = fit(tiny(), fc.MaskedLM(dropout=False), **{**options, "steps": least, "validation": None})
    assert same(best, short)


def test_a_run_ends_when_evaluations_get_no_better(tmp_path):
    """Two worse ones after the best; stopped there and started again, it ends at once."""
    given = iter([3.0, 2.0, 2.5, 2.0, 1.0])
    seen = []
    options = {
        "steps": 20,
        "evaluate_every": 2,
        "evaluation": lambda model: {"error": next(given)},
        "best": "error",
        "patience": 2,
        "out": tmp_path,
        "save_every": 1,
    }
    made = fit(tiny(), fc.MaskedLM(dropout=False), watch=lambda step, values: seen.append(step), **options)
    assert max(seen) == 8
    again = fit(tiny(), fc.MaskedLM(dropout=False), watch=lambda step, values: seen.append(-step), **options)
    assert min(seen) > 0 and same(made, again)


def test_quantized_models_stay_quantized():
    model = tiny()
    small, _ = fc.compress(model, fc.Recipe([fc.Quantize(bits=8)]), key=KEY)
    made = fit(small, fc.MaskedLM(dropout=False))
    assert made.config == small.config and made.nbytes == small.nbytes and not same(made, small)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16"),
        ({"remat": "some"}, "remat: unknown kind 'some'"),
        ({"ema": 1.0}, "ema must lie between 0 and 1"),
        ({"keep_best": 1}, "give out= and validation="),
        ({"trainable": "layer/.*"}, "trainable: 'layer/.*' matches no parameter"),
        ({"best_mode": "most"}, "best_mode must be 'min' or 'max'"),
        ({"validation": []}, "evaluation: there are no batches"),
        ({"patience": 1}, "patience counts evaluations"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        fit(tiny(), fc.MaskedLM(), **{"steps": 1, **options})


def long(number):
    rng = np.random.default_rng(number)
    ids = rng.integers(5, 45, (8, 16)).astype(np.int32)
    return {"input_ids": ids, "attention_mask": np.ones(ids.shape, bool), "labels": ids}


def test_a_memory_limit_chooses_what_is_computed_again(caplog):
    model, program = tiny(layers=6, width=32), fc.MaskedLM(dropout=False)
    whole = fit(model, program, make=long)
    place, step = OneDevice(), {}
    moving, frozen = partition(thaw_model(model))
    for kind, parts in ways("none", 1, 8):
        recipe = Recipe(Program(program, model.config, jnp.float32, kind), optax.adam(1e-2), parts)
        state = place.start(recipe, moving)
        step[kind, parts] = step_bytes(place, recipe, state, frozen, (), long(0), KEY)
    assert list(step)[:4] == [("none", 1), ("dots", 1), ("full", 1), ("none", 2)] and list(step)[-1] == ("full", 8)
    assert step["full", 1] < step["none", 1] and step["none", 4] < step["none", 1]
    limit = (step["none", 1] + min(step.values())) // 2
    wanted = next(way for way, size in step.items() if size <= limit)
    with caplog.at_level(logging.WARNING, "flaxcompress"):
        made = fit(model, program, make=long, memory_limit=limit)
    assert f"remat {wanted[0]} and {wanted[1]} microbatches" in caplog.text
    for a, b in zip(jax.tree.leaves(made.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-3)  # as with remat alone
    with pytest.raises(ValueError, match=r"memory_limit: 0\.0 MB are too little; the smallest step, with remat"):
        fit(model, program, make=long, memory_limit=1000)


@pytest.mark.parametrize("text, size", [("12GB", 12 * 10**9), ("1.5MiB", 3 * 2**19), (77, 77), ("80", 80)])
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "12 parsecs", "0GB", "-3MB", "1.2.3GB"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="expected a size such as 12GB or 800MiB"):
        parse_bytes(text)


def test_order_labels_need_a_head_for_them():
    with pytest.raises(ValueError, match="head 'masked_lm' does not predict the order of sentences"):
        fit(tiny(), fc.MaskedLM(), make=ordered)


# ── losses ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("smoothing, z_loss", list(itertools.product([0.0, 0.1], [0.0, 1e-2])))
def test_cross_entropy_equals_float64(smoothing, z_loss):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 7)).astype(np.float32) * 3
    labels = np.array([[1, IGNORED, 6], [0, 2, IGNORED]], np.int32)
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing=smoothing, z_loss=z_loss)
    wide = logits.astype(np.float64)
    normaliser = np.log(np.exp(wide).sum(-1))
    want, right, count = 0.0, 0, 0
    for i, j in itertools.product(range(2), range(3)):
        if (label := labels[i, j]) == IGNORED:
            continue
        target = np.full(7, smoothing / 7)
        target[label] += 1 - smoothing
        want += (target * (normaliser[i, j] - wide[i, j])).sum() + z_loss * normaliser[i, j] ** 2
        right, count = right + (wide[i, j].argmax() == label), count + 1
    assert float(found["cross_entropy"].total) == pytest.approx(want, rel=32 * EPS)
    assert (float(found["cross_entropy"].weight), float(found["accuracy"].total)) == (count, right)
    assert float(mean_of(found)) == pytest.approx(want / count, rel=32 * EPS)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_classes_are_torchs(smoothing):
    """torch divides by the weights of the labels; of smoothing it weighs what is spread by each class's own."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(9, 4)).astype(np.float32), np.array([0, 1, IGNORED, 3, 2, 2, 0, 0, 3], np.int32)
    weights = (0.5, 2.0, 1.0, 3.0)
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing=smoothing, weights=weights)
    wide = torch.tensor(logits, dtype=torch.float64)
    each = torch.nn.functional.cross_entropy(
        wide, torch.tensor(labels).long(), ignore_index=IGNORED, label_smoothing=smoothing, reduction="none"
    )
    counted = np.array([0.0 if label == IGNORED else weights[label] for label in labels])
    want = (each.numpy() * counted).sum() / counted.sum()
    assert float(mean_of(found)) == pytest.approx(want, rel=32 * EPS)
    if not smoothing:
        torchs = torch.nn.functional.cross_entropy(
            wide, torch.tensor(labels).long(), weight=torch.tensor(weights).double(), ignore_index=IGNORED
        )
        assert want == pytest.approx(float(torchs), rel=1e-12)
    assert float(found["accuracy"].weight) == 8


def test_class_weights_must_fit():
    with pytest.raises(ValueError, match="must not be negative"):
        fc.Classification(class_weights=(1.0, -1.0))
    with pytest.raises(ValueError, match="3 class_weights, but the model has 2 classes"):
        logits = type("Output", (), {"logits": jnp.zeros((2, 2))})
        run = type("Run", (), {"config": tiny().config, "__call__": lambda self, batch: logits})()
        fc.Classification(class_weights=(1.0, 1.0, 1.0)).loss(run, (), {"labels": jnp.zeros(2, jnp.int32)})


@pytest.mark.parametrize("whole", [False, True])
def test_the_gradient_of_label_scores_equals_differentiation(whole):
    rng = np.random.default_rng(0)
    logits, labels = jnp.asarray(rng.normal(size=(4, 9)) * 5, jnp.float32), jnp.asarray([0, 8, 3, IGNORED])
    weights = jnp.asarray([[1.0, -2.0, 0.5, 0.0], [0.3, 1.0, 2.0, -1.0]])  # of the chosen logits and the normalisers

    def ours(logits):
        found = label_scores(logits, labels, whole=whole)
        return (weights[0] * found.chosen + weights[1] * found.normaliser).sum()

    def plain(logits):
        chosen = logits[jnp.arange(4), jnp.clip(labels, 0)]
        return (weights[0] * chosen + weights[1] * jax.nn.logsumexp(logits, -1)).sum()

    (value, gradient), (want, wanted) = (jax.value_and_grad(f)(logits) for f in (ours, plain))
    np.testing.assert_allclose(value, want, rtol=16 * EPS)
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=16 * EPS * 5)
    largest = label_scores(logits, labels, whole=whole).largest
    np.testing.assert_array_equal(largest[:3], (logits.argmax(-1) == labels)[:3])


def test_a_batch_without_labels_gives_no_gradient():
    given = {"x": np.ones((2, 3), np.float32), "y": np.full(2, np.nan, np.float32)}
    recipe = Recipe(terms, optax.sgd(1.0))
    before = start({"w": jnp.ones(3)}, recipe.optimizer, average=False)
    after, report = jax.jit(train_step, static_argnums=0)(recipe, before, {"w": None}, (), given, None)
    np.testing.assert_array_equal(after.trainable["w"], 1.0)
    assert float(report.loss) == 0.0

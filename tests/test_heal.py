"""Healing: it helps, keeps formats, resumes to the same weights, and survives bad gradients and interrupts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import make_model, make_sentences, words

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.compress import Calibration, Context
from flaxcompress.compress.heal import Heal
from flaxcompress.data.stream import FragmentStream
from flaxcompress.train import freeze_model, thaw_model
from flaxcompress.train.objectives import cosine_term, hidden_term, logits_term

WORDS = words(200)


def loss_of(term, *arrays):
    found = term(*arrays)
    return found.total / found.weight


MORE_BITS = fc.BitsFor(pattern=r"layers/1/.*", bits=4, group=16)


def tiny(head="none", key=0):
    config = {"width": 32, "layers": 3, "feed_forward_width": 64, "positions": 32}
    return make_model(WORDS, key=key, head=head, pooler=False, **config)


@pytest.fixture(scope="module")
def setting():
    model = tiny()
    text = fc.calibration_text(make_sentences(WORDS, 300))
    calibration = Calibration(text, model.assets, vocabulary=len(WORDS))
    context = Context(original=model, calibration=calibration)
    steps = (
        fc.FactorizeEmbedding(average_bits=3.0, max_tiers=3),
        fc.Quantize(
            bits=2, group=16, pattern=r"layers/.*/kernel", overrides=(fc.BitsFor(pattern=r".*/1/.*", bits=4, group=16),)
        ),
    )
    small = model
    for step in steps:
        small = step(small, context, key=jax.random.key(1))
    return model, small, context, text


def fidelity(model, original, text):
    a, b = model.encode(text.held_out), original.encode(text.held_out)
    return float((a * b).sum(1).mean())


def test_thawed_model_computes_the_same_and_freezes_back_to_the_same_bits(setting):
    original, small, _, _ = setting
    thawed = thaw_model(small, original)
    ids = jnp.arange(12).reshape(1, 12)
    again = small.replace(params=thawed)
    want, got = small(ids).last_hidden_state, again(ids).last_hidden_state
    # The same values in another order of operations: a few roundings of sums over F terms.
    atol = 8 * np.finfo(np.float32).eps * np.sqrt(64) * float(jnp.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)
    frozen = freeze_model(thawed, small)
    assert jax.tree.structure(frozen.params) == jax.tree.structure(small.params)
    for a, b in zip(jax.tree.leaves(frozen.params), jax.tree.leaves(small.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_layers_of_different_bits_share_one_scan_while_healing(setting):
    _, small, _, _ = setting
    assert len(small.params["layers"]["feed_forward"]) > 1, "different bits cannot be stacked as integers"
    assert len(thaw_model(small)["layers"]["feed_forward"]) == 1, "but can in training form"


def test_healing_brings_the_vectors_closer_and_keeps_formats_and_size(setting):
    original, small, context, text = setting
    healed = Heal(steps=60, batch=16)(small, context, key=jax.random.key(2))
    assert healed.config == small.config
    assert healed.nbytes == small.nbytes
    assert jax.tree.structure(healed.params) == jax.tree.structure(small.params)
    before, after = fidelity(small, original, text), fidelity(healed, original, text)
    assert after > before, f"cosine {before:.4f} -> {after:.4f}"
    assert [h["step"] for h in context.healing] == list(range(1, 61))
    first, last = (np.mean([h["loss"] for h in part]) for part in (context.healing[:10], context.healing[-10:]))
    assert last < 0.9 * first, f"loss {first:.4f} -> {last:.4f}"


def test_zero_steps_change_nothing(setting):
    _, small, context, _ = setting
    assert Heal(steps=0)(small, context, key=jax.random.key(0)) is small


@pytest.mark.slow
def test_logits_are_healed_where_a_head_exists():
    model = tiny("masked_lm")
    small = fc.Quantize(bits=2, group=16, rounding="mse")(model, Context(original=model), key=jax.random.key(0))
    text = fc.calibration_text(make_sentences(WORDS, 300))
    context = Context(original=model, calibration=Calibration(text, model.assets, vocabulary=len(WORDS)))
    healed = Heal(steps=30, batch=8, cosine=0.0, hidden=0.0)(small, context, key=jax.random.key(0))
    ids = np.asarray(model.assets.tokenize([text.held_out[0]]).ids)

    def divergence(m):
        return float(loss_of(logits_term, m(ids).logits, model(ids).logits, jnp.ones(ids.shape, bool)))

    assert divergence(healed) < 0.9 * divergence(small)


def test_losses_are_zero_at_equality_and_ignore_padding():
    key = jax.random.key(0)
    x = jax.random.normal(key, (3, 2, 5, 8))
    mask = jnp.array([[True] * 5, [True, True, False, False, False]])
    assert float(loss_of(hidden_term, x, x, mask)) == 0.0
    other = x.at[:, 1, 2:].set(7.0)
    assert float(loss_of(hidden_term, other, x, mask)) == 0.0
    assert float(loss_of(logits_term, other[0], x[0], mask)) == pytest.approx(0.0, abs=1e-6)
    v = x[0, :, 0]
    assert float(loss_of(cosine_term, 3.0 * v, v, mask.any(1))) == pytest.approx(0.0, abs=1e-6)
    p, q = np.log([0.7, 0.2, 0.1]), np.log([0.5, 0.3, 0.2])
    one = jnp.ones((1, 1), bool)
    got = float(loss_of(logits_term, jnp.array([[q]]), jnp.array([[p]]), one))
    assert got == pytest.approx(sum(np.exp(p) * (p - q)), abs=1e-6)


def test_batches_are_a_pure_function_of_the_step():
    rows = [[2, *range(10, 10 + n), 3] for n in range(5, 40)]
    make = lambda: FragmentStream(rows, batch=4, pad=0, seed=7, max_length=24)  # noqa: E731
    forward = [make()(s) for s in range(30)]
    stream = make()
    for step in reversed(range(30)):
        ids, mask = stream(step)
        np.testing.assert_array_equal(ids, forward[step][0])
        np.testing.assert_array_equal(mask, forward[step][1])
        assert (ids[:, 0] == 2).all() and ids.shape[0] == 4 and ids.shape[1] <= 24
        assert all(row[m][-1] == 3 for row, m in zip(ids, mask, strict=True))
    assert any(not np.array_equal(forward[0][0], f[0]) for f in forward[1:])


def test_a_folder_that_holds_something_else_is_not_emptied(setting, tmp_path):
    original, _, _, text = setting
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a work folder"):
        fc.compress(original, fc.Recipe([fc.Quantize(bits=8)]), calibration=text, key=jax.random.key(0), work=tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


RECIPE = """
steps:
  - FactorizeEmbedding: {average_bits: 3.0, max_tiers: 2}
  - Quantize: {bits: 3, group: 16, pattern: 'layers/.*/kernel'}
  - Heal: {steps: 120, batch: 16, save_every: 10}
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """(folder, a function that starts the same compression into a given output)."""
    folder = tmp_path_factory.mktemp("resume")
    fc.save(tiny(), folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "text.txt").write_text("\n".join(make_sentences(WORDS, 200)))

    def start(out: Path) -> subprocess.Popen:
        words = ["compress", "model", "--recipe", "recipe.yaml", "--data", "text.txt", "--out", str(out)]
        return subprocess.Popen(
            [sys.executable, "-m", "flaxcompress", *words], cwd=folder, stderr=subprocess.PIPE, text=True
        )

    whole = start(folder / "whole")
    _, errors = whole.communicate(timeout=600)
    assert whole.returncode == 0, errors
    return folder, start


def losses(folder):
    return json.loads((folder / "report.json").read_text())["healing"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_run_resumes_and_ends_with_the_same_weights(command, number):
    folder, start = command
    out = folder / f"cut-{number.name}"
    process = start(out)
    checkpoints = folder / f".{out.name}.work" / "heal" / "checkpoints"
    deadline = time.monotonic() + 300
    while not (checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir())):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and not out.exists()
    if number != signal.SIGKILL:
        assert "run the same command again" in errors and "Traceback" not in errors
    again = start(out)
    _, errors = again.communicate(timeout=600)
    assert again.returncode == 0, errors
    assert "goes on from step" in errors
    assert losses(out) == losses(folder / "whole"), "the report holds the whole curve"
    want, got = (fc.load(f) for f in (folder / "whole", out))
    for (address, a), b in zip(tree.flatten(want.params).items(), tree.flatten(got.params).values(), strict=True):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=address)
    assert not os.path.exists(folder / f".{out.name}.work")

"""Large batches in blocks on CPU: the same outputs, and when they are used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxcompress as fc
from flaxcompress import blocks
from flaxcompress.blocks import block_rows, by_blocks, side_by_side
from flaxcompress.nn import Transformer

CONFIG = fc.ModelConfig(
    vocabulary=50, width=16, layers=2, heads=2, feed_forward_width=24, positions=128, head="masked_lm"
)
cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="blocks are for CPUs")


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(blocks, "cores", lambda: 2)


@cpu
@pytest.mark.parametrize(
    ("rows", "length", "expected"),
    [
        (32, 128, 4),
        (32, 64, 8),
        (32, 512, 1),
        (64, 2, None),  # a half is one block
        (33, 128, None),  # no halves
        (2 * 37, 128, None),  # 37 rows have no good blocks
        (2, 1024, 1),
    ],
)
def test_blocks_have_about_512_tokens(rows, length, expected, two_cores):
    assert block_rows(rows, length) == expected


def test_one_core_takes_one_piece(monkeypatch):
    monkeypatch.setattr(blocks, "cores", lambda: 1)
    assert block_rows(32, 128) is None


def test_blocks_and_halves_keep_the_order():
    x, none = jnp.arange(24.0).reshape(12, 2), None
    double = lambda a, b: {"twice": 2 * a, "sum": a.sum(-1), "nothing": b}  # noqa: E731
    for run in (by_blocks(double, 3), lambda *arrays: side_by_side(double, *arrays)):
        got = run(x, none)
        np.testing.assert_array_equal(got["twice"], 2 * x)
        np.testing.assert_array_equal(got["sum"], x.sum(-1))
        assert got["nothing"] is None


@cpu
@pytest.mark.parametrize("masked", [True, False])
def test_a_large_batch_gives_what_one_piece_gives(masked, two_cores):
    model = fc.Model.init(CONFIG, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 50, (16, 128))
    mask = np.arange(128) < rng.integers(1, 129, (16, 1)) if masked else None
    assert block_rows(*ids.shape) == 4
    got = model(ids, mask)
    want = jax.jit(lambda params: Transformer(CONFIG).apply({"params": params}, ids, mask))(model.params)
    for name in ("last_hidden_state", "pooled", "logits"):
        a, b = getattr(got, name), getattr(want, name)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
    assert got.hidden_states is None and got.attentions is None


@cpu
def test_a_call_that_is_traced_is_not_cut(two_cores):
    model = fc.Model.init(CONFIG, key=jax.random.key(0))
    ids = np.ones((16, 128), np.int32)
    np.testing.assert_allclose(
        jax.jit(lambda i: model(i).last_hidden_state)(ids), model(ids).last_hidden_state, atol=1e-5
    )


def test_errors_of_a_half_arrive():
    def fail(x):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        side_by_side(fail, jnp.zeros((4, 1)))

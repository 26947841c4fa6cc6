"""Full attention turned into Linformer's and into Nyström attention: where it is exact, the fit, what is refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny_models import make_sentences, words

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.compress import Calibration, Context, ToLinformer, ToNystrom
from flaxcompress.compress.to_linformer import Parts, fit_values, interleaved
from flaxcompress.config import Linformer, ModelConfig, Nystrom, Rotary
from flaxcompress.data import CalibrationText
from flaxcompress.model import abstract_flat

VOCABULARY = words(40)
FIELDS = {
    "vocabulary": len(VOCABULARY),
    **{"width": 16, "layers": 2, "heads": 4, "feed_forward_width": 16, "positions": 32, "segments": 0},
    **{"dropout": 0.0, "attention_dropout": 0.0, "pooler": False},
}
GROUPED = {
    **{"key_value_heads": 2, "rotary": Rotary(theta=30.0), "position_embedding": "none", "query_key_norm": True},
    **{"norm_place": "pre", "final_norm": True},
}


def model_of(**more) -> fc.Model:
    config, rng = ModelConfig(**FIELDS, **more), np.random.default_rng(0)
    draw = lambda a, shape: a.endswith("scale") + 0.3 * rng.normal(size=shape)  # noqa: E731
    flat = {a: np.asarray(draw(a, leaf.shape), np.float32) for a, leaf in abstract_flat(config).items()}
    files = (("vocab.txt", "\n".join(VOCABULARY).encode()),)
    return fc.Model(params=tree.unflatten(flat), config=config, assets=fc.Assets(files=files, max_length=32))


def context_of(model: fc.Model) -> Context:
    text = CalibrationText(name="words", train=tuple(make_sentences(VOCABULARY, 40)), held_out=())
    return Context(original=model, calibration=Calibration(text, model.assets, vocabulary=len(VOCABULARY)))


def applied(step, model: fc.Model) -> fc.Model:
    return step(model, context_of(model), key=jax.random.key(0))


def hidden(model: fc.Model, length: int) -> np.ndarray:
    ids = np.random.default_rng(3).integers(5, len(VOCABULARY), (3, length))
    return np.asarray(model(ids).last_hidden_state, np.float64)


def error(model: fc.Model, original: fc.Model, length: int) -> float:
    want = hidden(original, length)
    return float(((hidden(model, length) - want) ** 2).mean() / want.var())


# ── Linformer ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_places_go_to_slots_in_turn():
    want = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1 / 2, 0, 0], [0, 1 / 2, 0], [0, 0, 1 / 2], [1 / 3, 0, 0]]
    np.testing.assert_allclose(interleaved(7, 3), want)


def random_parts(groups: int = 2) -> list[Parts]:
    """Two batches of unequal lengths, two heads in each group."""
    rng, out = np.random.default_rng(1), []
    for length in (4, 6):
        p = rng.dirichlet(np.ones(3), (2, groups, 2, length))
        values, outputs = rng.normal(size=(2, 2, groups, 2, length, 5))
        out.append(Parts(p, values, outputs))
    return out


def test_the_fit_is_the_least_squares_solution():
    """Against numpy's solver on the dense problem, one row per number of the outputs."""
    parts = random_parts()
    got = fit_values(parts, np.zeros((2, 8, 3)), iterations=60)
    for group in range(2):
        rows, wanted = [], []
        for p, v, y in parts:
            one = np.einsum("bhtk,bhsd->bhtdsk", p[:, group], v[:, group])
            one = np.pad(one, [(0, 0)] * 4 + [(0, 6 - one.shape[4]), (0, 0)])
            rows.append(one.reshape(-1, 18))
            wanted.append(y[:, group].ravel())
        want = np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted), rcond=None)[0].reshape(6, 3)
        np.testing.assert_allclose(got[group, :6], want, atol=1e-8)
        np.testing.assert_array_equal(got[group, 6:], 0)


def test_places_that_no_text_reaches_stay_as_they_are():
    start = np.random.default_rng(2).normal(size=(2, 9, 3))
    got = fit_values(random_parts(), start, iterations=5)
    np.testing.assert_array_equal(got[:, 6:], start[:, 6:])
    assert np.abs(got[:, :6] - start[:, :6]).min(-1).max() > 1e-3


@pytest.mark.parametrize("more", [{}, pytest.param(GROUPED, marks=pytest.mark.slow)])
def test_the_fit_is_closer_than_random_projections_and_than_none(more):
    model = model_of(**more)
    sharing = "none" if more else "head"
    step = ToLinformer(length=8, sharing=sharing, iterations=80)
    fitted = applied(step, model)
    assert fitted.config == step.plan(model.config)
    drawn = fc.Model.init(fitted.config, key=jax.random.key(1))
    tables = {a: n for a, n in tree.flatten(drawn.params).items() if a.endswith("sequence/table")}
    random = fitted.replace(params=tree.replace(fitted.params, tables))
    unfitted = applied(ToLinformer(length=8, sharing=sharing, iterations=0), model)
    for length in (12, 16):
        assert error(fitted, model, length) < error(unfitted, model, length) < error(random, model, length)


def test_sequences_as_long_as_the_projection_are_exact_without_a_fit():
    model = model_of()
    turned = applied(ToLinformer(length=9, iterations=0), model)
    want = hidden(model, 9)
    np.testing.assert_allclose(hidden(turned, 9), want, rtol=0, atol=64 * np.finfo(np.float32).eps * np.abs(want).max())


# ── Nyström ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nystrom_is_exact_up_to_its_landmarks_and_closer_with_more():
    model = model_of(**GROUPED)
    turned = applied(ToNystrom(landmarks=9, convolution=3), model)
    assert turned.config.attention == Nystrom(landmarks=9, convolution=3)
    want = hidden(model, 9)
    np.testing.assert_allclose(hidden(turned, 9), want, rtol=0, atol=64 * np.finfo(np.float32).eps * np.abs(want).max())
    few, many = (applied(ToNystrom(landmarks=m), model) for m in (3, 12))
    assert 0 < error(many, model, 24) < error(few, model, 24)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("step", "more", "message"),
    [
        (ToLinformer(length=40), {}, "linformer's length 40 is over the 32 positions"),
        (ToLinformer(length=4), {"causal": True}, "linformer attention goes with causal=False only"),
        (
            ToLinformer(length=4),
            {"attention": Nystrom(landmarks=4)},
            "ToLinformer: only encoders.*has nystrom",
        ),
        (ToNystrom(landmarks=4), {"causal": True}, "nystrom attention goes with causal=False only"),
        (
            ToNystrom(landmarks=4),
            {"attention": Linformer(length=4)},
            "ToNystrom: only encoders.*has linformer",
        ),
        (ToNystrom(landmarks=0), {}, "landmarks must be an integer of 1 or more"),
        (ToNystrom(landmarks=4, convolution=2), {}, "convolution must be odd"),
    ],
)
def test_what_does_not_fit_is_refused(step, more, message):
    with pytest.raises(ValueError, match=message):
        step.plan(ModelConfig(**FIELDS, **more))

"""Full attention turned into latent attention: exactness, the mathematics against plain numpy, what it saves, refusals."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import make_sentences, words

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.compress import Calibration, Context, ToLatentAttention
from flaxcompress.compress.attention_distances import attention_distances, even_distances, mean_rotation
from flaxcompress.compress.joint_latent import compress_matrix
from flaxcompress.compress.rotary_components import choose_pairs, components, split
from flaxcompress.config import Linformer, ModelConfig, Rotary, Sharing
from flaxcompress.data import CalibrationText
from flaxcompress.evaluate.profile import cache_bytes
from flaxcompress.model import abstract_flat
from flaxcompress.ops import frequencies, rotate, rotation

VOCABULARY = words(40)
ENCODER = {
    "width": 16,
    "layers": 2,
    "heads": 4,
    "feed_forward_width": 16,
    "positions": 32,
    "segments": 0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pooler": False,
}
DECODER = {
    **ENCODER,
    **{"causal": True, "norm": "rms", "norm_place": "pre", "final_norm": True, "head": "causal_lm", "gated": True},
    **{"position_embedding": "none", "embedding_norm": False, "rotary": Rotary(theta=30.0)},
}
MODELS = {
    "encoder": ENCODER,
    "encoder, grouped, narrow, no output bias": {
        **ENCODER,
        **{"key_value_heads": 2, "query_key_width": 2, "output_bias": False, "attention_scale": 0.9},
    },
    "encoder, shared": {
        **ENCODER,
        **{"layers": 3, "sharing": Sharing(attention=(0, 1, 0), feed_forward=(0, 1, 2), norms=(0, 1, 2))},
    },
    "decoder": DECODER,
    "decoder, grouped": {**DECODER, "key_value_heads": 2},
    "decoder, one key": {**DECODER, "key_value_heads": 1, "attention_bias": False},
    "decoder, window": {**DECODER, **{"key_value_heads": 2, "window": 5, "local": (True, False)}},
}


@functools.cache
def model_of(name: str) -> fc.Model:
    """Random weights, biases too; drawn on the host."""
    config, rng = ModelConfig(vocabulary=len(VOCABULARY), **MODELS[name]), np.random.default_rng(0)
    draw = lambda a, shape: a.endswith("scale") + 0.3 * rng.normal(size=shape)  # noqa: E731
    flat = {a: jnp.asarray(draw(a, leaf.shape), jnp.float32) for a, leaf in abstract_flat(config).items()}
    files = (("vocab.txt", "\n".join(VOCABULARY).encode()),)
    assets = fc.Assets(files=files, max_length=32, pooling=fc.Pooling("mean", True))
    return fc.Model(params=tree.unflatten(flat), config=config, assets=assets)


@functools.cache
def calibration() -> Calibration:
    text = CalibrationText(name="words", train=tuple(make_sentences(VOCABULARY, 48)), held_out=())
    return Calibration(text, model_of("encoder").assets, vocabulary=len(VOCABULARY))


def converted(name: str, **settings) -> fc.Model:
    model = model_of(name)
    context = Context(original=model, calibration=calibration())
    return ToLatentAttention(**settings)(model, context, key=jax.random.key(0))


def inputs() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(3).integers(5, len(VOCABULARY), (3, 12))
    return ids, np.arange(12) < np.asarray([[12], [7], [9]])


def hidden(model: fc.Model) -> np.ndarray:
    ids, mask = inputs()
    return np.asarray(model(ids, mask).last_hidden_state, np.float64)[mask]


def error(name: str, **settings) -> float:
    want = hidden(model_of(name))
    return float(((hidden(converted(name, **settings)) - want) ** 2).mean() / want.var())


def close(got, want, terms=16, scale=16):
    """Two layers of products of 16 terms, and as many sums of values: the rounding of each adds to the others'."""
    atol = scale * np.finfo(np.float32).eps * math.sqrt(terms) * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


# ── exactness of the step ────────────────────────────────────────────────────────────────────────────────────────────

EXACT = {
    "encoder": {"rank": 16},
    "encoder, grouped, narrow, no output bias": {"rank": 12},
    "encoder, shared": {"rank": 16, "whitening": "none"},
    "decoder": {"rank": 16, "rotary": 16, "whitening": "none"},
    "decoder, grouped": {"rank": 8, "rotary": 8},
    "decoder, one key": {"keep": 1.0, "rotary": 4},
    "decoder, window": {"rank": 8, "rotary": 8},
}
SLOW = {"encoder, shared", "decoder", "decoder, one key", "encoder, grouped, narrow, no output bias"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in EXACT])
def test_full_width_is_lossless(name):
    """At the full rank of [W_K | W_V], and with all rotary components: the same function, all biases included."""
    step = ToLatentAttention(**EXACT[name])
    result = converted(name, **EXACT[name])
    flat = {a: tree.signature(n) for a, n in tree.flatten(result.params).items()}
    assert flat == {a: tree.signature(n) for a, n in abstract_flat(result.config).items()}
    assert flat == {a: tree.signature(n) for a, n in abstract_flat(step.plan(model_of(name).config)).items()}
    close(hidden(result), hidden(model_of(name)))


def test_quantized_maps_are_read_and_the_new_ones_are_dense():
    model, context = model_of("decoder, grouped"), Context(original=model_of("decoder, grouped"))
    rough = fc.Quantize(bits=8, pattern=".*/kernel", rounding="nearest")(model, context, key=jax.random.key(0))
    rough = fc.Trim(dtype="float16")(rough, context, key=jax.random.key(0))
    step = ToLatentAttention(rank=8, rotary=8, whitening="none")
    result = step(rough, context, key=jax.random.key(0))
    flat, shapes = tree.flatten(result.params), abstract_flat(result.config)
    assert {a: tree.signature(n) for a, n in flat.items()} == {a: tree.signature(n) for a, n in shapes.items()}
    kinds = {a.split("/")[-2]: type(n).__name__ for a, n in flat.items() if a.startswith("layers/0/attention/")}
    assert kinds["output"] == "Quantized" and not {kinds[n] for n in ("query", "latent", "expand")} & {"Quantized"}
    want = hidden(rough)
    assert np.abs(hidden(result) - want).max() < 2**-8 * np.abs(want).max()  # the new biases are rounded to 16 bits


# ── what it saves, and what it is for ────────────────────────────────────────────────────────────────────────────────


def test_the_cache_keeps_the_latent_and_the_shared_key():
    model = model_of("decoder, grouped")
    assert cache_bytes(model.config) == 2 * 2 * (4 + 4) * 4
    small = converted("decoder, grouped", rank=5, rotary=4)
    assert cache_bytes(small.config) == 2 * (5 + 4) * 4
    half = ToLatentAttention(keep=0.5, rotary=2).plan(model.config)
    assert cache_bytes(half) == cache_bytes(model.config) / 2
    assert cache_bytes(ToLatentAttention(keep=0.75).plan(model.config)) == cache_bytes(model.config) * 3 / 4


def test_more_is_closer_and_statistics_help():
    ranks = [error("encoder", rank=r) for r in (4, 8, 12)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[1] < error("encoder", rank=8, whitening="none")
    widths = [error("decoder, grouped", rank=8, rotary=w) for w in (2, 4, 8)]
    assert widths == sorted(widths, reverse=True)


def test_a_converted_model_decodes_with_its_cache_and_runs_in_pytorch(tmp_path):
    model = converted("decoder, grouped", rank=5, rotary=6)
    ids, _ = inputs()
    cache, got = model.new_cache(3, 12), []
    for piece in np.split(ids, (5, 6), axis=1):
        out = model(piece, cache=cache)
        cache = out.cache
        got.append(out.logits)
    close(np.concatenate(got, 1), np.asarray(model(ids).logits))
    pytest.importorskip("torch")
    from flaxcompress.export.torch import check_folder

    again = fc.load(fc.save(model, tmp_path / "saved"))
    assert again.config == model.config
    assert check_folder(again, tmp_path / "saved") <= 1e-4


@pytest.mark.slow
def test_minilm():
    """Full rank gives the same vectors; at half the numbers, weighing by statistics gives closer ones."""
    model = fc.load("minilm")
    text = fc.calibration_text()
    held = Calibration(text, model.assets, vocabulary=model.config.vocabulary)
    texts = list(text.held_out[:64])
    want = model.encode(texts)

    def cosine(**settings) -> float:
        small = ToLatentAttention(**settings)(model, Context(original=model, calibration=held), key=jax.random.key(0))
        return float((small.encode(texts) * want).sum(1).mean())

    assert cosine(rank=384) > 1 - 1e-5
    assert cosine(rank=192) > cosine(rank=192, whitening="none")


# ── components of keys with rotary positions ─────────────────────────────────────────────────────────────────────────


def rotary_case(heads=3, of_each=2, width=6, rows=9):
    rng = np.random.default_rng(1)
    query, key = rng.normal(size=(rows, heads * of_each, width)), rng.normal(size=(rows, heads, width))
    x = rng.normal(size=(50, rows)) @ rng.normal(size=(rows, rows))
    return query, key, x


def turned(x, places, steps):
    """Rotary positions as the model applies them, [T, H, d]."""
    return np.asarray(rotate(jnp.asarray(x[None], jnp.float32), *rotation(jnp.asarray(places)[None], steps))[0])


def scores(query, key):
    return np.einsum("thd,shd->hts", query, np.repeat(key, query.shape[1] // key.shape[1], 1))


def test_turned_components_of_all_heads_give_the_same_scores():
    query, key, x = rotary_case()
    steps = frequencies(Rotary(theta=20.0), 6)
    found = components(query, key, x.T @ x / len(x))
    pairs = (0, 0, 0, 1, 1, 1, 2, 2, 2)
    parts = split(query, key, found, pairs, np.ones((6, 3)), ())
    assert np.abs(parts.own_key).size == 0
    q, k, places = x[:8], x[:11], np.arange(11)
    all_heads = [np.einsum("tn,nhd->thd", a, b) for a, b in ((q, query), (k, key), (q, parts.turned_query))]
    shared = (k @ parts.shared_key)[:, None]
    want = scores(turned(all_heads[0], places[:8], steps), turned(all_heads[1], places, steps))
    chosen = frequencies(Rotary(theta=20.0, pairs=pairs, pairs_of=6), 18)
    np.testing.assert_array_equal(chosen, steps[list(pairs)])
    got = scores(turned(all_heads[2], places[:8], chosen), turned(shared, places, chosen))
    close(got, want, terms=18)


@pytest.mark.parametrize("distance", [-2, 0, 3])
def test_at_a_known_distance_positions_can_be_left_out(distance):
    """Heads that attend at one distance alone lose nothing there, whatever pairs keep their positions."""
    query, key, x = rotary_case()
    steps = frequencies(Rotary(theta=20.0), 6)
    shares = np.zeros((6, 2 * 5 - 1))
    shares[:, 4 + distance] = 1.0
    pairs = (0, 0, 2)
    found = components(query, key, x.T @ x / len(x))
    parts = split(query, key, found, pairs, mean_rotation(steps, shares), range(3))
    t, s = 6, 6 - distance
    heads = lambda row, kernel: np.einsum("n,nhd->hd", x[row], kernel)[None]  # noqa: E731
    want = scores(turned(heads(t, query), [t], steps), turned(heads(s, key), [s], steps))
    chosen = steps[list(pairs)]
    shared = turned((x[s] @ parts.shared_key)[None, None], [s], chosen)
    got = scores(turned(heads(t, parts.turned_query), [t], chosen), shared)
    got = got + scores(heads(t, parts.plain_query), heads(s, parts.own_key))
    close(got, want, terms=18)


def test_component_energies_are_the_squared_scores_that_are_lost():
    """At one frequency, of queries and keys drawn apart from each other, so that they are independent."""
    query, key, _ = rotary_case(width=2)
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 3000, 9))
    moments = x.T @ x / len(x)
    found = components(query, key, moments)
    assert (np.diff(found.energy, axis=1) <= 0).all()
    np.testing.assert_allclose(found.mixing[0] @ found.unmixing[0], np.eye(3), atol=1e-12)
    for kept in (0, 1, 2):
        rest = split(query, key, found, (0,) * kept, np.ones((6, 1)), (0,)).own_key
        q = np.einsum("tn,nhd->thd", x, query)
        lost = sum(
            (q[:, h, :, None] * q[:, h, None, :]).mean(0).trace() * ((x @ rest[:, h // 2]) ** 2).sum(1).mean()
            for h in range(6)
        )
        np.testing.assert_allclose(lost, found.energy[0, kept:].sum(), rtol=1e-9)


def test_the_dearest_components_are_chosen():
    assert choose_pairs(np.asarray([[5.0, 1.0], [4.0, 3.0], [0.1, 0.0]]), 3) == (0, 1, 1)
    assert choose_pairs(np.ones((2, 2)), 4) == (0, 0, 1, 1)


def test_attention_distances_equal_a_loop():
    model, (ids, mask) = model_of("decoder, window"), inputs()
    got = attention_distances(model, [(ids[:, :9], mask[:, :9]), (ids, mask)])
    want = np.zeros((2, 4, 23))
    for n in (9, 12):
        attentions = model(ids[:, :n], mask[:, :n], output_attentions=True).attentions
        for layer, p in enumerate(np.asarray(attentions, np.float64)):
            for b in range(3):
                for t in np.flatnonzero(mask[b, :n]):
                    for s in range(n):
                        want[layer, :, 11 + t - s] += p[b, :, t, s]
    np.testing.assert_allclose(got, want / want.sum(-1, keepdims=True), atol=1e-6)
    assert got[0, :, 17:].max() == 0 < got[1, :, 17:].max()  # the first layer sees 5 tokens back


def test_even_distances_are_those_of_all_pairs():
    counts = np.zeros(63)
    for t in range(32):
        for s in range(t + 1):
            counts[31 + t - s] += 1
    np.testing.assert_allclose(even_distances(model_of("decoder").config)[1, 2], counts / counts.sum())
    both = even_distances(model_of("encoder").config)[0, 0]
    np.testing.assert_allclose(both, both[::-1])


# ── the joint latent ─────────────────────────────────────────────────────────────────────────────────────────────────


def joint_case():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(200, 10)) @ np.diag(np.geomspace(2, 0.1, 10)) @ rng.normal(size=(10, 10))
    key, value = rng.normal(size=(10, 2, 3)), 5 * rng.normal(size=(10, 2, 4))
    metric = lambda width: [a @ a.T for a in rng.normal(size=(2, width, width))]  # noqa: E731
    return x, key, value, np.asarray(metric(3)), np.asarray(metric(4))


def weighted_errors(x, key, value, found, metrics):
    """E of eᵀ·M·e of all heads' keys, and of their values, each beside the energy of what is approximated."""
    out = []
    for kernel, expand, metric in ((key, found.key, metrics[0]), (value, found.value, metrics[1])):
        e = np.einsum("tn,nkp->tkp", x, kernel) - np.einsum("tn,nr,rkp->tkp", x, found.latent, expand)
        whole = np.einsum("tn,nkp->tkp", x, kernel)
        out.append([np.einsum("tkp,kpq,tkq->", a, metric, a) / len(x) for a in (e, whole)])
    return out


def test_the_joint_error_is_the_tail_of_the_spectrum():
    x, key, value, *metrics = joint_case()
    settings = {"moments": x.T @ x / len(x), "key_metric": metrics[0], "value_metric": metrics[1]}
    for rank in (1, 4, 9, 10):
        found = compress_matrix(key, value, rank, **settings)
        (of_keys, keys), (of_values, values) = weighted_errors(x, key, value, found, metrics)
        np.testing.assert_allclose(of_keys / keys + of_values / values, (found.spectrum[rank:] ** 2).sum(), atol=1e-9)
    np.testing.assert_allclose((found.spectrum**2).sum(), 2.0)  # both parts weigh alike


def test_one_latent_for_both_is_closer_than_one_for_each():
    x, key, value, *metrics = joint_case()
    moments = x.T @ x / len(x)
    found = compress_matrix(key, value, 6, moments=moments, key_metric=metrics[0], value_metric=metrics[1])
    (a, b), (c, d) = weighted_errors(x, key, value, found, metrics)
    none = np.zeros((10, 2, 0))
    one = compress_matrix(key, none, 3, moments=moments, key_metric=metrics[0])
    other = compress_matrix(none, value, 3, moments=moments, value_metric=metrics[1])
    assert a / b + c / d < (one.spectrum[3:] ** 2).sum() + (other.spectrum[3:] ** 2).sum()


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "name", "more", "message"),
    [
        ({}, "encoder", {}, "give either rank or keep, got None and None"),
        ({"rank": 3, "keep": 0.5}, "encoder", {}, "give either rank or keep"),
        ({"keep": 1.5}, "encoder", {}, r"keep 1.5 must lie in \(0, 1\]"),
        ({"rank": 17}, "encoder", {}, "rank 17, which is not in 1 … 16"),
        ({"rank": 4, "rotary": 4}, "encoder", {}, "a bert model has no rotary positions"),
        ({"rank": 4, "rotary": 3}, "decoder, grouped", {}, "rotary 3 is not an even number in 2 … 8"),
        ({"rank": 4, "rotary": 10}, "decoder, grouped", {}, "rotary 10 is not an even number in 2 … 8"),
        (
            {"rank": 13},
            "decoder, grouped",
            {},
            "rank 13, which is not in 1 … 12; beside a shared key of 4, a cache of 16",
        ),
        ({"keep": 0.25}, "decoder, grouped", {}, "keep 0.25 gives rank 0, which is not in"),
        ({"rank": 4}, "encoder", {"attention": Linformer(length=4)}, "has linformer attention, not full attention"),
        ({"rank": 4}, "encoder", {"projection_kernel": 3}, "latent attention goes with projection_kernel=0 only"),
        ({"rank": 4}, "decoder", {"query_key_norm": True}, "latent attention goes with query_key_norm=False only"),
        ({"rank": 4}, "encoder", {"deltas": fc.Deltas(rank=2)}, "merge them first"),
    ],
)
def test_what_does_not_fit_is_refused(settings, name, more, message):
    with pytest.raises(ValueError, match=message):
        ToLatentAttention(**settings).plan(model_of(name).config.replace(**more))


def test_statistics_are_needed():
    model = model_of("encoder")
    with pytest.raises(ValueError, match="ToLatentAttention: needs calibration text"):
        ToLatentAttention(rank=4)(model, Context(original=model), key=jax.random.key(0))

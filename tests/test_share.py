"""Sharing what was trained apart: which weights a set gets, and what the deltas give back."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick
from test_steps import CONFIG, calibration, inputs, tiny

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.compress import Context
from flaxcompress.compress.share import residual_factors, stepwise_layer, tied_matrix
from flaxcompress.export.merge import merge_deltas
from flaxcompress.model import abstract_flat

EPS = float(np.finfo(np.float32).eps)
BERT = CONFIG.replace(layers=4, sharing=None)
FAMILIES = {
    "bert": BERT,
    "llama": BERT.replace(
        **{"family": "llama", "segments": 0, "pooler": False, "head": "causal_lm", "causal": True, "gated": True},
        **{"key_value_heads": 1, "norm": "rms", "norm_place": "pre", "final_norm": True, "embedding_norm": False},
        **dict.fromkeys(("attention_bias", "output_bias", "feed_forward_bias"), False),
        **{"position_embedding": "none", "rotary": fc.Rotary(), "activation": "silu"},
    ),
    "qwen": BERT.replace(head="causal_lm", causal=True, output_bias=False, feed_forward_bias=False),
}


@functools.cache
def drawn(name: str = "bert") -> fc.Model:
    """Random values everywhere, biases and norms too."""
    rng = np.random.default_rng(7)
    flat = {}
    for address, node in abstract_flat(FAMILIES[name]).items():
        centre = 1.0 if address.endswith("/scale") else 0.0
        flat[address] = jnp.asarray(centre + 0.3 * rng.normal(size=node.shape), jnp.float32)
    return fc.Model(params=tree.unflatten(flat), config=FAMILIES[name], assets=tiny().assets)


@functools.cache
def moments() -> dict[str, np.ndarray]:
    return calibration().input_moments(drawn())


def shared(step: fc.Share, name: str = "bert") -> fc.Model:
    context = Context(original=drawn(name), calibration=calibration())
    return step(drawn(name), context, key=jax.random.key(0))


def values(model: fc.Model) -> dict[str, np.ndarray]:
    return {a: np.asarray(n, np.float64) for a, n in tree.flatten(model.params).items()}


@functools.cache
def kernels() -> dict[str, np.ndarray]:
    return {a: w for a, w in values(drawn()).items() if a.startswith("layers/") and a.endswith("/kernel")}


# ── the shared matrix ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_weighted_matrix_is_the_least_squares_solution():
    """Of x_l W' = x_l W_l for the rows of all x_l together; and never worse in outputs than the mean."""
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)) for _ in range(3)]
    weights = [rng.normal(size=(6, 5)) for _ in xs]
    got = tied_matrix(weights, [x.T @ x for x in xs], ridge=0.0)
    outputs = np.concatenate([x @ w for x, w in zip(xs, weights, strict=True)])
    want = np.linalg.lstsq(np.concatenate(xs), outputs, rcond=None)[0]
    condition = np.linalg.cond(sum(x.T @ x for x in xs))
    np.testing.assert_allclose(got, want, rtol=0, atol=64 * np.finfo(np.float64).eps * condition * np.abs(want).max())
    error = lambda w: sum(((x @ (v - w)) ** 2).sum() for x, v in zip(xs, weights, strict=True))  # noqa: E731
    assert error(got) < error(tied_matrix(weights))


def test_a_ridge_leads_to_the_mean_where_no_input_points():
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=(5, 4)) for _ in range(3)]
    seen = [np.diag([*rng.uniform(1, 2, 3), 0.0, 0.0]) for _ in weights]  # the last two inputs are always zero
    got = tied_matrix(weights, seen)
    np.testing.assert_allclose(got[3:], np.mean(weights, 0)[3:], rtol=1e-12)
    assert np.abs(got[:3] - np.mean(weights, 0)[:3]).max() > 0.01


@pytest.mark.parametrize("initializer", ["mean", "weighted"])
def test_sets_hold_the_mean_of_their_layers(initializer):
    """Each tensor against numpy; layers 0 and 3 use set 0."""
    model, old = shared(fc.Share(map=(0, 1, 1, 0), initializer=initializer)), values(drawn())
    new = values(model)
    for address in [a for a in new if a.startswith("layers/1/") and "norms" not in a]:
        each = [old[address.replace("/1/", f"/{layer}/", 1)] for layer in (1, 2)]
        want = np.mean(each, 0)
        if initializer == "weighted" and address.endswith("/kernel"):
            c1, c2 = (np.float64(moments()[f"layers/{n}/{address.split('/', 2)[2][:-7]}"]) for n in (1, 2))
            damping = 0.005 * (np.trace(c1) + np.trace(c2)) / len(c1) * np.eye(len(c1))  # 1 % of the mean diagonal
            want = np.linalg.inv(c1 + c2 + 2 * damping) @ ((c1 + damping) @ each[0] + (c2 + damping) @ each[1])
        np.testing.assert_allclose(new[address], want, rtol=0, atol=4 * EPS * np.abs(want).max(), err_msg=address)
    assert model.config.sharing.attention == (0, 1, 1, 0) == model.config.sharing.feed_forward


def test_weighted_sets_lose_less_output_than_means_and_random_ones_most():
    def error(initializer):
        new = values(shared(fc.Share(map="all", initializer=initializer)))
        total = 0.0
        for address, weight in kernels().items():
            missing = weight - new["layers/0/" + address.split("/", 2)[2]]
            c = moments()[address.removesuffix("/kernel")]
            total += np.einsum("nm,nk,km->", missing, c, missing) / np.einsum("nm,nk,km->", weight, c, weight)
        return total

    assert error("weighted") < 0.99 * error("mean")
    assert error("mean") < 0.99 * error("stepwise")
    assert error("mean") < 0.99 * error("random")


@pytest.mark.parametrize("layers", [5, 6, 18])
@pytest.mark.parametrize("sets", [1, 2, 3, 5])
def test_steps_are_even_and_have_both_ends(layers, sets):
    chosen = [stepwise_layer(n, sets, layers) for n in range(sets)]
    assert chosen[0] == 0 and chosen[-1] == (layers - 1 if sets > 1 else 0) and chosen == sorted(set(chosen))
    gaps = np.diff(chosen)
    assert sets < 3 or gaps.max() - gaps.min() <= 1


def test_stepwise_sets_are_layers_as_they_were():
    model, old = shared(fc.Share(map="cycle", sets=2)), tree.flatten(drawn().params)
    new = tree.flatten(model.params)
    assert model.config.sharing.attention == (0, 1, 0, 1)
    for address, node in new.items():
        source = address.replace("layers/1/", "layers/3/", 1) if "norms" not in address else address
        np.testing.assert_array_equal(node, old[source], err_msg=address)
    assert {a for a in old if "norms" in a} == {a for a in new if "norms" in a}


def test_one_part_alone():
    model = shared(fc.Share(map="pairs", parts=("feed_forward",), initializer="mean"))
    assert model.config.sharing.attention == (0, 1, 2, 3) and model.config.sharing.feed_forward == (0, 0, 1, 1)
    for address, node in tree.flatten(drawn().params).items():
        if "/feed_forward/" not in address:
            np.testing.assert_array_equal(tree.flatten(model.params)[address], node)


def test_formats_follow_the_layers_that_a_set_is_made_of():
    """Rules for single layers; those of layers that no longer exist are gone."""
    rule = {"kind": "low_rank", "rank": 3}
    config = BERT.with_rule("layers/[01]/feed_forward/up/kernel", {"kind": "dense", "dtype": "float16"})
    config = config.with_rule(r"layers/\d+/attention/query/kernel", rule)
    planned = fc.Share(map="sequence", sets=2).plan(config)
    flat = abstract_flat(planned)
    assert flat["layers/0/feed_forward/up/kernel"].dtype == jnp.float16
    assert flat["layers/1/feed_forward/up/kernel"].dtype == jnp.float32
    assert flat["layers/1/attention/query/kernel"].rank == 3
    assert "layers/2/feed_forward/up/kernel" not in flat
    gone = BERT.with_format("layers/3/feed_forward/up/kernel", {"kind": "dense", "dtype": "float32"})
    assert fc.Share(map="all").plan(gone).formats == ()


# ── the deltas ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "initializer"),
    quick(
        [(n, i) for n in FAMILIES for i in ("stepwise", "mean", "weighted", "random")],
        [("bert", "weighted"), ("llama", "weighted")],
    ),
)
def test_full_rank_gives_the_original_back(name, initializer):
    """Hidden states and logits, of families with biases everywhere, nowhere, and on some maps."""
    step = fc.Share(map="sequence", sets=2, initializer=initializer, residual_rank=24, allow_larger=True)
    ids, mask = inputs()
    want, got = drawn(name)(ids, mask), shared(step, name)(ids, mask)
    # A matrix is off by the rounding of base and delta; through 4 layers, 2 sums of up to 32 products each.
    relative = 4 * 2 * 8 * np.sqrt(32) * EPS
    np.testing.assert_allclose(
        np.asarray(got.last_hidden_state)[mask],
        np.asarray(want.last_hidden_state)[mask],
        rtol=0,
        atol=relative * np.abs(want.last_hidden_state).max(),
    )
    if want.logits is not None:
        atol = relative * np.abs(want.logits).max()
        np.testing.assert_allclose(np.asarray(got.logits)[mask], np.asarray(want.logits)[mask], rtol=0, atol=atol)
    assert (name != "llama") == any(
        "deltas" in a and a.endswith("bias") for a in tree.flatten(shared(step, name).params)
    )


def test_merged_deltas_are_the_weights_that_were():
    """Multiplied out, tensor by tensor; kernels narrower than the rank are filled up."""
    step = fc.Share(map="all", initializer="mean", residual_rank=24, residual_whitening=False, allow_larger=True)
    old, new = values(drawn("llama")), values(merge_deltas(shared(step, "llama")))
    assert set(old) == set(new) and old["layers/0/attention/key/kernel"].shape == (24, 12)
    for address, want in old.items():
        atol = 8 * np.sqrt(24) * EPS * max(1.0, np.abs(want).max())
        np.testing.assert_allclose(new[address], want, rtol=0, atol=atol, err_msg=address)


def test_whitened_deltas_lose_less_output_and_plain_ones_less_weight():
    steps = {w: fc.Share(map="all", initializer="mean", residual_rank=4, residual_whitening=w) for w in (True, False)}
    merged = {w: values(merge_deltas(shared(step))) for w, step in steps.items()}
    for address, old in kernels().items():
        c = moments()[address.removesuffix("/kernel")]
        output = {w: np.einsum("nm,nk,km->", e, c, e) for w, new in merged.items() for e in [new[address] - old]}
        weight = {w: ((new[address] - old) ** 2).sum() for w, new in merged.items()}
        assert output[True] < output[False] and weight[False] < weight[True], address


def test_residual_factors_lose_the_tail_of_the_spectrum():
    """Whitened error² = Σ_{i>R} σ_i², with σ of LᵀΔ; nothing is lost at full rank, though the metric is singular."""
    rng = np.random.default_rng(3)
    delta, x = rng.normal(size=(7, 9)), rng.normal(size=(50, 7))
    c = x.T @ x / 50
    sigma = np.linalg.svd(np.linalg.cholesky(c).T @ delta, compute_uv=False)
    found = residual_factors(delta, 3, c)
    e = delta - found.left @ found.right
    np.testing.assert_allclose(np.einsum("nm,nk,km->", e, c, e), (sigma[3:] ** 2).sum(), rtol=1e-10)
    singular = np.diag([1.0, 1, 1, 0, 0, 0, 0])
    for rank in (7, 9):
        full = residual_factors(delta, rank, singular)
        assert full.left.shape == (7, rank) and full.right.shape == (rank, 9)
        np.testing.assert_allclose(full.left @ full.right, delta, rtol=0, atol=1e-6)  # float64 eigenvectors of a square


def test_saved_and_loaded(tmp_path):
    model = shared(fc.Share(map="cycle_rev", sets=2, initializer="mean", residual_rank=2, residual_whitening=False))
    fc.save(model, tmp_path / "m")
    again = fc.load(tmp_path / "m")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, tree.flatten(model.params), tree.flatten(again.params))


def test_spectra_are_kept_for_the_report():
    context = Context(original=drawn(), calibration=calibration())
    step = fc.Share(map="all", initializer="mean", residual_rank=2, residual_whitening=False)
    step(drawn(), context, key=jax.random.key(0))
    assert {s["address"] for s in context.spectra} == {
        f"layers/{layer}/deltas/{a.split('/', 2)[2].removesuffix('/kernel')}" for layer in range(4) for a in kernels()
    }


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────────

TIED = BERT.replace(sharing=fc.Sharing.named("pairs", layers=4, norms="own"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fc.Share(sets=5).plan(BERT), "needs sets, from 1 to the 4 layers, got 5"),
        (lambda: fc.Share().plan(BERT), "needs sets"),
        (lambda: fc.Share(sets=4).plan(BERT), "would become .* use fewer sets"),
        (lambda: fc.Share(map=(0, 0, 1)).plan(BERT), "map has 3 entries for 4 layers"),
        (lambda: fc.Share(map=(0, 2, 1, 1)).plan(BERT), "in order of first use"),
        (lambda: fc.Share(map=(0, 0, 1, 1), sets=3).plan(BERT), "map stores 2 sets, but sets is 3"),
        (lambda: fc.Share(map="all", parts=()), "must name attention, feed_forward or both"),
        (lambda: fc.Share(map="all", residual_rank=-1), "must not be negative"),
        (lambda: fc.Share(map="all", residual_rank=25).plan(BERT), "residual_rank 25 is over 24"),
        (lambda: fc.Share(map="all", residual_rank=24).plan(BERT), "smaller residual_rank"),
        (lambda: fc.Share(map="all").plan(TIED), r"share their attention already, by \[0, 0, 1, 1\]"),
        (lambda: fc.Share(map="all").plan(BERT.replace(deltas=fc.Deltas(rank=1))), "the model has deltas"),
        (
            lambda: fc.Share(map="pairs").plan(BERT.replace(feed_forward_width=(3, 4, 5, 5))),
            "layers 0 and 1 cannot share feed_forward/.*: their shapes or formats differ",
        ),
        (
            lambda: fc.Share(map="all", initializer="mean").plan(
                BERT.with_rule(".*/query/kernel", {"kind": "quantized", "bits": 8})
            ),
            "layers/0/attention/query/kernel is stored as quantized; share before other formats",
        ),
        (
            lambda: fc.Share(map="all").plan(BERT.with_rule("layers/2/.*/kernel", {"kind": "quantized", "bits": 8})),
            "layers 0 and 2 cannot share attention/.*/kernel: their shapes or formats differ",
        ),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_decoder_beside_the_layers_is_refused():
    sharing = fc.Sharing.own(2, cross_attention=True)
    decoder = BERT.replace(layers=2, vocabulary=0, pooler=False, causal=True, sharing=sharing)
    config = BERT.replace(pooler=False, head="seq2seq_lm", decoder=decoder)
    with pytest.raises(ValueError, match="two stacks of layers"):
        fc.Share(map="all").plan(config)


def test_maps_of_different_widths_may_share_within_their_groups():
    planned = fc.Share(map="pairs").plan(BERT.replace(feed_forward_width=(3, 3, 5, 5)))
    assert planned.feed_forward_width == (3, 5)

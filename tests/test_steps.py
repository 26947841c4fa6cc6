"""Every compression step on a tiny model: what its plan promises, what it refuses, and what it is for."""

from __future__ import annotations

import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcompress import linalg, tree
from flaxcompress import model as model_file
from flaxcompress.compress import (
    AutoencodeEmbedding,
    BitsFor,
    Calibration,
    Context,
    DropLayers,
    FactorizeEmbedding,
    Fold,
    JointQueryKey,
    JointValueOutput,
    LowRank,
    Prune,
    PruneChannels,
    PruneHeads,
    PruneWidth,
    Quantize,
    SeparableConvolutions,
    Share,
    ShareBasis,
    Tensorize,
    TensorTrainEmbedding,
    TierSetting,
    ToLatentAttention,
    ToLinformer,
    ToNystrom,
    Trim,
    known_steps,
    step_from_json,
)
from flaxcompress.compress.autoencode_embedding import compress_matrix as train_factors
from flaxcompress.config import ModelConfig, Sharing
from flaxcompress.data import CalibrationText
from flaxcompress.formats import Format, materialize, nbytes, to_tensors
from flaxcompress.model import Model, abstract_flat
from flaxcompress.text import Assets, Pooling

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{i}" for i in range(195)]
CONFIG = ModelConfig(
    vocabulary=200, width=24, layers=2, heads=2, feed_forward_width=32, positions=20, dropout=0.0, attention_dropout=0.0
)
TOKEN = "embedding/token"
KERNELS = r"layers/\d+/(attention|feed_forward)/.*/kernel"
FEED_FORWARD = r"layers/\d+/feed_forward/.*/kernel"
UNIT_MEAN = Pooling("mean", True)


@functools.cache
def text() -> CalibrationText:
    """37 sentences of Zipf-distributed words: not a multiple of any batch size."""
    rng = np.random.default_rng(0)
    chances = 1 / (np.arange(len(WORDS)) + 3.0)
    draw = functools.partial(rng.choice, WORDS, p=chances / chances.sum())
    found = tuple(" ".join(draw(int(n))) for n in rng.integers(3, 13, 37))
    return CalibrationText(name="words", train=found, held_out=())


MEAN = Pooling("mean", True)  # what all-MiniLM does


@functools.cache
def tiny(pooling: Pooling | None = MEAN, shared: bool = False) -> Model:
    """Random weights whose matrices have decaying spectra, as trained ones do; made on the host."""
    config = CONFIG
    if shared:
        config = config.replace(sharing=Sharing(attention=(0, 0), feed_forward=(0, 1), norms=(0, 1)))
    rng = np.random.default_rng(1)
    flat = {}
    for address, node in abstract_flat(config).items():
        value = rng.normal(size=node.shape)
        if value.ndim == 2:
            value = (
                value @ np.diag(np.geomspace(1.5, 0.05, node.shape[1])) @ rng.normal(size=(node.shape[1],) * 2) * 0.2
            )
        else:
            value = 0.1 * value + (1.0 if address.endswith("/scale") else 0.0)
        flat[address] = jnp.asarray(value, jnp.float32)
    files = (("vocab.txt", "\n".join([*SPECIAL, *WORDS]).encode()),)
    assets = Assets(files=files, max_length=16, pooling=pooling)
    return Model(params=tree.unflatten(flat), config=config, assets=assets)


@functools.cache
def calibration() -> Calibration:
    return Calibration(text(), tiny().assets, vocabulary=200)


def context() -> Context:
    return Context(original=tiny(), calibration=calibration())


@functools.cache
def applied(step) -> Model:
    return step(tiny(), context(), key=jax.random.key(0))


TIERS = (TierSetting(rows=20, rank=10, bits=8), TierSetting(rows=60, rank=8, bits=4), TierSetting(rank=3, bits=2))
STEPS = {
    "trim": Trim(positions=12, pooler="drop", dtype="float16"),
    "trim-positions": Trim(positions=16),
    "embedding-rank": FactorizeEmbedding(rank=9),
    "embedding-plain": FactorizeEmbedding(rank=9, weighting="none"),
    "embedding-keep": FactorizeEmbedding(keep=0.5, prior="uniform"),
    "embedding-fisher": FactorizeEmbedding(rank=9, weighting="fisher"),
    "embedding-tiers": FactorizeEmbedding(tiers=TIERS),
    "embedding-float-tiers": FactorizeEmbedding(tiers=(TierSetting(rows=50, rank=12), TierSetting(rank=4))),
    "embedding-bytes": FactorizeEmbedding(target_bytes=2600, max_tiers=2),
    "embedding-average-bits": FactorizeEmbedding(average_bits=6.0, max_tiers=2, weighting="fisher"),
    "embedding-train": TensorTrainEmbedding(keep=0.4, cores=2),
    "embedding-train-plain": TensorTrainEmbedding(rank=9, weighting="none"),
    "embedding-autoencoder": AutoencodeEmbedding(rank=9, steps=20),
    "low_rank-activation": LowRank(pattern=FEED_FORWARD, rank=6),
    "low_rank-none": LowRank(pattern=KERNELS, keep=0.6, whitening="none"),
    "low_rank-fisher": LowRank(pattern=KERNELS, rank=6, whitening="fisher"),
    "low_rank-asvd": LowRank(pattern=FEED_FORWARD, rank=6, whitening="asvd"),
    "low_rank-pca": LowRank(pattern=FEED_FORWARD, rank=6, whitening="pca"),
    "low_rank-two_sided": LowRank(pattern=KERNELS, rank=6, whitening="two_sided"),
    "low_rank-sequential": LowRank(pattern=FEED_FORWARD, rank=6, sequential=True, sentences=37),
    "low_rank-energy-ranks": LowRank(pattern=KERNELS, keep=0.6, allocation="energy"),
    "joint-value-output": JointValueOutput(keep=0.5),
    "joint-query-key": JointQueryKey(width=5),
    "prune_channels": PruneChannels(keep=0.5),
    "prune_channels-gradient": PruneChannels(width=9, by="gradient"),
    "prune_heads": PruneHeads(heads=1),
    "prune_heads-magnitude": PruneHeads(keep=0.5, by="magnitude", repair=False),
    "prune_width": PruneWidth(keep=0.5, multiple=4),
    "prune_width-gradient": PruneWidth(width=20, by="gradient"),
    "tensorize-cp": Tensorize(pattern=FEED_FORWARD, kind="cp", rank=6),
    "tensorize-tucker": Tensorize(pattern=KERNELS, keep=0.6),
    "tensorize-train": Tensorize(pattern=KERNELS, kind="tensor_train", keep=0.5),
    "tensorize-paired": Tensorize(
        pattern=KERNELS, kind="tensor_train", keep=0.5, whitened=False, input_modes=2, output_modes=2
    ),
    "tensorize-cp-cut": Tensorize(pattern=KERNELS, kind="cp", keep=0.6, whitened=False, input_modes=2),
    "separable": SeparableConvolutions(projection_kernel=3, feed_forward_kernel=5),
    "latent-activation": ToLatentAttention(rank=9),
    "latent-none": ToLatentAttention(keep=0.2, whitening="none"),
    "linformer": ToLinformer(length=6, sentences=8, iterations=5),
    "nystrom": ToNystrom(landmarks=6, convolution=3),
    "quantize-8": Quantize(),
    "prune-magnitude": Prune(sparsity=0.6, by="magnitude", pattern=f"{KERNELS}|{TOKEN}"),
    "prune-wanda": Prune(sparsity=0.5, pattern=KERNELS),
    "prune-sparsegpt": Prune(sparsity=0.5, by="sparsegpt"),
    "prune-n_of_m": Prune(n_of_m="2:4", by="sparsegpt"),
    "prune-n_of_m-wanda": Prune(n_of_m="1:4"),
    "prune-global": Prune(sparsity=0.5, by="magnitude", scope="global"),
    "prune-budget": Prune(budget=2.0, by="magnitude", pattern=FEED_FORWARD),
    "prune-fisher": Prune(sparsity=0.5, by="fisher", pattern=f"{KERNELS}|{TOKEN}"),
    "quantize-4-gptq": Quantize(bits=4, group=8, pattern=KERNELS),
    "quantize-3-mse": Quantize(bits=3, group=8, rounding="mse"),
    "quantize-2-nearest": Quantize(bits=2, rounding="nearest", scale_dtype="float32"),
    "quantize-nf4-gptq": Quantize(numbers="nf4", group=8, pattern=KERNELS),
    "quantize-fp8": Quantize(numbers="fp8", rounding="mse"),
    "quantize-average-bits": Quantize(average_bits=3.0, group=8, pattern=KERNELS, rounding="mse"),
    "quantize-mixed": Quantize(
        bits=4, overrides=(BitsFor(pattern=FEED_FORWARD, bits=3, group=8), BitsFor(pattern=TOKEN, bits=8))
    ),
}
STEPS |= {
    "drop_layers-count": DropLayers(count=1),
    "drop_layers-first": DropLayers(layers=(0,)),
    "fold": Fold(pooler="drop"),
    "share-stepwise": Share(map="all"),
    "share-weighted-residual": Share(map=(0, 0), initializer="weighted", residual_rank=3),
    "share-mean": Share(map="pairs", parts=("feed_forward",), initializer="mean"),
    "share-random": Share(map="sequence", sets=1, parts=("attention",), initializer="random"),
    "share_basis-activation": ShareBasis(KERNELS, keep=0.5),
    "share_basis-none": ShareBasis(FEED_FORWARD, rank=6, whitening="none"),
}
# Addresses whose matrices a step gives other values though their shapes stay.
REWRITTEN = {
    "DropLayers": r"layers/\d+/.*",
    "Share": r"layers/\d+/.*",
    "ToLatentAttention": r".*/attention/output/bias",  # the values' bias moves there
    "JointValueOutput": r".*/attention/output/bias",
}
CERTAIN = [
    name for name in STEPS if not any(word in name for word in ("bytes", "average", "ranks", "global", "budget"))
]
SLOW = {"embedding-average-bits", "low_rank-fisher", "quantize-mixed", "quantize-average-bits"}
SLOW |= {"embedding-float-tiers", "embedding-bytes", "low_rank-none", "quantize-2-nearest"}
SLOW |= {"low_rank-asvd", "low_rank-pca", "low_rank-two_sided", "low_rank-sequential"}
SLOW |= {"share-mean", "share-random", "share_basis-none"}
SLOW |= {"tensorize-tucker", "tensorize-paired", "tensorize-cp-cut"}
SLOW |= {"latent-none", "prune_channels-gradient", "prune_heads-magnitude", "prune_width-gradient"}
SLOW |= {"joint-query-key"}
SLOW |= {"prune-magnitude", "prune-n_of_m-wanda", "prune-fisher", "prune-budget", "prune-sparsegpt"}
EVERY = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in STEPS]
)


def signatures(flat) -> dict:
    return {address: tree.signature(node) for address, node in flat.items()}


@EVERY
def test_result_is_what_the_plan_says(name):
    """Equal trees; where the layout depends on data, no more bytes than planned."""
    step = STEPS[name]
    planned = step.plan(tiny().config)
    result = applied(step)
    flat = tree.flatten(result.params)
    assert signatures(flat) == signatures(abstract_flat(result.config))  # the config describes the weights
    if name in CERTAIN:
        assert signatures(flat) == signatures(abstract_flat(planned))
        assert {a: planned.format_rule(a) for a in flat} == {a: result.config.format_rule(a) for a in flat}
    else:
        assert sum(map(nbytes, flat.values())) <= sum(map(nbytes, abstract_flat(planned).values()))
        assert result.config.replace(formats=()) == planned.replace(formats=())
    for tensor in (t for a, n in flat.items() for t in to_tensors(n, a).values()):
        assert np.isfinite(np.asarray(tensor, np.float32)).all()


@EVERY
def test_nothing_is_changed_in_place_and_untouched_matrices_stay(name):
    before = jax.tree.map(np.asarray, tiny().params)
    result = applied(STEPS[name])
    jax.tree.map(np.testing.assert_array_equal, tiny().params, before)
    old, new = tree.flatten(tiny().params), tree.flatten(result.params)
    planned = abstract_flat(STEPS[name].plan(tiny().config))
    rewritten = re.compile(REWRITTEN.get(STEPS[name].name, "(?!)"))
    for address, node in new.items():
        same = address in old and tree.signature(planned[address]) == tree.signature(old[address])
        if same and not rewritten.fullmatch(address):
            np.testing.assert_array_equal(node, old[address], err_msg=address)


@EVERY
def test_result_is_smaller(name):
    """But for what only makes more of a model trainable, or saves time on long sequences."""
    bytes_of, larger = applied(STEPS[name]).nbytes, name in ("separable", "linformer", "nystrom")
    assert bytes_of > tiny().nbytes if larger else bytes_of < tiny().nbytes


@EVERY
def test_the_same_key_gives_the_same_weights(name):
    first, again = applied(STEPS[name]), STEPS[name](tiny(), context(), key=jax.random.key(0))
    assert first.config == again.config
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)


@EVERY
def test_settings_survive_json(name):
    step = STEPS[name]
    data = json.loads(json.dumps(step.to_json()))
    assert list(data) == [step.name]
    assert step_from_json(data) == step
    assert hash(step_from_json(data)) == hash(step)


def test_the_table_covers_every_step():
    own_files = {"Allocate", "Heal", "Repair", "TrimVocabulary"}
    assert {step.name for step in STEPS.values()} | own_files == set(known_steps())


# ── one after another ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ("trim", "embedding-tiers", "low_rank-activation", "quantize-4-gptq"),
        ("embedding-float-tiers", "low_rank-none", "quantize-8"),
        ("quantize-8", "trim"),
        ("embedding-bytes", "quantize-mixed-kernels"),
        ("low_rank-activation", "quantize-8", "trim-positions"),
    ],
    ids=" then ".join,
)
def test_steps_follow_one_another(names):
    steps = STEPS | {"quantize-mixed-kernels": Quantize(bits=4, group=8, pattern=".*/kernel|embedding/position")}
    model, shared = tiny(), context()
    for number, name in enumerate(names):
        planned = steps[name].plan(model.config)
        model = steps[name](model, shared, key=jax.random.key(number))
        flat = tree.flatten(model.params)
        assert signatures(flat) == signatures(abstract_flat(model.config))
        if name in CERTAIN:
            assert signatures(flat) == signatures(abstract_flat(planned))
    out = model(np.ones((1, 4), int))
    assert np.isfinite(out.last_hidden_state).all()
    assert model.nbytes < tiny().nbytes


@pytest.mark.slow
@pytest.mark.parametrize("step", [Quantize(bits=4, group=8), LowRank(pattern=KERNELS, rank=6)], ids=lambda s: s.name)
def test_shared_sets_are_compressed_once(step):
    model = tiny(shared=True)
    result = step(model, Context(original=model, calibration=calibration()), key=jax.random.key(0))
    assert "layers/1/attention/query/kernel" not in tree.flatten(result.params)
    assert signatures(tree.flatten(result.params)) == signatures(abstract_flat(step.plan(model.config)))
    assert np.isfinite(result(np.ones((1, 4), int)).last_hidden_state).all()


def test_quantizing_what_is_quantized_changes_nothing():
    result = Quantize(bits=2, rounding="nearest")(applied(STEPS["quantize-3-mse"]), context(), key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, result.params, applied(STEPS["quantize-3-mse"]).params)


# ── what each step is for ────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def inputs() -> tuple[np.ndarray, np.ndarray]:
    rows = calibration().rows
    ids = np.asarray([row + [0] * (16 - len(row)) for row in rows])
    return ids, np.arange(16) < np.asarray([[len(row)] for row in rows])


@functools.cache
def dense_hidden(step=None) -> np.ndarray:
    """Hidden states of the real tokens, computed with dense weights so that all results share one compiled function."""
    model = tiny() if step is None else applied(step)
    flat = {a: materialize(n) if isinstance(n, Format) else n for a, n in tree.flatten(model.params).items()}
    flat = {a: n.astype(jnp.float32) for a, n in flat.items()}
    dense = Model(params=tree.unflatten(flat), config=model.config.replace(formats=()), assets=model.assets)
    ids, mask = inputs()
    return np.asarray(dense(ids, mask).last_hidden_state)[mask]


def hidden_error(step) -> float:
    want = dense_hidden()
    return float(((dense_hidden(step) - want) ** 2).mean() / want.var())


def token_error(step, weights=None) -> float:
    e = np.asarray(materialize(tree.flatten(applied(step).params)[TOKEN])) - tree.flatten(tiny().params)[TOKEN]
    return float(((e**2).sum(1) * (1.0 if weights is None else weights)).sum())


def output_error(step, address: str) -> float:
    """E‖x(Ŵ - W)‖² on the original's inputs."""
    moments = calibration().input_moments(tiny())[address.removesuffix("/kernel")]
    old, new = tree.flatten(tiny().params)[address], tree.flatten(applied(step).params)[address]
    e = np.asarray(materialize(new) - old, np.float64)
    return float(np.einsum("nm,nk,km->", e, moments, e))


def test_input_moments_are_those_of_the_layers_inputs():
    """Of the first layer's query: the normalised embeddings of the real tokens."""
    moments = calibration().input_moments(tiny())
    assert set(moments) == {a.removesuffix("/kernel") for a in tree.select(tree.flatten(tiny().params), KERNELS)}
    ids, mask = inputs()
    x = np.asarray(tiny()(ids, mask, output_hidden_states=True).hidden_states[0], np.float64)[mask]
    want = x.T @ x / len(x)
    for projection in ("query", "key", "value"):
        got = moments[f"layers/0/attention/{projection}"]
        np.testing.assert_allclose(got, want, rtol=0, atol=len(x) ** 0.5 * 8 * np.finfo(np.float32).eps * want.max())
    for moment in moments.values():
        assert moment.shape[0] == moment.shape[1] and np.linalg.eigvalsh(moment)[0] > -1e-4 * np.trace(moment)


def test_whitening_beats_plain_on_outputs():
    whitened, plain = (LowRank(pattern=FEED_FORWARD, rank=6, whitening=w) for w in ("activation", "none"))
    for address in tree.select(tree.flatten(tiny().params), FEED_FORWARD):
        assert output_error(whitened, address) < output_error(plain, address)
    assert hidden_error(whitened) < hidden_error(plain)


@pytest.mark.parametrize("kind", ["cp", "tucker", "tensor_train"])
def test_whitened_tensors_beat_plain_ones_on_outputs(kind):
    whitened, plain = (Tensorize(pattern=FEED_FORWARD, kind=kind, keep=0.4, whitened=w) for w in (True, False))
    for address in tree.select(tree.flatten(tiny().params), FEED_FORWARD):
        assert output_error(whitened, address) < output_error(plain, address)


def test_gptq_beats_nearest_on_hidden_states():
    errors = {
        r: hidden_error(Quantize(bits=3, group=8, pattern=KERNELS, rounding=r)) for r in ("gptq", "mse", "nearest")
    }
    assert errors["gptq"] < 0.8 * errors["nearest"]
    assert errors["gptq"] < errors["mse"]


@pytest.mark.slow
def test_more_bits_and_more_rank_are_closer():
    bits = [hidden_error(Quantize(bits=b, pattern=KERNELS, rounding="mse")) for b in (8, 4, 3, 2)]
    assert bits == sorted(bits)
    ranks = [hidden_error(LowRank(pattern=FEED_FORWARD, rank=r, whitening="none")) for r in (12, 8, 3)]
    assert ranks == sorted(ranks)


def test_full_rank_is_lossless():
    step = LowRank(pattern=KERNELS, rank=24, allow_larger=True, whitening="none")
    assert hidden_error(step) < 1e-9  # of the variance: float32 factors
    for table in (
        FactorizeEmbedding(rank=24, allow_larger=True, weighting="none"),
        TensorTrainEmbedding(rank=200, cores=3, allow_larger=True),
        AutoencodeEmbedding(rank=24, allow_larger=True, steps=1),
    ):
        assert token_error(table) < 1e-9 * float((tree.flatten(tiny().params)[TOKEN] ** 2).sum())
    for kind in ("cp", "tucker", "tensor_train"):
        step = Tensorize(pattern=KERNELS, kind=kind, rank=200, allow_larger=True)
        assert hidden_error(step) < 1e-9


def test_frequency_weighting_serves_frequent_tokens():
    weighted = FactorizeEmbedding(rank=6, power=1.0)
    plain = FactorizeEmbedding(rank=6, weighting="none")
    counts = calibration().token_counts
    assert token_error(weighted, counts) < token_error(plain, counts)
    assert token_error(plain) < token_error(weighted)


def test_a_train_weighs_blocks_of_ids():
    """Ids are ordered by frequency: the first blocks come out better than without weights, the last ones worse."""
    plain, weighted = (TensorTrainEmbedding(rank=9, weighting=w, power=1.0) for w in ("none", "frequency"))
    spec = applied(plain).config.format_rule(TOKEN)
    first = np.arange(200) < np.prod(spec["rows"][1:])
    assert token_error(weighted, first) < 0.9 * token_error(plain, first)
    assert token_error(plain, ~first) < token_error(weighted, ~first)


def test_an_autoencoder_of_squares_is_the_svd_and_one_of_cosines_goes_beyond_it():
    rng = np.random.default_rng(5)
    lengths = np.exp(rng.normal(size=(300, 1)))  # the SVD serves the long rows
    table = (lengths * (rng.normal(size=(300, 24)) @ np.diag(np.geomspace(2, 0.2, 24)))).astype(np.float32)
    weights = rng.exponential(size=300)
    start = linalg.row_weighted_svd(table, 6, weights)
    by_squares = train_factors(table, 6, weights, cosine=0.0, steps=60)
    want, got = start.left @ start.right, np.asarray(materialize(by_squares.node))
    assert by_squares.after <= by_squares.before
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-2 * np.abs(want).max())  # where Adam's steps end
    by_cosine = train_factors(table, 6, weights, cosine=1.0, steps=200)

    def missing(approximation):
        cosines = (table * approximation).sum(1) / np.linalg.norm(table, axis=1) / np.linalg.norm(approximation, axis=1)
        return float(weights @ (1 - cosines) / weights.sum())

    n_terms = 300  # in the sum over rows, and 24 in each cosine
    atol = 8 * float(np.finfo(np.float32).eps) * np.sqrt(24 * n_terms)
    assert abs(by_cosine.before - missing(want)) <= atol
    assert abs(by_cosine.after - missing(np.asarray(materialize(by_cosine.node)))) <= atol
    assert by_cosine.after < 0.95 * by_cosine.before


def test_the_heads_metric_serves_logits():
    """E‖h(Ê - E)ᵀ‖² over real hidden states is smaller than in the plain metric, and its moment is that of h."""
    config = CONFIG.replace(head="masked_lm")
    rng = np.random.default_rng(2)
    drawn = {a: jnp.asarray(rng.normal(size=n.shape) * 0.5, jnp.float32) for a, n in abstract_flat(config).items()}
    drawn["head/norm/scale"] = jnp.asarray(np.geomspace(4, 0.1, 24), jnp.float32)
    model = Model(params=tree.unflatten(drawn), config=config, assets=tiny().assets)
    own = Calibration(text(), tiny().assets, vocabulary=200)
    shared = Context(original=model, calibration=own)
    ids, mask = inputs()
    logits = np.asarray(model(ids, mask).logits, np.float64)[mask] - np.asarray(drawn["head/bias"], np.float64)
    table = np.asarray(drawn[TOKEN], np.float64)
    h = logits @ np.linalg.pinv(table).T
    atol = 1e-4 * np.abs(h.T @ h / len(h)).max()  # logits of 24 terms, and a pseudo-inverse of condition below 100
    np.testing.assert_allclose(own.head_moment(model), h.T @ h / len(h), rtol=0, atol=atol)
    errors = {}
    for weighting in ("frequency", "head"):
        step = FactorizeEmbedding(rank=9, weighting=weighting, prior="uniform", power=0.01)  # rows weigh alike
        small = step(model, shared, key=jax.random.key(0))
        e = np.asarray(materialize(tree.flatten(small.params)[TOKEN]), np.float64) - table
        errors[weighting] = np.square(h @ e.T).sum()
    assert errors["head"] < 0.8 * errors["frequency"]
    with pytest.raises(ValueError, match=r"weighting: head needs a head that is tied.*'none'"):
        FactorizeEmbedding(rank=9, weighting="head").plan(CONFIG)


STRUCTURES = {
    "encoder": {"head": "masked_lm"},
    "causal": {"causal": True, "head": "causal_lm", "gated": True, "key_value_heads": 1, "segments": 0},
    "decoder": {"segments": 0, "pooler": False},
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_separable_convolutions_begin_as_what_was_there(name):
    """At the token itself, causal or centred; the taps are used: moved, they change the output."""
    config = CONFIG.replace(**STRUCTURES[name])
    if name == "decoder":
        sharing = Sharing(attention=(0, 1), feed_forward=(0, 1), norms=(0, 1), cross_attention=(0, 1))
        inner = config.replace(vocabulary=0, causal=True, sharing=sharing)
        config = config.replace(decoder=inner, head="seq2seq_lm")
    model = Model.init(config, key=jax.random.key(1, impl="rbg"))
    ids = np.random.default_rng(0).integers(5, 200, (2, 9))
    given = {"decoder_input_ids": ids[:, ::-1]} if name == "decoder" else {}
    step = SeparableConvolutions(projection_kernel=3, feed_forward_kernel=3)
    changed = step(model, Context(original=model), key=jax.random.key(0))
    want, got = model(ids, **given).logits, changed(ids, **given).logits
    atol = 8 * float(np.finfo(np.float32).eps) * np.sqrt(32) * np.abs(want).max()  # the longest sum, over F
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)
    moved = tree.update(changed.params, lambda a, node: node + 0.5 if a.endswith("/taps") else node)
    other = changed.replace(params=moved)(ids, **given).logits  # pyright: ignore[reportAttributeAccessIssue]
    assert np.abs(other - want).max() > 1e3 * atol


def test_no_taps_make_up_for_a_lower_rank():
    """Alternating least squares over taps and a pointwise map of rank R ends at or above what the rank alone leaves."""
    rng = np.random.default_rng(4)
    count, n, rank = 400, 6, 2
    x = np.cumsum(rng.normal(size=(count + 2, n)) @ rng.normal(size=(n, n)), axis=0)  # neighbours are alike
    x -= x.mean(0)
    shifted = np.stack([x[i : i + count] for i in range(3)])  # before, at and after the token
    y = shifted[1] @ rng.normal(size=(n, 5))
    tail = np.square(np.linalg.svd(y, compute_uv=False)[rank:]).sum()
    for start in range(3):
        taps, losses = rng.normal(size=(3, n)) + (np.arange(3) == start)[:, None], []
        for _ in range(30):
            z = np.einsum("itd,id->td", shifted, taps)
            best = z @ np.linalg.lstsq(z, y, rcond=None)[0]
            right = np.linalg.svd(best, full_matrices=False)[2][:rank]
            pointwise = np.linalg.lstsq(z, y @ right.T, rcond=None)[0] @ right
            losses.append(np.square(z @ pointwise - y).sum())
            features = np.einsum("itd,dm->tmid", shifted, pointwise).reshape(count * 5, -1)
            taps = np.linalg.lstsq(features, y.reshape(-1), rcond=None)[0].reshape(3, n)
        assert min(losses) >= tail * (1 - 1e-9) and losses[-1] < losses[0]


@pytest.mark.parametrize("target", [1800, 2600, pytest.param(5000, marks=pytest.mark.slow)])
def test_target_bytes_are_kept(target):
    step = FactorizeEmbedding(target_bytes=target, max_tiers=2)
    assert nbytes(tree.flatten(applied(step).params)[TOKEN]) <= target


def test_every_target_that_the_plan_accepts_can_be_made():
    """`--dry-run` must not promise what the run then refuses."""
    with pytest.raises(ValueError, match="too few") as caught:
        FactorizeEmbedding(target_bytes=10).plan(CONFIG)
    smallest = int(re.findall(r"\d+", str(caught.value))[-1])
    step = FactorizeEmbedding(target_bytes=smallest, max_tiers=1)
    step.plan(CONFIG)
    step(tiny(), context(), key=jax.random.key(0))


def test_a_head_tied_to_the_table_stays_tied():
    step = FactorizeEmbedding(rank=9)
    config = step.plan(CONFIG.replace(head="masked_lm"))
    assert [a for a in abstract_flat(config) if "token" in a] == [TOKEN]


def test_spectra_are_kept_for_the_report():
    shared = context()
    LowRank(pattern=FEED_FORWARD, rank=6)(tiny(), shared, key=jax.random.key(0))
    FactorizeEmbedding(rank=9)(tiny(), shared, key=jax.random.key(0))
    kept = {s["address"]: s for s in shared.spectra}
    assert set(kept) == {*tree.select(tree.flatten(tiny().params), FEED_FORWARD), TOKEN}
    for spectrum in kept.values():
        values = spectrum["singular_values"]
        assert values == sorted(values, reverse=True) and 1 <= spectrum["rank"] <= len(values)
    json.dumps(shared.spectra)


def test_trim_lowers_the_length_limit():
    result = applied(Trim(positions=12))
    assert result.assets.max_length == 12 and result.config.positions == 12
    longest = max(map(len, result.assets.tokenize([text().train[0] * 5]).ids))
    assert longest == 12
    np.testing.assert_array_equal(
        tree.flatten(result.params)["embedding/position"], tree.flatten(tiny().params)["embedding/position"][:12]
    )


def test_trim_resolves_against_the_checkpoint():
    step = Trim(positions="limit", pooler="unused")
    assert step.resolve(tiny()) == Trim(positions=16, pooler="drop")
    assert step.resolve(tiny(pooling=None)) == Trim(positions=16, pooler="keep")
    assert applied(step).config == applied(Trim(positions=16, pooler="drop")).config


# ── statistics ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", [pytest.param("cls", marks=pytest.mark.slow), "mean"])
def test_fisher_is_finite_with_padding_and_unit_vectors(mode):
    """37 sentences fill no last batch; vectors are normalised, as all-MiniLM's are."""
    model = tiny(pooling=Pooling(mode, True))
    fisher = calibration().fisher(model)
    assert all(np.isfinite(f).all() for f in fisher.values())
    assert min(fisher[a].max() for a in tree.select(fisher, KERNELS)) > 0
    moment = calibration().token_gradient_moment(model)
    assert np.isfinite(moment).all() and np.trace(moment) > 0


def test_statistics_are_kept_until_the_model_changes():
    own = Calibration(text(), tiny().assets, vocabulary=200)
    first = own.input_moments(tiny())
    assert own.input_moments(tiny()) is first
    assert own.input_moments(applied(Trim(positions=16))) is not first


def test_token_counts():
    counts = calibration().token_counts
    assert counts.shape == (200,) and counts[2] == counts[3] == len(calibration().rows)
    assert counts[0] == 0 and counts.sum() == sum(map(len, calibration().rows))


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_scrambled_sentences_keep_their_ends_and_lengths(share):
    plain, own = calibration(), Calibration(text(), tiny().assets, vocabulary=200, scrambled=share)
    assert [len(row) for row in own.rows] == [len(row) for row in plain.rows]
    assert all((a[0], a[-1]) == (b[0], b[-1]) for a, b in zip(own.rows, plain.rows, strict=True))
    changed = [new for new, old in zip(own.rows, plain.rows, strict=True) if new != old]
    count = len(plain.rows)
    assert abs(len(changed) - share * count) <= 4 * np.sqrt(count * share * (1 - share))
    assert min(min(row[1:-1]) for row in changed) >= len(SPECIAL)  # no special token in the middle
    np.testing.assert_array_equal(own.token_counts, plain.token_counts)  # of the text as it is
    assert own.rows == Calibration(text(), tiny().assets, vocabulary=200, scrambled=share).rows


def test_scrambled_words_come_from_the_whole_vocabulary():
    few = CalibrationText(name="few words", train=tuple([" ".join(WORDS[:6])] * 400), held_out=())
    own = Calibration(few, tiny().assets, vocabulary=200, scrambled=0.5)
    met = set(itertools.chain.from_iterable(own.rows))
    assert len(met) > 190


def test_an_optional_override_may_match_nothing():
    override = {"pattern": "embedding/absent", "bits": 8}
    with pytest.raises(ValueError, match="matches no parameter"):
        Quantize(bits=4, overrides=(BitsFor(**override),)).plan(CONFIG)
    planned = Quantize(bits=4, overrides=(BitsFor(**override, optional=True),)).plan(CONFIG)
    assert planned == Quantize(bits=4).plan(CONFIG)


# ── wrong settings ───────────────────────────────────────────────────────────────────────────────────────────────────


def planned(step_type, **settings):
    return lambda: step_type(**settings).plan(CONFIG)


WRONG = {
    "trim positions": (planned(Trim, positions=21), r"positions 21 is not in 1 … 20"),
    "trim no positions": (planned(Trim, positions=0), r"positions 0 is not in 1 … 20"),
    "embedding none": (planned(FactorizeEmbedding), "give one of rank, keep, tiers.*got none"),
    "embedding both": (planned(FactorizeEmbedding, rank=3, keep=0.5), "give one of.*got rank, keep"),
    "embedding rank 0": (planned(FactorizeEmbedding, rank=0), r"rank 0 is not in 1 … 24 for a 200×24 matrix"),
    "embedding above width": (planned(FactorizeEmbedding, rank=25), "rank 25 is not in"),
    "embedding break-even": (planned(FactorizeEmbedding, rank=22), "would enlarge a 200×24 matrix; use rank <= 21"),
    "embedding keep": (planned(FactorizeEmbedding, keep=1.5), r"keep 1.5 must lie in \(0, 1\]"),
    "embedding power": (planned(FactorizeEmbedding, rank=3, power=0.0), r"power 0.0 must lie in \(0, 2\]"),
    "embedding bytes": (
        planned(FactorizeEmbedding, target_bytes=99),
        "99 bytes are too few for a 200×24 table; the smallest takes",
    ),
    "embedding no bits": (planned(FactorizeEmbedding, average_bits=0.0), "too few|average_bits"),
    "embedding tiers short": (
        planned(FactorizeEmbedding, tiers=(TierSetting(rows=20, rank=3),)),
        r"tiers of \[20\] rows do not fit a table of 200",
    ),
    "embedding tiers long": (
        planned(FactorizeEmbedding, tiers=(TierSetting(rows=201, rank=3), TierSetting(rank=3))),
        "do not fit a table of 200",
    ),
    "embedding two open tiers": (
        planned(FactorizeEmbedding, tiers=(TierSetting(rank=3), TierSetting(rank=3))),
        "leave the rows of one tier out",
    ),
    "embedding empty open tier": (
        planned(FactorizeEmbedding, tiers=(TierSetting(rows=200, rank=3), TierSetting(rank=3))),
        "do not fit|rows",
    ),
    "embedding tier rank": (
        planned(FactorizeEmbedding, tiers=(TierSetting(rows=20, rank=25), TierSetting(rank=3))),
        "a tier's rank 25 is not in 1 … 20",
    ),
    "embedding tier of few rows": (
        planned(FactorizeEmbedding, tiers=(TierSetting(rows=5, rank=9), TierSetting(rank=3))),
        "rank 9",
    ),
    "embedding tier bits": (
        planned(FactorizeEmbedding, tiers=(TierSetting(rows=20, rank=5, bits=7), TierSetting(rank=3))),
        "bits must be one of",
    ),
    "train neither": (planned(TensorTrainEmbedding), "TensorTrainEmbedding: give either rank or keep"),
    "train keep": (planned(TensorTrainEmbedding, keep=0.0), r"keep 0.0 must lie in \(0, 1\]"),
    "train rank": (planned(TensorTrainEmbedding, rank=0), "at least rank 1 and 2 cores"),
    "train cores": (planned(TensorTrainEmbedding, rank=3, cores=1), "at least rank 1 and 2 cores"),
    "train power": (planned(TensorTrainEmbedding, rank=3, power=3.0), r"power 3.0 must lie in \(0, 2\]"),
    "train larger": (planned(TensorTrainEmbedding, rank=99), "would enlarge a 200×24 table.*allow_larger"),
    "autoencoder cosine": (planned(AutoencodeEmbedding, rank=3, cosine=1.5), r"cosine 1.5 must lie in \[0, 1\]"),
    "autoencoder steps": (planned(AutoencodeEmbedding, rank=3, steps=0), "0 steps at rate"),
    "autoencoder rank": (planned(AutoencodeEmbedding, rank=22), "would enlarge a 200×24 matrix; use rank <= 21"),
    "separable neither": (planned(SeparableConvolutions), "give projection_kernel, feed_forward_kernel or both"),
    "separable even": (planned(SeparableConvolutions, projection_kernel=4), "above 1 and, unless causal, odd; got 4"),
    "separable twice": (
        lambda: SeparableConvolutions(feed_forward_kernel=3).plan(CONFIG.replace(feed_forward_kernel=5)),
        "convolutions of feed_forward_kernel 5 already",
    ),
    "low_rank pattern": (
        planned(LowRank, pattern="layers/0/feed_forward/upp/kernel", rank=3),
        "matches no parameter.*did you mean 'layers/0/feed_forward/up/kernel'",
    ),
    "low_rank of vectors": (planned(LowRank, pattern=".*/bias", rank=3), "matches no parameter"),
    "low_rank bad pattern": (planned(LowRank, pattern="(", rank=3), "is not a regular expression"),
    "low_rank both": (planned(LowRank, pattern=KERNELS, rank=3, keep=0.5), "give either rank or keep"),
    "low_rank neither": (planned(LowRank, pattern=KERNELS), "give either rank or keep"),
    "low_rank rank 0": (planned(LowRank, pattern=KERNELS, rank=0), "rank 0 is not in 1 … 24"),
    "low_rank break-even": (
        planned(LowRank, pattern=FEED_FORWARD, rank=14),
        "rank 14 would enlarge a (24×32|32×24) matrix; use rank <= 13.*allow_larger",
    ),
    "tensorize neither": (planned(Tensorize, pattern=KERNELS), "Tensorize: give either rank or keep"),
    "tensorize keep": (planned(Tensorize, pattern=KERNELS, keep=2.0), r"keep 2.0 must lie in \(0, 1\]"),
    "tensorize rank": (planned(Tensorize, pattern=KERNELS, rank=0), "rank 0 must be at least 1"),
    "tensorize modes": (planned(Tensorize, pattern=KERNELS, rank=3, output_modes=1), "3 in all.*LowRank"),
    "tensorize whitened": (planned(Tensorize, pattern=KERNELS, rank=3, input_modes=2), "set whitened: false"),
    "tensorize pattern": (planned(Tensorize, pattern="layer/.*", rank=3), "Tensorize/pattern: 'layer/.*' matches no"),
    "tensorize larger": (
        planned(Tensorize, pattern=FEED_FORWARD, kind="cp", rank=30),
        "a cp of .* values would enlarge a (24×32|32×24) matrix.*allow_larger",
    ),
    "quantize bits": (planned(Quantize, bits=7), "bits must be one of"),
    "quantize group": (planned(Quantize, group=0), "group must be a positive integer"),
    "quantize average": (planned(Quantize, average_bits=5.0), "average_bits 5.0 lies outside the choices"),
    "quantize choices": (planned(Quantize, average_bits=3.0, choices=(3, 7)), "bits must be one of"),
    "quantize pattern": (planned(Quantize, pattern="embeding/token"), "did you mean 'embedding/token'"),
    "quantize override": (
        planned(Quantize, overrides=(BitsFor(pattern="nothing", bits=4),)),
        "Quantize/overrides: 'nothing' matches no parameter",
    ),
    "quantize override bits": (planned(Quantize, overrides=(BitsFor(pattern=".*", bits=1),)), "bits must be one of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(name):
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_break_even_can_be_overruled():
    assert LowRank(pattern=FEED_FORWARD, rank=14, allow_larger=True).plan(CONFIG)
    with pytest.raises(ValueError, match="rank 25 is not in"):
        LowRank(pattern=FEED_FORWARD, rank=25, allow_larger=True).plan(CONFIG)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"Quantise": {}}, "recipe: unknown step 'Quantise'.*did you mean 'Quantize'"),
        ({"Quantize": {"bit": 4}}, "recipe/Quantize: unknown key 'bit'.*did you mean 'bits'"),
        ({"Quantize": {"bits": "four"}}, "recipe/Quantize/bits: expected int, got 'four'"),
        ({"Quantize": {"bits": True}}, "recipe/Quantize/bits: expected int, got True"),
        ({"Quantize": {"bits": 4.5}}, "recipe/Quantize/bits: expected int"),
        ({"Quantize": {"rounding": "gpt"}}, "'gpt' is not allowed.*did you mean 'gptq'"),
        ({"Quantize": 4}, "expected settings as key: value, got 4"),
        ({"Quantize": {}, "Trim": {}}, "a step is one name with its settings"),
        ("Quantize", "a step is one name with its settings"),
        ({"LowRank": {"rank": 3}}, "recipe/LowRank: pattern must be given"),
        ({"FactorizeEmbedding": {"tiers": 3}}, "recipe/FactorizeEmbedding/tiers: expected a list"),
        ({"FactorizeEmbedding": {"tiers": [{"rows": 3}]}}, "FactorizeEmbedding/tiers/0: rank must be given"),
        ({"FactorizeEmbedding": {"tiers": [{"rank": 3, "bit": 4}]}}, "tiers/0: unknown key 'bit'"),
        ({"FactorizeEmbedding": {"rank": 3, "weighting": "fischer"}}, "did you mean 'fisher'"),
        ({"Trim": {"positions": "limits"}}, "recipe/Trim/positions"),
    ],
)
def test_wrong_json(data, message):
    with pytest.raises(ValueError, match=message):
        step_from_json(data)


def test_json_numbers_and_defaults():
    assert step_from_json({"Quantize": None}) == Quantize()
    assert step_from_json({"LowRank": {"pattern": "x", "keep": 1}}) == LowRank(pattern="x", keep=1.0)
    assert Quantize().to_json() == {"Quantize": {}}


@pytest.mark.parametrize(
    "step",
    [
        LowRank(pattern=KERNELS, rank=3),
        Tensorize(pattern=KERNELS, rank=3),
        FactorizeEmbedding(rank=3),
        Quantize(bits=4),
    ],
    ids=lambda s: s.name,
)
def test_steps_that_need_text_say_so(step):
    with pytest.raises(ValueError, match=f"{step.name}: needs calibration text; pass calibration="):
        step(tiny(), Context(original=tiny()), key=jax.random.key(0))


def test_whitening_where_nothing_was_recorded_says_so():
    with pytest.raises(ValueError, match="no activations are recorded for pooler/dense/kernel; use whitening: none"):
        LowRank(pattern="pooler/dense/kernel", rank=3)(tiny(), context(), key=jax.random.key(0))
    with pytest.raises(ValueError, match="no activations are recorded for pooler/dense/kernel; use whitened: false"):
        Tensorize(pattern="pooler/dense/kernel", rank=3)(tiny(), context(), key=jax.random.key(0))


def test_fisher_where_nothing_is_read_says_so_or_stays_finite():
    """The pooler has no part in sentence vectors: its gradient is zero."""
    step = LowRank(pattern="pooler/dense/kernel", rank=3, whitening="fisher")
    try:
        result = step(tiny(), context(), key=jax.random.key(0))
    except ValueError as error:
        assert "pooler/dense/kernel" in str(error)
    else:
        assert np.isfinite(materialize(tree.flatten(result.params)["pooler/dense/kernel"])).all()


def test_a_replaced_matrix_is_described_by_the_config():
    changed = model_file.replace_matrices(tiny(), {TOKEN: tree.flatten(tiny().params)[TOKEN].astype(jnp.float16)})
    assert changed.config.format_rule(TOKEN) == {"kind": "dense", "dtype": "float16"}

"""Kinds of self-attention: padding, caches, formats, gradients, PyTorch, and what each computes against plain loops."""

from __future__ import annotations

import functools
import json
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.compress import Calibration
from flaxcompress.compress import Context as StepContext
from flaxcompress.config import FormatRule, Latent, Linformer, ModelConfig, Nystrom, Rotary, Sharing
from flaxcompress.data import CalibrationText
from flaxcompress.evaluate.profile import cache_bytes, profile
from flaxcompress.model import abstract_flat
from flaxcompress.nn import Context, Transformer, run
from flaxcompress.nn.attention_kinds import KINDS, attention_kind
from flaxcompress.nn.cache import LayerCache
from flaxcompress.ops import depthwise, linformer_attention, nystrom_attention

V, POSITIONS = 40, 24
LATENT = Latent(key_value_rank=5, rotary_width=4, plain_width=3, value_width=6)
QUERIES = {"query_rank": 7, "interleaved": True}
# What conversion makes of full attention: no norms, a bias of queries, one of the two keys or both.
OWN_KEYS = Latent(key_value_rank=5, rotary_width=0, plain_width=3, value_width=6, norms=False, query_bias=True)
SHARED_KEY = Latent(key_value_rank=5, rotary_width=6, plain_width=0, value_width=6, norms=False, query_bias=True)
GROUPED = {"heads": 4, "key_value_heads": 2, "head_width": 6}
# Structures that see the whole sequence.
ENCODERS = {
    "full": {},
    "narrow": {"query_key_width": 2},
    "narrow, grouped, rotary": {**GROUPED, "query_key_width": 4, "rotary": Rotary(), "query_key_norm": True},
    "narrow values, some pairs": {
        **GROUPED,
        "head_width": 3,
        "query_key_width": 4,
        "rotary": Rotary(pairs=(1, 4), pairs_of=10),
    },
    "latent": {"attention": LATENT},
    "latent, rotary": {"attention": Latent(**{**vars(LATENT), **QUERIES}), "rotary": Rotary()},
    "latent, own keys": {"attention": OWN_KEYS},
    "convolved": {"projection_kernel": 3, "feed_forward_kernel": 5},
    "linformer none": {"attention": Linformer(length=4)},
    "linformer none, grouped": {**GROUPED, "attention": Linformer(length=4), "query_key_width": 4},
    "linformer head": {"attention": Linformer(length=4, sharing="head"), "rotary": Rotary()},
    "linformer key_value": {"attention": Linformer(length=4, sharing="key_value"), "projection_kernel": 3},
    "linformer layer": {"attention": Linformer(length=4, sharing="layer")},
    "nystrom": {"attention": Nystrom(landmarks=3)},
    "nystrom, convolved": {
        **GROUPED,
        "attention": Nystrom(landmarks=4, iterations=4, convolution=3),
        "rotary": Rotary(),
    },
}
# Structures that decode.
DECODERS = {
    "narrow": {**GROUPED, "query_key_width": 4, "rotary": Rotary()},
    "latent": {"attention": LATENT, "rotary": Rotary()},
    "latent, queries": {"attention": Latent(**{**vars(LATENT), **QUERIES}), "rotary": Rotary(), "attention_scale": 0.3},
    "latent, own keys": {"attention": OWN_KEYS},
    "latent, shared key": {"attention": SHARED_KEY, "rotary": Rotary(pairs=(2, 0, 2), pairs_of=8, theta=20.0)},
    "latent, window": {"attention": LATENT, "rotary": Rotary(), "window": 4},
    "convolved": {"projection_kernel": 3, "feed_forward_kernel": 2, "rotary": Rotary()},
    "convolved, window": {"projection_kernel": 2, "feed_forward_kernel": 4, "rotary": Rotary(), "window": 4},
}
CASES = {**{f"encoder: {n}": s for n, s in ENCODERS.items()}, **{f"decoder: {n}": s for n, s in DECODERS.items()}}
SLOW = {f"encoder: {n}" for n in ("full", "narrow", "latent", "linformer none", "linformer head", "nystrom")}
SLOW |= {"encoder: linformer key_value"}
SLOW |= {"encoder: latent, own keys", "decoder: latent", "decoder: convolved"}  # others have more of the same


def some(names, prefix=""):
    """The quick suite runs what has most in it."""
    marked = [pytest.param(n, marks=[pytest.mark.slow] * (prefix + n in SLOW)) for n in names]
    return pytest.mark.parametrize("name", marked)


EVERY = some(CASES)
DECODING = some(DECODERS, "decoder: ")


def config_of(name: str, **more) -> ModelConfig:
    fields = {
        "vocabulary": V,
        "width": 12,
        "layers": 2,
        "heads": 3,
        "feed_forward_width": 16,
        "positions": POSITIONS,
        "segments": 0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.3,
        "pooler": False,
    }
    if name.startswith("decoder"):
        fields |= {"causal": True, "norm": "rms", "norm_place": "pre", "final_norm": True, "head": "causal_lm"}
        fields |= {"gated": True, "position_embedding": "none", "embedding_norm": False}
    return ModelConfig(**{**fields, **CASES[name], **more})


def filled(config: ModelConfig) -> fc.Model:
    """Random weights of a config without formats: drawn here, since compiling `init` takes longer than a test."""
    rng = np.random.default_rng(0)
    draw = lambda a, shape: a.endswith(("scale", "depthwise/taps")) + 0.3 * rng.normal(size=shape)  # noqa: E731
    flat = {a: jnp.asarray(draw(a, leaf.shape), jnp.float32) for a, leaf in abstract_flat(config).items()}
    return fc.Model(params=tree.unflatten(flat), config=config, assets=fc.Assets(max_length=config.positions))


@functools.cache
def model_of(name: str, **more) -> fc.Model:
    return filled(config_of(name, **more))


def ids(batch, length, seed=0):
    return np.random.default_rng(seed).integers(1, V, (batch, length))


def close(got, want, terms=200):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape and np.isfinite(got).all()
    atol = 16 * np.finfo(np.float32).eps * math.sqrt(terms) * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


# ── every structure ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_is_covered():
    used = {config_of(name).attention for name in CASES}
    assert {"full" if kind is None else kind.kind for kind in used} == set(KINDS)


@pytest.mark.parametrize("name", CASES)
def test_json_round_trip(name):
    config = config_of(name)
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert hash(config) == hash(config_of(name))


def padded(seed=1):
    """Ids [3, 12] and their mask; the first five tokens are always the same."""
    return np.concatenate([ids(3, 5), ids(3, 7, seed)], 1), np.arange(12)[None] < np.asarray([[5], [5], [9]])


@EVERY
def test_padding_changes_nothing(name):
    model, want = model_of(name), model_of(name)(ids(3, 5)).last_hidden_state
    for seed in (1, 2):
        tokens, mask = padded(seed)
        close(model(tokens, mask).last_hidden_state[:2, :5], want[:2])


@EVERY
def test_a_sequence_of_padding_takes_nothing_and_harms_none(name):
    config, flat = config_of(name, output_bias=False), tree.flatten(model_of(name).params)
    x, real = jax.random.normal(jax.random.key(1), (2, 6, config.width)), np.ones((2, 6), bool)
    real[1] = False
    own = tree.nest({a.removeprefix("layers/0/attention/"): n for a, n in flat.items() if "/0/attention" in a})
    shared = flat["sequence/table"][:6, None] if "sequence/table" in flat else None
    module = attention_kind(config)(config, "layers/0/attention")

    @jax.jit
    def outputs(x):
        context = Context(jnp.asarray(real), jnp.asarray(real), sequence=shared)
        both = [module.apply({"params": own}, x, context, need_probabilities=need)[0] for need in (False, True)]
        gradient = jax.grad(lambda x: module.apply({"params": own}, x, context)[0].sum())(x)
        return both, module.apply({"params": own}, x[:1], Context(sequence=shared))[0], gradient

    both, alone, gradient = outputs(x)
    for y in both:
        np.testing.assert_array_equal(y[1], 0)
        close(y[:1], alone)
    assert np.isfinite(gradient).all()


@EVERY
def test_every_weight_has_a_gradient(name):
    model = model_of(name)
    mask = jnp.arange(9)[None] < jnp.asarray([[9], [6]])

    def loss(params):
        out = run(params, model.config, jnp.float32, jnp.asarray(ids(2, 9)), mask)
        return jnp.square(out.last_hidden_state * mask[..., None]).sum()

    for address, gradient in tree.flatten(jax.jit(jax.grad(loss))(model.params)).items():
        assert np.isfinite(gradient).all(), address
        if not address.endswith(("key/bias", "final_norm/scale")):  # the same for every key: the softmax forgets it
            assert np.abs(gradient).max() > 0, address


@EVERY
def test_probabilities_leave_the_output_as_it_is(name):
    model, (tokens, mask) = model_of(name), padded()
    out = model(tokens, mask, output_attentions=True)
    close(out.last_hidden_state[mask], model(tokens, mask).last_hidden_state[mask])
    kind = model.config.attention
    keys = kind.length if isinstance(kind, Linformer) else 12
    for probabilities in out.attentions:
        assert probabilities.shape == (3, model.config.heads, 12, keys)
        if not isinstance(kind, Nystrom):
            close(probabilities.sum(-1)[:, 0][mask], np.ones(mask.sum()))
        if not isinstance(kind, Linformer):
            np.testing.assert_array_equal(probabilities[2, :, :, 9:], 0)


@EVERY
def test_dropout_acts_and_follows_its_key(name):
    model = model_of(name)
    network, tokens = Transformer(model.config.replace(attention_dropout=0.5)), jnp.asarray(ids(1, 8))

    @jax.jit
    def call(key):
        settings = {"deterministic": False, "rngs": {"dropout": key}}
        return network.apply({"params": model.params}, tokens, **settings).last_hidden_state

    one, again, other = (call(jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3 and np.isfinite(one).all()


def dot_flops(jaxpr) -> float:
    """Of all matrix products in a program, those in loops as often as they run."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            size = math.prod(equation.invars[0].aval.shape[i] for i in contract)
            total += 2.0 * size * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            total += times * dot_flops(inner)
    return total


@pytest.mark.parametrize("length", [3, 11])
@EVERY
def test_the_profile_counts_what_the_program_multiplies(name, length):
    model = model_of(name, head="none")
    config = model.config
    program = jax.make_jaxpr(lambda params, ids: run(params, config, jnp.float32, ids))(
        model.params, jnp.zeros((1, length), jnp.int32)
    )
    convolved = 2.0 * config.width * (3 * config.projection_kernel + config.feed_forward_kernel)
    if isinstance(config.attention, Nystrom):
        convolved += 2.0 * config.attention.convolution * config.heads * config.head_dim
    counted = (profile(model, length=length).flops_per_token - config.layers * convolved) * length
    assert counted == pytest.approx(dot_flops(program.jaxpr), rel=1e-9)


_FORMATS = [("linformer none, grouped", False), ("convolved", True), ("latent, rotary", True), ("nystrom", True)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * slow) for n, slow in _FORMATS])
def test_layers_may_share_and_matrices_have_any_format(name, tmp_path):
    pytest.importorskip("torch")
    low = {"kind": "low_rank", "rank": 2, "left": {"kind": "quantized", "bits": 8}, "right": {"kind": "dense"}}
    rules = (
        FormatRule(pattern=r"layers/\d+/attention/(query|output|expand)/kernel", spec=low),
        FormatRule(pattern=r"layers/.*/kernel", spec={"kind": "quantized", "bits": 4, "group": 4}),
        FormatRule(pattern=r".*/taps", spec={"kind": "dense", "dtype": "float16"}),
        FormatRule(pattern=r".*sequence/table", spec={"kind": "quantized", "bits": 8}),
    )
    sharing = Sharing(attention=(0, 1, 0), feed_forward=(0, 0, 0), norms=(0, 1, 2))
    config = config_of(f"encoder: {name}", layers=3, sharing=sharing, formats=rules)
    model = fc.Model.init(config, key=jax.random.key(0))
    again = fc.load(fc.save(model, tmp_path / "saved"))
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)
    from flaxcompress.export.torch import check_folder

    assert check_folder(again, tmp_path / "saved") <= 2e-3


@EVERY
def test_a_saved_folder_computes_the_same_in_pytorch(name, tmp_path):
    torch = pytest.importorskip("torch")
    from flaxcompress.export.modeling_flaxcompress import FlaxCompressModel

    model = model_of(name)
    theirs = FlaxCompressModel.from_pretrained(fc.save(model, tmp_path / "saved"), dtype=torch.float32).eval()
    tokens, mask = padded()
    want = model(tokens, mask, output_attentions=True)
    for need in (False, True):
        with torch.no_grad():
            got = theirs(torch.tensor(tokens), torch.tensor(mask.astype(int)), output_attentions=need)
        close(got.last_hidden_state[mask], np.asarray(want.last_hidden_state)[mask])
    for ours, theirs in zip(want.attentions, got.attentions, strict=True):
        close(theirs.transpose(1, 2)[mask], np.asarray(ours).swapaxes(1, 2)[mask])


# ── decoding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@DECODING
def test_tokens_in_pieces_behind_padding_give_the_logits_of_the_whole(name):
    model, tokens = model_of(f"decoder: {name}"), ids(1, 10)
    want, cache, got = model(tokens).logits, model.new_cache(1, 16), []
    pieces = np.split(np.concatenate([ids(1, 2, 1), tokens], 1), (5, 6, 7, 11), axis=1)
    for piece in pieces:
        out = model(piece, np.arange(5)[None] >= 2 if piece is pieces[0] else None, cache=cache)
        cache = out.cache
        got.append(out.logits)
    close(np.concatenate(got, 1)[:, 2:], want)


@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=pytest.mark.slow)])
@DECODING
def test_pytorch_generates_the_same(name, beams, tmp_path):
    torch = pytest.importorskip("torch")
    from flaxcompress.export.modeling_flaxcompress import FlaxCompressForCausalLM

    model = model_of(f"decoder: {name}")
    theirs = FlaxCompressForCausalLM.from_pretrained(fc.save(model, tmp_path / "saved"), dtype=torch.float32).eval()
    prompts = [ids(1, n, n)[0].tolist() for n in (2, 5)]
    tokens = torch.tensor([[0, 0, 0, *prompts[0]], prompts[1]])
    settings = {"max_new_tokens": 9, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    want = theirs.generate(tokens, attention_mask=(tokens != 0).long(), **settings)[:, 5:]
    plain = theirs.generate(tokens, attention_mask=(tokens != 0).long(), use_cache=False, **settings)[:, 5:]
    assert plain.tolist() == want.tolist()
    got = model.generate(prompts, max_new_tokens=9, beams=beams, return_ids=True)
    assert [answer.ids for answer in got] == want.tolist()


def test_what_the_cache_holds():
    plain, latent = (config_of(f"decoder: {n}") for n in ("convolved", "latent"))
    assert cache_bytes(plain) == plain.layers * 2 * plain.heads * plain.head_dim * 4  # not the last inputs
    assert cache_bytes(latent) == latent.layers * (5 + 4) * 4
    narrow = config_of("decoder: narrow")
    assert cache_bytes(narrow) == narrow.layers * 2 * (4 + 6) * 4


@pytest.mark.parametrize("name", ["latent", "latent, queries"])
def test_the_forms_of_latent_attention_are_equal(name):
    config = config_of(f"decoder: {name}")
    module = attention_kind(config)(config, "layers/0/attention")
    keys, kind = jax.random.split(jax.random.key(0), 5), config.attention
    shapes = ((3, kind.plain_width), (3, kind.rotary_width), (1, kind.key_value_rank), (1, kind.rotary_width))
    lengths = (4, 4, 9, 9)
    parts = [jax.random.normal(k, (2, t, *s)) for k, t, s in zip(keys, lengths, shapes, strict=False)]
    flat = tree.flatten(model_of(f"decoder: {name}").params)
    own = {a.removeprefix("layers/0/attention/"): n for a, n in flat.items() if "/0/attention" in a}
    params = {"params": tree.nest(own)}
    mask = jax.random.bernoulli(keys[4], 0.6, (2, 4, 9)).at[1, 2].set(False)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def call(form, need):
        settings = {"deterministic": True, "need_probabilities": need, "method": getattr(module, form)}
        return module.apply(params, *parts, Context(mask=mask), **settings)

    outputs = [call(form, need) for form in ("naive", "absorbed") for need in (True, False)]
    for y, probabilities in outputs:
        close(y, outputs[0][0])
        np.testing.assert_array_equal(y[1, 2], 0)
        if probabilities is not None:
            close(probabilities, outputs[0][1])


def test_decoding_with_latents_expands_nothing_that_the_cache_has():
    """One token at a time, the program must not multiply all slots with the kernel that expands them."""
    config = config_of("decoder: latent")
    model, slots = model_of("decoder: latent"), 16
    cache = model.new_cache(1, slots)
    step = jax.make_jaxpr(lambda p, t, c: run(p, config, jnp.float32, t, cache=c).logits)(
        model.params, jnp.ones((1, 1), jnp.int32), cache
    )
    kind, heads = config.attention, config.heads
    expanding = 2.0 * slots * kind.key_value_rank * heads * (kind.plain_width + kind.value_width)
    absorbed = 2.0 * slots * heads * (2 * kind.key_value_rank + kind.rotary_width)
    rest = profile(model, length=1).flops_per_token
    assert dot_flops(step.jaxpr) < rest + config.layers * absorbed < rest + config.layers * expanding


def test_a_layers_cache_holds_the_last_inputs():
    config, model = config_of("decoder: convolved"), model_of("decoder: convolved")
    cache = model(ids(2, 7), cache=model.new_cache(2, 9)).cache
    first = {name: array[0] for name, array in cache.layers.items()}
    kept = LayerCache(first, jnp.zeros(0, int), {}, {}).read("projection_inputs", jnp.float32)
    hidden = model(ids(2, 7), output_hidden_states=True).hidden_states[0]
    scale = tree.flatten(model.params)["layers/0/norms/attention/scale"]
    normal = hidden / np.sqrt(np.square(hidden).mean(-1, keepdims=True) + config.norm_epsilon) * scale
    close(kept[:, :, 0], normal[:, -2:])


# ── against plain loops in float64 ───────────────────────────────────────────────────────────────────────────────────


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("causal", [True, False])
def test_depthwise_equals_a_loop(causal):
    rng = np.random.default_rng(0)
    for width in (2, 3, 4, 5) if causal else (1, 3, 5):
        x, taps = rng.normal(size=(2, 6, 3)), rng.normal(size=(width, 3))
        left = width - 1 if causal else width // 2
        want = np.zeros_like(x)
        for t in range(6):
            for i in range(width):
                if 0 <= t - left + i < 6:
                    want[:, t] += taps[i] * x[:, t - left + i]
        close(depthwise(jnp.asarray(x, jnp.float32), jnp.asarray(taps, jnp.float32), causal=causal), want)


@pytest.mark.parametrize("shared", [True, False])
def test_linformer_equals_a_loop(shared):
    rng = np.random.default_rng(1)
    query, key, value = rng.normal(size=(2, 5, 4, 3)), rng.normal(size=(2, 7, 2, 3)), rng.normal(size=(2, 7, 2, 6))
    e, f = (rng.normal(size=(7, 1 if shared else 2, 4)) for _ in range(2))
    real = np.arange(7)[None] < np.asarray([[7], [3]])
    want = np.zeros((2, 5, 4, 6))
    for b in range(2):
        for h in range(4):
            group, places = h // 2, np.flatnonzero(real[b])
            at = 0 if shared else group
            keys = sum(np.outer(e[s, at], key[b, s, group]) for s in places)
            values = sum(np.outer(f[s, at], value[b, s, group]) for s in places)
            want[b, :, h] = softmax(query[b, :, h] @ keys.T / math.sqrt(3)) @ values
    arrays = [jnp.asarray(a, jnp.float32) for a in (query, key, value, e, f)]
    close(linformer_attention(*arrays, jnp.asarray(real)), want)


def nystrom_loop(query, key, value, landmarks, pinv):
    """One head of one row without padding, float64."""
    count = len(query)
    if count <= landmarks:
        return softmax(query @ key.T) @ value
    cut = [[i for i in range(count) if i * landmarks // count == j] for j in range(landmarks)]
    q_mean, k_mean = (np.stack([x[c].mean(0) for c in cut]) for x in (query, key))
    return softmax(query @ k_mean.T) @ pinv(softmax(q_mean @ k_mean.T)) @ softmax(q_mean @ key.T) @ value


@pytest.mark.parametrize("iterations", [2, 6, 30])
def test_nystrom_equals_a_loop(iterations):
    def pinv(a):
        if iterations == 30:  # converged
            return np.linalg.pinv(a)
        z = a.T / (np.abs(a).sum(0).max() * np.abs(a).sum(1).max())
        for _ in range(iterations):
            az = a @ z
            z = z @ (13 * np.eye(len(a)) - az @ (15 * np.eye(len(a)) - az @ (7 * np.eye(len(a)) - az))) / 4
        return z

    rng = np.random.default_rng(2)
    query, key = (rng.normal(size=(4, 13, 4, 5)) * 1.5 for _ in range(2))
    value, key = rng.normal(size=(4, 13, 2, 3)), key[:, :, :2]
    lengths, landmarks = (13, 8, 3, 0), 4  # not divisible, divisible, fewer than landmarks, none
    real = np.arange(13)[None] < np.asarray(lengths)[:, None]
    real[1] = real[1][::-1]  # padding in front
    settings = {"landmarks": landmarks, "iterations": iterations, "scale": 0.7}
    arrays = [jnp.asarray(a, jnp.float32) for a in (query, key, value)]
    got = jax.jit(functools.partial(nystrom_attention, **settings))(*arrays, jnp.asarray(real))
    for b, places in enumerate(real):
        for h in range(4):
            if places.any():
                q, k, v = query[b, places, h] * 0.7, key[b, places, h // 2], value[b, places, h // 2]
                want = nystrom_loop(q, k, v, landmarks, pinv)
                np.testing.assert_allclose(got[b, places, h], want, atol=2e-3 if iterations == 30 else 1e-4)
    np.testing.assert_array_equal(got[3], 0)


def test_narrow_queries_and_keys_equal_a_loop():
    name = "encoder: narrow"
    config, flat = (
        config_of(name),
        {a: np.asarray(n, np.float64) for a, n in tree.flatten(model_of(name).params).items()},
    )
    x = np.random.default_rng(3).normal(size=(1, 5, config.width))
    linear = lambda x, m: x @ flat[f"layers/0/attention/{m}/kernel"] + flat[f"layers/0/attention/{m}/bias"]  # noqa: E731
    query, key, value = (linear(x, m).reshape(5, 3, -1).swapaxes(0, 1) for m in ("query", "key", "value"))
    assert query.shape[-1] == key.shape[-1] == 2 and value.shape[-1] == 4
    y = softmax(query @ key.swapaxes(1, 2) / math.sqrt(2)) @ value
    want = linear(y.swapaxes(0, 1).reshape(1, 5, -1), "output")
    own = tree.nest(
        {a.removeprefix("layers/0/attention/"): jnp.asarray(n, jnp.float32) for a, n in flat.items() if "/0/a" in a}
    )
    got, *_ = attention_kind(config)(config, "layers/0/attention").apply({"params": own}, jnp.asarray(x, jnp.float32))
    close(got, want)


def test_nystrom_equals_transformers():
    """Where both mean the same: one sequence and one head (they scale by all heads' largest sum), no padding."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.NystromformerModel(
        transformers.NystromformerConfig(
            vocab_size=V,
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=1,
            intermediate_size=16,
            hidden_act="gelu",
            max_position_embeddings=20,
            type_vocab_size=1,
            segment_means_seq_len=12,
            num_landmarks=4,
            conv_kernel_size=3,
            initializer_range=0.3,
            layer_norm_eps=1e-5,
        )
    ).eval()
    stored = {n: t.detach().numpy() for n, t in theirs.state_dict().items()}
    config = config_of(
        "encoder: nystrom",
        heads=1,
        segments=1,
        positions=22,
        norm_epsilon=1e-5,
        attention=Nystrom(landmarks=4, convolution=3),
    )
    flat = {
        "embedding/token": stored["embeddings.word_embeddings.weight"],
        "embedding/position": np.roll(stored["embeddings.position_embeddings.weight"], -2, 0),  # theirs begin at 2
        "embedding/segment": stored["embeddings.token_type_embeddings.weight"],
    }
    norms = {"embedding/norm": "embeddings.LayerNorm"}
    for i in range(2):
        here, there = f"layers/{i}", f"encoder.layer.{i}"
        linears = {f"attention/{m}": f"attention.self.{m}" for m in ("query", "key", "value")}
        linears |= {"attention/output": "attention.output.dense", "feed_forward/up": "intermediate.dense"}
        for ours, name in {**linears, "feed_forward/down": "output.dense"}.items():
            flat[f"{here}/{ours}/kernel"] = stored[f"{there}.{name}.weight"].T
            flat[f"{here}/{ours}/bias"] = stored[f"{there}.{name}.bias"]
        norms[f"{here}/norms/attention"] = f"{there}.attention.output.LayerNorm"
        norms[f"{here}/norms/feed_forward"] = f"{there}.output.LayerNorm"
        flat[f"{here}/attention/convolution/taps"] = stored[f"{there}.attention.self.conv.weight"][:, 0, :, 0].T
    for ours, name in norms.items():
        flat |= {f"{ours}/scale": stored[f"{name}.weight"], f"{ours}/bias": stored[f"{name}.bias"]}
    model = fc.Model(params=tree.unflatten({a: jnp.asarray(n) for a, n in flat.items()}), config=config)
    assert {a: n.shape for a, n in flat.items()} == {a: tuple(n.shape) for a, n in abstract_flat(config).items()}
    tokens = ids(1, 12)
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).last_hidden_state
    close(model(tokens).last_hidden_state, want)


# ── refusals and compression ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("encoder: linformer none", {"causal": True}, "linformer attention goes with causal=False only"),
        ("encoder: nystrom", {"causal": True}, "nystrom attention goes with causal=False only"),
        ("encoder: nystrom", {"window": 3}, "nystrom attention goes with window=0 only"),
        ("encoder: linformer head", {"relative_buckets": 32}, "linformer attention goes with relative_buckets=0 only"),
        ("encoder: linformer none", {"positions": 3}, "length 4 is over the 3 positions"),
        ("encoder: latent", {"query_key_norm": True}, "latent attention goes with query_key_norm=False only"),
        ("encoder: latent", {"rotary": Rotary(pairs=(0,), pairs_of=4)}, "frequencies for 1 pairs, but 2 turn"),
        ("encoder: latent", {"key_value_heads": 1}, "key_value_heads is 1 and heads is 3"),
        (
            "encoder: full",
            {"query_key_width": 4, "rotary": Rotary(pairs=(0, 2, 3), pairs_of=8)},
            "frequencies for 3 pairs, but 2 turn",
        ),
        ("encoder: full", {"query_key_width": 3, "rotary": Rotary()}, "turn pairs, but a head is 3 wide"),
        ("encoder: full", {"query_key_width": 0}, "query_key_width must be a positive integer"),
        ("encoder: full", {"projection_kernel": 4}, "projection_kernel must be 0, or above 1 and, unless causal, odd"),
        ("encoder: full", {"feed_forward_kernel": 1}, "feed_forward_kernel must be 0, or above 1"),
        ("encoder: full", {"feed_forward_kernel": -1}, "feed_forward_kernel must be 0 or more"),
    ],
)
def test_contradictions_are_refused(name, more, message):
    with pytest.raises(ValueError, match=message):
        config_of(name, **more)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "linformr", "length": 2}, "unknown kind of attention 'linformr'.*did you mean 'linformer'"),
        ({"length": 2}, "unknown kind of attention None"),
        ("latent", "unknown kind of attention 'latent'"),
        ({"kind": "linformer"}, "missing length"),
        ({"kind": "linformer", "length": 2, "shared": "head"}, "unknown key 'shared'.*did you mean 'sharing'"),
        ({"kind": "linformer", "length": 2, "sharing": "heads"}, "did you mean 'head'"),
        ({"kind": "linformer", "length": 0}, "length must be an integer of 1 or more"),
        ({"kind": "nystrom", "landmarks": 4, "convolution": 4}, "convolution must be odd"),
        ({"kind": "nystrom", "landmarks": True}, "landmarks must be an integer"),
        ({**LATENT.to_json(), "query_rank": 0}, "query_rank must be an integer of 1 or more"),
        ({**LATENT.to_json(), "norm_epsilon": 0.0}, "norm_epsilon must be positive"),
        ({**LATENT.to_json(), "rotary_width": 0, "plain_width": 0}, "rotary_width and plain_width are both 0"),
    ],
)
def test_wrong_json_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_json({**config_of("encoder: full").to_json(), "attention": data})


def test_more_tokens_than_projections_are_refused():
    from flaxcompress.config import Patches

    patches = Patches(height=8, width=8, size=2, channels=1)
    config = config_of("encoder: linformer none", vocabulary=0, patches=patches, positions=17)
    model = filled(config)
    assert model(pixel_values=np.zeros((1, 1, 8, 8), np.float32)).last_hidden_state.shape == (1, 17, 12)
    with pytest.raises(ValueError, match="37 tokens, but only 17 positions"):
        model(pixel_values=np.zeros((1, 1, 12, 12), np.float32))


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
def test_experts_are_refused(kind):
    from flaxcompress.families import FAMILIES

    hf = dict.fromkeys(("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"), 8)
    hf |= {"num_hidden_layers": 4, "kv_lora_rank": 4, "q_lora_rank": None, "rope_theta": 10.0}
    read = FAMILIES[kind].read_config
    for more in ({}, {"first_k_dense_replace": 1, "n_routed_experts": 16}):
        with pytest.raises(ValueError, match=r"layers \d … 3 have \d+ routed experts"):
            read({**hf, **more})
    for more in ({"first_k_dense_replace": 4}, {"n_routed_experts": None}):
        assert isinstance(read({**hf, **more}).attention, Latent)
    with pytest.raises(ValueError, match="num_key_value_heads 2 is not supported"):
        read({**hf, "n_routed_experts": None, "num_key_value_heads": 2})


@pytest.mark.parametrize(
    "more",
    [
        {"attention": Nystrom(landmarks=2)},
        {"query_key_width": 2},
        {"projection_kernel": 3},
        {"feed_forward_kernel": 3},
    ],
)
def test_stock_folders_refuse_what_they_cannot_say(more, tmp_path):
    model = filled(config_of("encoder: full", **more))
    with pytest.raises(ValueError, match=f"stock bert folders have {next(iter(more))} .*, not"):
        fc.export(model, tmp_path / "out", format="torch-dense")


def test_trimming_cuts_the_projections():
    for name in ("none, grouped", "layer"):
        model = model_of(f"encoder: linformer {name}")
        small = fc.Trim(positions=9)(model, StepContext(original=model), key=jax.random.key(0))
        np.testing.assert_array_equal(small(ids(1, 9)).last_hidden_state, model(ids(1, 9)).last_hidden_state)
        assert {a: n.shape for a, n in tree.flatten(small.params).items()} == {
            a: tuple(n.shape) for a, n in abstract_flat(small.config).items()
        }
        assert small.config == fc.Trim(positions=9).plan(model.config)


@pytest.mark.parametrize(
    "more",
    [
        {"attention": Latent(**{**vars(LATENT), **QUERIES})},
        pytest.param({"projection_kernel": 3, "feed_forward_kernel": 3}, marks=pytest.mark.slow),
    ],
)
def test_calibrated_steps_go_through_every_matrix(more):
    """GPTQ at 8 bits walks layer by layer and sees every map's own input: nearly nothing may change."""
    from tiny_models import make_model, make_sentences, words

    vocabulary = words(60)
    model = make_model(
        vocabulary, width=16, layers=2, feed_forward_width=24, positions=32, initializer_range=0.2, **more
    )
    texts = tuple(make_sentences(vocabulary, 24))
    held = Calibration(
        CalibrationText(name="words", train=texts, held_out=()), model.assets, vocabulary=len(vocabulary)
    )
    step = fc.Quantize(bits=8, sentences=24)
    small = step(model, StepContext(original=model, calibration=held), key=jax.random.key(0))
    kinds = {a: type(n).__name__ for a, n in tree.flatten(small.params).items() if a.endswith("/kernel")}
    assert set(kinds.values()) == {"Quantized"} and len(kinds) >= 12
    assert (model.encode(list(texts)) * small.encode(list(texts))).sum(-1).min() > 0.999

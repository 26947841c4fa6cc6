"""Folding changes no output: which norms and factors it takes, family by family, and which it leaves."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick
from test_share import BERT, EPS, FAMILIES, drawn
from test_steps import inputs

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.compress import Context
from flaxcompress.compress.fold import fold_factors, norm_readers
from flaxcompress.config import Latent
from flaxcompress.formats import LowRank, matmul_flops, nbytes
from flaxcompress.model import abstract_flat

LLAMA = FAMILIES["llama"].replace(layers=2, sharing=None)
GPT2 = BERT.replace(
    **{
        "layers": 2,
        "sharing": None,
        "norm_place": "pre",
        "final_norm": True,
        "causal": True,
        "head": "causal_lm",
        "segments": 0,
    },
    **{"embedding_norm": False, "pooler": False},
)
T5 = LLAMA.replace(
    **{"head": "seq2seq_lm", "causal": False, "key_value_heads": None, "rotary": None, "relative_buckets": 8},
    decoder=LLAMA.replace(
        **{"vocabulary": 0, "head": "none", "key_value_heads": None, "rotary": None, "relative_buckets": 8},
        sharing=fc.Sharing.own(2, cross_attention=True),
    ),
)
LATENT = Latent(key_value_rank=6, query_rank=5, plain_width=4, rotary_width=2, value_width=4)
EVERY = r"layers/\d/norms/(attention|feed_forward)"
# A structure, and a pattern of the norms that are folded in it.
CASES = {
    "bert": (BERT.replace(layers=2, sharing=None), None),
    "llama": (LLAMA, EVERY),
    "gpt2": (GPT2, EVERY),
    "t5": (T5, r"(decoder/)?layers/\d/norms/(attention|cross_attention|feed_forward)"),
    "gptj": (GPT2.replace(parallel="one_norm"), r"layers/\d/norms/attention"),
    "sandwich": (LLAMA.replace(norm_place="sandwich"), EVERY),
    "latent": (LLAMA.replace(attention=LATENT, key_value_heads=None), EVERY),
    "no bias for that of the norm": (GPT2.replace(attention_bias=False), r"layers/\d/norms/feed_forward"),
    "low-rank": (LLAMA.with_rule(r".*/(up|query)/kernel", {"kind": "low_rank", "rank": 4}), EVERY),
    "factors": (
        LLAMA.with_rule(".*/(up|gate)/kernel", {"kind": "low_rank", "rank": 20}).with_rule(
            ".*/down/kernel", {"kind": "low_rank", "rank": 4}
        ),
        EVERY,
    ),
    "quantized": (LLAMA.with_rule(r".*/up/kernel", {"kind": "quantized", "bits": 8}), r"layers/\d/norms/attention"),
    "shared attention": (
        LLAMA.replace(sharing=fc.Sharing(attention=(0, 0), feed_forward=(0, 1), norms=(0, 1))),
        r"layers/\d/norms/feed_forward",
    ),
    "shared norms": (LLAMA.replace(sharing=fc.Sharing(attention=(0, 1), feed_forward=(0, 1), norms=(0, 0))), EVERY),
    "all shared": (LLAMA.replace(sharing="all"), EVERY),
    "deltas": (LLAMA.replace(deltas=fc.Deltas(rank=2)), EVERY),
    "convolutions": (LLAMA.replace(projection_kernel=3), r"layers/\d/norms/feed_forward"),
    "no first norm": (LLAMA.replace(first_norm=False), EVERY),
}


@functools.cache
def model(name: str) -> fc.Model:
    config, _ = CASES[name]
    rng = np.random.default_rng(5)

    def draw(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.integers(-99, 99, leaf.shape), leaf.dtype)
        return jnp.asarray(0.3 * rng.normal(size=leaf.shape) * (0.01 if "quantized" in name else 1), leaf.dtype)

    flat = {a: jax.tree.map(draw, node) for a, node in abstract_flat(config).items()}
    flat = {a: node + 1 if a.endswith("/scale") else node for a, node in flat.items()}
    return fc.Model(params=tree.unflatten(flat), config=config, assets=drawn().assets)


def folded(given: fc.Model, **settings) -> fc.Model:
    return fc.Fold(**settings)(given, Context(original=given), key=jax.random.key(0))


def outputs(given: fc.Model) -> list[np.ndarray]:
    """Hidden states and logits of the real tokens."""
    ids, mask = inputs()
    more = (
        {} if given.config.decoder is None else {"decoder_input_ids": ids[:, :6], "decoder_attention_mask": mask[:, :6]}
    )
    out = given(ids, mask, **more)
    real = mask[:, :6] if more else mask
    return [np.asarray(x)[real] for x in (out.last_hidden_state, out.logits) if x is not None]


@pytest.mark.parametrize("name", quick(CASES, ["gpt2", "t5", "deltas"]))
def test_outputs_are_unchanged(name):
    """Within rounding: each of 2 (or 4) layers' sums of up to 32 products rounds its folded weights anew."""
    result = folded(model(name))
    for got, want in zip(outputs(result), outputs(model(name)), strict=True):
        atol = 4 * 8 * np.sqrt(32) * EPS * np.abs(want).max()
        assert atol < 1e-4 * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "name",
    quick(CASES, ["bert", "gpt2", "t5", "deltas", "no bias for that of the norm", "quantized", "shared attention"]),
)
def test_only_norms_that_linear_maps_alone_read_are_folded(name):
    """Their scales are 1 and biases 0 afterwards; all others as before."""
    result, pattern = tree.flatten(folded(model(name)).params), CASES[name][1]
    before, found = tree.flatten(model(name).params), set()
    for address, node in result.items():
        norm, _, last = address.rpartition("/")
        if "norm" not in norm:
            continue
        if pattern and re.fullmatch(pattern, norm):
            found.add(norm)
            np.testing.assert_array_equal(node, np.full(node.shape, float(last == "scale"), np.float32))
        else:
            np.testing.assert_array_equal(node, before[address])
    assert bool(found) == bool(pattern)


def test_kernels_take_the_scale_and_biases_the_bias():
    """diag(s)·W and b + βW against numpy."""
    old, new = (
        {a: np.asarray(n, np.float64) for a, n in tree.flatten(m.params).items()}
        for m in (model("gpt2"), folded(model("gpt2")))
    )
    for layer, (norm, reader) in itertools.product(
        range(2),
        [*(("attention", f"attention/{x}") for x in ("query", "key", "value")), ("feed_forward", "feed_forward/up")],
    ):
        s, beta = (old[f"layers/{layer}/norms/{norm}/{x}"] for x in ("scale", "bias"))
        kernel, bias = (old[f"layers/{layer}/{reader}/{x}"] for x in ("kernel", "bias"))
        np.testing.assert_allclose(new[f"layers/{layer}/{reader}/kernel"], s[:, None] * kernel, rtol=EPS)
        np.testing.assert_allclose(new[f"layers/{layer}/{reader}/bias"], bias + beta @ kernel, rtol=0, atol=4 * EPS)


def test_folding_again_changes_nothing():
    once = folded(model("gpt2"))
    jax.tree.map(np.testing.assert_array_equal, once.params, folded(once).params)


def test_norms_after_sublayers_are_part_of_the_output():
    assert norm_readers(BERT) == {}


# ── factors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def product(*sizes: int) -> LowRank:
    """A chain of random factors of these sizes, nested to the right."""
    rng = np.random.default_rng(len(sizes))
    node = jnp.asarray(rng.normal(size=sizes[-2:]), jnp.float32)
    for n, m in reversed(list(itertools.pairwise(sizes[:-1]))):
        node = LowRank(left=jnp.asarray(rng.normal(size=(n, m)), jnp.float32), right=node)
    return node


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ((24, 6, 32), (24, 6, 32)),  # below break-even: stays
        ((24, 16, 32), (24, 32)),
        ((24, 20, 4, 32), (24, 4, 32)),
        ((24, 4, 20, 32), (24, 4, 32)),
        ((24, 12, 12, 12, 24), (24, 24)),  # no pair gains but all together do
        ((9, 3, 8, 8, 3, 9), (9, 3, 9)),
        ((10, 5, 10), (10, 10)),  # equal bytes: one product instead of two
    ],
)
def test_chains_become_the_cheapest_product(sizes, want):
    node = product(*sizes)
    short = fold_factors(node)
    chain, kept = [], [short]
    while kept:
        top = kept.pop()
        kept.extend([top.right, top.left] if isinstance(top, LowRank) else [])
        chain.extend([] if isinstance(top, LowRank) else [top.shape])
    assert (*(n for n, _ in chain), chain[-1][1]) == want
    assert nbytes(short) <= nbytes(node) and matmul_flops(short) <= matmul_flops(node)
    full = lambda w: np.asarray(w, np.float64) if not isinstance(w, LowRank) else full(w.left) @ full(w.right)  # noqa: E731
    atol = 4 * np.sqrt(32) * EPS * np.abs(full(node)).max()
    np.testing.assert_allclose(full(short), full(node), rtol=0, atol=atol)
    assert (short is node) == (sizes == want)
    abstract = fold_factors(jax.eval_shape(lambda: node))
    assert tree.signature(abstract) == tree.signature(jax.eval_shape(lambda: short))


def test_factors_in_other_formats_stay():
    half = LowRank(left=jnp.ones((8, 8), jnp.float16), right=jnp.ones((8, 8)))
    assert fold_factors(half) is half
    dense = jnp.ones((8, 8))
    assert fold_factors(dense) is dense


def test_factors_of_a_model_are_multiplied_where_the_plan_says():
    given = model("factors")
    result = folded(given)
    assert result.config == fc.Fold().plan(given.config)
    flat = tree.flatten(result.params)
    assert not isinstance(flat["layers/1/feed_forward/up/kernel"], LowRank)
    assert flat["layers/1/feed_forward/down/kernel"].rank == 4
    assert tree.signature(result.params) == tree.signature(tree.unflatten(abstract_flat(result.config)))
    assert result.nbytes < given.nbytes
    assert fc.profile(result, length=8).flops_per_token < fc.profile(given, length=8).flops_per_token
    for got, want in zip(outputs(result), outputs(given), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2 * 8 * np.sqrt(32) * EPS * np.abs(want).max())
    assert folded(given, norms=False, factors=False).config == given.config


# ── the pooler ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unused_pooler_goes_and_a_used_one_stays():
    assert not folded(drawn()).config.pooler
    assert folded(drawn(), pooler="keep").config.pooler
    classes = BERT.replace(head="sequence_classification", classes=3)
    assert fc.Fold().resolve(fc.Model(params={}, config=classes, assets=drawn().assets)).pooler == "keep"
    assert fc.Fold().resolve(fc.Model(params={}, config=BERT)).pooler == "keep"  # no sentence pooling
    with pytest.raises(ValueError, match="the head 'sequence_classification' reads the pooler's output"):
        fc.Fold(pooler="drop").plan(classes)

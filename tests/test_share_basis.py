"""One basis for the kernels of several layers: what it costs in outputs, where it is stored, and how it trains."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_share import BERT, EPS, FAMILIES, drawn
from test_steps import calibration, signatures

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.compress import Context
from flaxcompress.compress.share_basis import share_basis
from flaxcompress.compress.statistics import input_moments
from flaxcompress.compress.walk import LayerWalk
from flaxcompress.export.merge import merge_bases
from flaxcompress.export.torch import check_folder
from flaxcompress.formats import materialize, nbytes
from flaxcompress.model import abstract_flat
from flaxcompress.nn.bases import basis_address, is_on_basis
from flaxcompress.nn.transformer import run

READING = r"layers/\d+/(attention/(query|key|value)|feed_forward/(up|gate))/kernel"
IDS = np.random.default_rng(0).integers(5, 200, (2, 7))


def shared(step: fc.ShareBasis, name: str = "bert") -> fc.Model:
    context = Context(original=drawn(name), calibration=calibration())
    return step(drawn(name), context, key=jax.random.key(0))


@functools.cache
def halved(name: str = "bert", group: int = 2) -> fc.Model:
    return shared(fc.ShareBasis(READING, keep=0.5, group=group), name)


# ── the mathematics ──────────────────────────────────────────────────────────────────────────────────────────────────


def biased(rng: np.random.Generator, n: int, count: int) -> list[np.ndarray]:
    """Second moments of correlated inputs with a mean that is much larger than their spread."""
    inputs = [rng.normal(size=(200, n)) @ rng.normal(size=(n, n)) + 30 * rng.normal(size=n) for _ in range(count)]
    return [x.T @ x / len(x) for x in inputs]


def error(weights, found, moments) -> float:
    """Σ tr((W_l - AV_l)ᵀ C_l (W_l - AV_l))."""
    missing = [w - found.basis @ v for w, v in zip(weights, found.coefficients, strict=True)]
    return float(sum(np.einsum("nm,nk,km->", e, c, e) for e, c in zip(missing, moments, strict=True)))


@pytest.mark.parametrize("shapes", [(12, 5, 2), (6, 9, 3), (8, 8, 1)], ids=str)
def test_the_error_in_the_common_metric_is_the_tail_of_the_spectrum(shapes):
    """Also by the paper's own form: the singular values of S[W_1 | … | W_k] with SᵀS = ΣC."""
    n, m, count = shapes
    rng = np.random.default_rng(3)
    weights, moments = [rng.normal(size=(n, m)) for _ in range(count)], biased(rng, n, count)
    total = np.sum(moments, 0)
    values = np.linalg.svd(np.linalg.cholesky(total).T @ np.concatenate(weights, 1), compute_uv=False)
    for rank in range(1, min(n, count * m) + 1):
        found = share_basis(weights, rank, moments)
        assert found.basis.shape == (n, rank) and [v.shape for v in found.coefficients] == [(rank, m)] * count
        # Squares are sums of n·n products of the largest values, which the metric's own squares bound.
        atol = 64 * n * n * np.finfo(np.float64).eps * (values**2).sum()
        assert abs(error(weights, found, [total] * count) - (values[rank:] ** 2).sum()) <= atol
        np.testing.assert_allclose(found.spectrum[: len(values)] ** 2, values**2, rtol=0, atol=atol)


def test_refitted_coefficients_are_each_layers_least_squares_solution():
    rng = np.random.default_rng(4)
    inputs = [rng.normal(size=(60, 10)) @ rng.normal(size=(10, 10)) for _ in range(3)]
    weights = [rng.normal(size=(10, 7)) for _ in inputs]
    moments = [x.T @ x for x in inputs]
    plain, refitted = (share_basis(weights, 4, moments, refit=refit) for refit in (False, True))
    np.testing.assert_array_equal(plain.basis, refitted.basis)
    assert error(weights, refitted, moments) < 0.99 * error(weights, plain, moments)
    for x, w, v in zip(inputs, weights, refitted.coefficients, strict=True):
        want = np.linalg.lstsq(x @ refitted.basis, x @ w, rcond=None)[0]
        condition = np.linalg.cond(x @ refitted.basis) ** 2
        np.testing.assert_allclose(v, want, rtol=0, atol=64 * condition * np.finfo(float).eps * np.abs(want).max())


def test_refitting_leaves_alone_what_no_input_tells():
    """Inputs of one layer that are all zero: its coefficients stay those of everyone's inputs."""
    rng = np.random.default_rng(5)
    weights, moments = [rng.normal(size=(6, 4)) for _ in range(2)], biased(rng, 6, 2)
    moments[1] = np.zeros_like(moments[1])
    plain, refitted = (share_basis(weights, 3, moments, refit=refit) for refit in (False, True))
    np.testing.assert_array_equal(plain.coefficients[1], refitted.coefficients[1])
    assert np.isfinite(refitted.coefficients[0]).all()


def test_a_shared_basis_beats_bases_of_their_own_at_equal_bytes():
    """Kernels that have most of their column space in common, as those of neighbouring layers partly do."""
    rng = np.random.default_rng(6)
    n, m, rank = 24, 20, 6
    common, moments = rng.normal(size=(n, rank)), biased(rng, n, 2)
    weights = [common @ rng.normal(size=(rank, m)) + 0.05 * rng.normal(size=(n, m)) for _ in moments]
    found = share_basis(weights, rank, moments, refit=True)
    own = (n * rank + 2 * m * rank) // (2 * (n + m))  # the rank that the same bytes buy without
    alone = [share_basis([w], own, [c]) for w, c in zip(weights, moments, strict=True)]
    assert error(weights, found, moments) < 0.2 * sum(
        error([w], f, [c]) for w, f, c in zip(weights, alone, moments, strict=True)
    )


@pytest.mark.slow
def test_on_a_trained_model_the_error_is_the_tail_and_full_rank_its_logits(data_dir):
    """Stories260K: biased, correlated inputs, of which float32 moments are not quite positive."""
    model = fc.load(data_dir / "models" / "stories260K")
    rows = np.random.default_rng(0).integers(3, 500, (8, 64))
    moments = input_moments(model, [(rows, np.ones_like(rows, bool))])
    flat = tree.View(model.params)
    for name in ("attention/query", "feed_forward/up"):
        weights = [np.asarray(flat[f"layers/{n}/{name}/kernel"], np.float64) for n in (1, 2)]
        metrics = [np.asarray(moments[f"layers/{n}/{name}"], np.float64) for n in (1, 2)]
        total = np.sum(metrics, 0)
        total = (total + total.T) / 2
        for rank in (8, 40):
            found = share_basis(weights, rank, [total / 2] * 2)
            tail = (found.spectrum[rank:] ** 2).sum()
            atol = weights[0].size * 2 * np.finfo(np.float64).eps * (found.spectrum**2).sum()
            # The root of the metric takes what rounding made negative as zero.
            atol += max(0.0, -np.linalg.eigvalsh(total)[0]) * sum((w**2).sum() for w in weights)
            assert abs(error(weights, found, [total] * 2) - tail) <= atol
    step = fc.ShareBasis(READING, rank=64, group=5, whitening="none", allow_larger=True)
    whole = step(model, Context(original=model), key=jax.random.key(0))
    got, want = (m(rows[:2]).logits for m in (whole, model))
    np.testing.assert_allclose(got, want, rtol=0, atol=model.config.layers * 4 * 64 * EPS * np.abs(want).max())


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_full_rank_computes_what_the_model_did(name):
    """Llama's keys are narrower than a group needs for a basis of full width: R = 12 + 12."""
    step = fc.ShareBasis(READING, rank=24, allow_larger=True)
    got, want = (m(IDS).last_hidden_state for m in (shared(step, name), drawn(name)))
    np.testing.assert_allclose(got, want, rtol=0, atol=4 * 64 * EPS * np.abs(want).max())


def test_a_basis_is_stored_once():
    """In the tree, in bytes, in the file; a group's bytes are at most `keep` of what its kernels had."""
    model, old = halved(), drawn()
    flat, before = tree.flatten(model.params), tree.flatten(old.params)
    assert model.config.sharing.bases == (0, 0, 1, 1)
    bases = [a for a in flat if "/bases/" in a]
    assert len(bases) == 2 * 4  # two groups; query, key, value, up
    kernels = [a for a in flat if is_on_basis(flat[a])]
    assert len(kernels) == 4 * 4 and {basis_address(model.config, a) for a in kernels} == set(bases)
    for basis in bases:
        group = [a for a in kernels if basis_address(model.config, a) == basis]
        assert len(group) == 2
        n, m = flat[group[0]].shape
        rank = flat[basis].shape[1]
        assert flat[group[0]].rank == rank == int(0.5 * n * 2 * m / (n + 2 * m))
        assert nbytes(flat[basis]) + sum(nbytes(flat[a]) for a in group) == 4 * rank * (n + 2 * m)
        assert nbytes(flat[basis]) + sum(nbytes(flat[a]) for a in group) <= 0.5 * sum(nbytes(before[a]) for a in group)
    assert model.nbytes == sum(map(nbytes, flat.values())) == 4 * model.parameters
    stacked = jax.tree.leaves(model.params["layers"]["bases"])
    assert [leaf.shape[0] for leaf in stacked] == [2] * 4  # one leaf per map for both groups


def test_operations_are_counted_where_they_are_done():
    model, old = halved(), drawn()
    cost = {part.part: part for part in fc.profile(model, length=8).parts}
    assert cost["bases"].flops_per_token == 0 and cost["bases"].bytes > 0
    saved = sum(
        2 * (np.prod(n.shape) - n.rank * sum(n.shape)) for n in tree.flatten(model.params).values() if is_on_basis(n)
    )
    before, after = (fc.profile(m, length=8).flops_per_token for m in (old, model))
    assert before - after == saved


def test_a_bases_gradient_is_the_sum_over_its_uses():
    """Against the same model in which every kernel has a copy of its basis; through the scan over layers."""
    model = halved()
    merged, c = merge_bases(model), np.random.default_rng(1).normal(size=(*IDS.shape, model.config.width))
    assert merged.config.sharing.bases == () and signatures(tree.flatten(merged.params)) == signatures(
        abstract_flat(merged.config)
    )

    def gradient(model):
        def loss(params):
            return (run(params, model.config, jnp.float32, IDS).last_hidden_state * c).sum()

        return tree.flatten(jax.jit(jax.grad(loss))(model.params))

    got, want = gradient(model), gradient(merged)
    kernels = [a for a in want if is_on_basis(got[a])]
    for basis in [a for a in got if "/bases/" in a]:
        group = [a for a in kernels if basis_address(model.config, a) == basis]
        each = [np.asarray(want[a].left, np.float64) for a in group]
        atol = 1024 * EPS * max(np.abs(g).max() for g in each)
        assert len(each) == 2 and min(np.abs(g).max() for g in each) > 20 * atol
        np.testing.assert_allclose(got[basis], sum(each), rtol=0, atol=atol, err_msg=basis)
        for address in group:
            right = np.asarray(want[address].right)
            np.testing.assert_allclose(got[address].right, right, rtol=0, atol=1024 * EPS * np.abs(right).max())


@pytest.mark.parametrize(
    ("name", "group"), [("bert", 3), pytest.param("llama", 2, marks=pytest.mark.slow)], ids=["bert-3", "llama-2"]
)
def test_folders_load_here_and_in_pytorch(name, group, tmp_path):
    """A group of three of four layers leaves one alone, at a rank of its own; of BERT, a stock folder too."""
    pytest.importorskip("transformers")
    model = halved(name, group)
    assert fc.ModelConfig.from_json(json.loads(json.dumps(model.config.to_json()))) == model.config
    fc.save(model, tmp_path / "m")
    again = fc.load(tmp_path / "m")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    folders = [(again, tmp_path / "m")]
    if name == "bert":
        folders.append((model, fc.export(model, tmp_path / "stock", format="torch-dense")))
    for ours, folder in folders:
        deviation = check_folder(ours, folder)
        assert deviation is not None and deviation <= 1e-4


@pytest.mark.slow
def test_rounding_comes_after():
    """Bases and coefficients by GPTQ, the coefficients on what the rounded basis gives."""
    model = halved()
    step = fc.Quantize(bits=8, pattern=r"layers/.*/kernel", sentences=37)
    rounded = step(model, Context(original=drawn(), calibration=calibration()), key=jax.random.key(0))
    flat = tree.flatten(rounded.params)
    assert signatures(flat) == signatures(abstract_flat(rounded.config))
    assert signatures(flat) == signatures(abstract_flat(step.plan(model.config)))
    exact = tree.flatten(model.params)
    for address in (a for a in flat if "/bases/" in a):
        step_size = np.asarray(flat[address].scale, np.float64).max()
        assert np.abs(np.asarray(materialize(flat[address])) - exact[address]).max() < 4 * step_size
    want = np.asarray(model(IDS).last_hidden_state)
    assert np.abs(np.asarray(rounded(IDS).last_hidden_state) - want).max() < 0.1 * np.abs(want).max()


def test_walking_layer_by_layer_sees_bases():
    model = halved()
    walk = LayerWalk(model.config, tree.View(model.params), [(IDS, np.ones_like(IDS, bool))])
    stage = next(iter(walk.stages(label="walk")))
    want = model(IDS).last_hidden_state
    np.testing.assert_allclose(walk.outcome(stage, {})[0], want, rtol=0, atol=256 * 4 * EPS * np.abs(want).max())


def test_other_steps_may_follow():
    context = Context(original=drawn(), calibration=calibration())
    dropped = fc.DropLayers(layers=(1,))(halved(), context, key=jax.random.key(0))
    assert dropped.config.sharing.bases == (0, 1, 1)
    assert signatures(tree.flatten(dropped.params)) == signatures(abstract_flat(dropped.config))
    more = fc.ShareBasis(r"layers/\d+/attention/output/kernel", keep=0.5)
    both = more(halved(), context, key=jax.random.key(0))
    assert signatures(tree.flatten(both.params)) == signatures(abstract_flat(more.plan(halved().config)))
    assert len([a for a in tree.flatten(both.params) if "/bases/" in a]) == 2 * 5


@pytest.mark.parametrize("stack", ["", "decoder/"], ids=["encoder", "decoder"])
def test_an_encoder_and_its_decoder_have_bases_of_their_own(stack, tmp_path):
    """One of the two stands on bases, of full rank: nothing else changes, outputs stay, a folder loads."""
    sharing = dataclasses.replace(BERT.sharing, cross_attention=(0, 1, 2, 3))
    inner = BERT.replace(vocabulary=0, pooler=False, causal=True, segments=0, sharing=sharing)
    config = BERT.replace(pooler=False, segments=0, head="seq2seq_lm", decoder=inner)
    model = fc.Model.init(config, key=jax.random.key(2), assets=drawn().assets)
    pattern = rf"{stack}layers/\d+/(cross_)?attention/(query|value)/kernel"
    step = fc.ShareBasis(pattern, rank=24, whitening="none", allow_larger=True)
    made = step(model, Context(original=model), key=jax.random.key(0))
    flat = tree.flatten(made.params)
    assert signatures(flat) == signatures(abstract_flat(made.config)) == signatures(abstract_flat(step.plan(config)))
    bases = {a for a in flat if "/bases/" in a}
    assert bases and all(a.startswith(f"{stack}layers/") for a in bases)
    assert {basis_address(made.config, a) for a in flat if is_on_basis(flat[a])} == bases
    given = {"decoder_input_ids": IDS[:, ::-1]}
    want = np.asarray(model(IDS, **given).logits)
    atol = config.layers * 2 * 24 * EPS * np.abs(want).max()
    np.testing.assert_allclose(made(IDS, **given).logits, want, rtol=0, atol=atol)
    assert np.abs(np.asarray(materialize(flat[min(bases)]))).max() > 0
    fc.save(made, tmp_path / "m")
    np.testing.assert_array_equal(fc.load(tmp_path / "m")(IDS, **given).logits, made(IDS, **given).logits)


def test_models_may_be_drawn_on_bases():
    """A structure of one's own, without a model that it came from: draws of layers and of groups differ."""
    rule = {"kind": "low_rank", "rank": 3, "left": {"kind": "basis"}}
    sharing = fc.Sharing(attention=(0, 1, 2, 3), feed_forward=(0, 1, 2, 3), norms=(0, 1, 2, 3), bases=(0, 1, 1, 0))
    config = FAMILIES["bert"].replace(sharing=sharing).with_rule(r"layers/\d+/feed_forward/up/kernel", rule)
    flat = tree.flatten(fc.Model.init(config, key=jax.random.key(0)).params)
    bases = [np.asarray(flat[f"layers/{n}/bases/feed_forward/up/kernel"]) for n in (0, 1)]
    assert [b.shape for b in bases] == [(24, 3)] * 2 and np.abs(bases[0] - bases[1]).max() > 0
    assert abs(np.std(bases) / config.initializer_range - 1) < 4 / np.sqrt(2 * 2 * 24 * 3)


LLAMA = FAMILIES["llama"]


@pytest.mark.parametrize(
    ("config", "step", "message"),
    [
        (
            LLAMA.replace(feed_forward_width=(8, 8, 8, 12)),
            fc.ShareBasis(READING, keep=0.5),
            "24×8 and .* 24×12",
        ),
        (LLAMA, fc.ShareBasis(READING, keep=0.5, rank=3), "give either rank or keep"),
        (LLAMA, fc.ShareBasis(READING, rank=20), "key/kernel: rank 20 would enlarge a 24×24 matrix; use rank <= 11"),
        (
            LLAMA,
            fc.ShareBasis("layers/[012]/attention/query/kernel", keep=0.5),
            "leaves out .*query of layer 3",
        ),
        (LLAMA, fc.ShareBasis("layers/[01]/attention/query/kernel", keep=0.5), "reaches no kernel of layer 2"),
        (LLAMA, fc.ShareBasis("layers/./attention/querry/kernel", keep=0.5), "matches no parameter.*did you mean"),
        (FAMILIES["bert"], fc.ShareBasis("pooler/dense/kernel", keep=0.5), "stands outside of layers"),
        (
            LLAMA.replace(sharing=fc.Sharing.named("all", layers=4)),
            fc.ShareBasis(READING, keep=0.5),
            "the layers share their attention already, by .0, 0, 0, 0",
        ),
        (
            fc.ShareBasis(r".*/attention/query/kernel", keep=0.5).plan(LLAMA),
            fc.ShareBasis(r".*/attention/key/kernel", keep=0.5, group=4),
            "share bases already, by .0, 0, 1, 1",
        ),
        (
            fc.ShareBasis(r".*/attention/query/kernel", keep=0.5).plan(LLAMA),
            fc.ShareBasis(r".*/attention/query/kernel", keep=0.5),
            "layers/0/attention/query/kernel stands on a basis already",
        ),
    ],
)
def test_what_cannot_share(config, step, message):
    with pytest.raises(ValueError, match=message):
        step.plan(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fc.ShareBasis(READING, keep=0.5, group=0), "group must be at least 1"),
        (lambda: fc.ShareBasis(READING, keep=0.5, sentences=0), "sentences must be at least 1"),
        (
            lambda: fc.Share(map="cycle", sets=2).plan(fc.ShareBasis(READING, keep=0.5).plan(FAMILIES["bert"])),
            "sharing/bases: layers that share set 0 of attention need the same bases, but have 0 and 1",
        ),
        (
            lambda: fc.LowRank(READING, keep=0.5)(
                halved(), Context(original=drawn(), calibration=calibration()), key=jax.random.key(0)
            ),
            "let this step come before ShareBasis",
        ),
        (
            lambda: abstract_flat(LLAMA.replace(sharing=fc.Sharing(**dict.fromkeys(
                ("attention", "feed_forward", "norms"), (0, 1, 2, 3)), bases=(0, 0, 0, 0)))),
            "no kernel of layers stands on set 0",
        ),
        (
            lambda: abstract_flat(fc.ShareBasis(READING, keep=0.5).plan(LLAMA).with_rule(
                "layers/.*/query/kernel", {"kind": "low_rank", "rank": 3, "left": {"kind": "basis"}})),
            "layers/0/bases/attention/query/kernel: a basis stands on none itself",
        ),
    ],
)  # fmt: skip
def test_mistakes_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()

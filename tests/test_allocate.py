"""One budget: choices among offers, what offers cost, targets met, and the commands that show them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick
from test_steps import TOKEN, calibration, context, text, tiny

import flaxcompress as fc
from flaxcompress import storage, tree
from flaxcompress.compress import Allocate, Trim
from flaxcompress.compress.allocate import allocated_sizes
from flaxcompress.compress.answers import Answers
from flaxcompress.compress.choices import choose, total_of, within_loss
from flaxcompress.compress.curves import sensitivity_curves
from flaxcompress.compress.kernel_offers import Menu, Offer, Priced, offers_of, undominated, ways_of
from flaxcompress.compress.solve import price, steps_of
from flaxcompress.compress.table_offers import table_curve
from flaxcompress.compress.target import Target, parse_target
from flaxcompress.folder import tensors_of
from flaxcompress.formats import matmul_flops, nbytes
from flaxcompress.model import abstract_flat

KEY = jax.random.key(0)
MENU = Menu(bits=(2, 3, 4, 5, 8), groups=(8, None), ranks=(0.3, 0.6), factor_bits=(4, 8), factor_group=8)


# ── choices ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def random_choices(seed, names=5, each=4):
    """Losses that fall with cost, as after `undominated`."""
    rng = np.random.default_rng(seed)
    costs, losses = {}, {}
    for name in map(str, range(names)):
        costs[name] = dict(enumerate(np.cumsum(rng.integers(1, 20, each)).tolist()))
        losses[name] = dict(enumerate(np.sort(rng.exponential(size=each))[::-1].tolist()))
    return losses, costs


def every(losses, costs):
    """(loss, cost) of all combinations."""
    names = list(losses)
    for picks in itertools.product(*(losses[n] for n in names)):
        chosen = dict(zip(names, picks, strict=True))
        yield total_of(losses, chosen), total_of(costs, chosen)


@pytest.mark.parametrize("seed", range(8))
def test_choices_are_near_the_best_of_all_combinations(seed):
    """A Lagrangian choice with its rest spent is at most one item's gain from the best (the duality gap's bound)."""
    losses, costs = random_choices(seed)
    smallest = sum(min(c.values()) for c in costs.values())
    largest = sum(max(c.values()) for c in costs.values())
    for budget in np.linspace(smallest, largest, 9).astype(int):
        chosen = choose(losses, costs, int(budget))
        assert total_of(costs, chosen) <= budget
        best = min(loss for loss, cost in every(losses, costs) if cost <= budget)
        gap = max(max(each.values()) - min(each.values()) for each in losses.values())
        assert best <= total_of(losses, chosen) <= best + gap
    assert total_of(losses, chosen) == best  # everything can be had


@pytest.mark.parametrize("seed", range(4))
def test_the_smallest_within_a_loss(seed):
    losses, costs = random_choices(seed)
    totals = sorted({loss for loss, _ in every(losses, costs)})
    for limit in totals[:: max(1, len(totals) // 7)]:
        chosen = within_loss(losses, costs, limit)
        assert total_of(losses, chosen) <= limit * (1 + 1e-12)
    with pytest.raises(ValueError, match="the best lose"):
        within_loss(losses, costs, totals[0] * 0.9)


def test_too_small_a_budget_names_the_smallest():
    losses, costs = random_choices(0)
    smallest = sum(min(c.values()) for c in costs.values())
    with pytest.raises(ValueError, match=f"take {smallest} bytes, more than the {smallest - 1} allowed"):
        choose(losses, costs, smallest - 1)


# ── targets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_targets_are_read():
    assert parse_target("8x", 800) == Target("bytes", 100)
    assert parse_target(" 1.5 MB", 10**7) == Target("bytes", 1_500_000)
    assert parse_target("2x-faster", 800) == Target("speed", 2.0)
    assert parse_target("0.5%", 800) == Target("loss", 0.005)


@pytest.mark.parametrize("target", ["1x-faster", "0.9x-faster", "100%", "0%", "2y", "faster", "8x-smaller"])
def test_targets_that_make_no_sense(target):
    with pytest.raises(ValueError, match="target"):
        parse_target(target, 800)


# ── offers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def kernel():
    """A 24×32 kernel of decaying spectrum with correlated inputs and gradients."""
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(24, 24)) @ np.diag(np.geomspace(2, 0.02, 24)) @ rng.normal(size=(24, 32))
    inputs, gradients = (np.cov(rng.normal(size=(n, n)) @ rng.normal(size=(n, 200))) for n in (24, 32))
    return weight.astype(np.float32), Priced(inputs, gradients, 3.0)


def test_the_price_is_the_quadratic_form():
    """tr(ΔᵀCΔG)/2 = ½ E[(x Δ gᵀ)²] for independent x and g."""
    weight, priced = kernel()
    change = 0.1 * weight**2
    want = 3.0 * 0.5 * np.kron(priced.inputs, priced.gradients).dot(change.ravel()).dot(change.ravel())
    assert priced.loss(change) == pytest.approx(want, rel=1e-5)


def test_offers_say_what_is_stored_and_computed():
    weight, priced = kernel()
    model = tiny()
    address = "layers/0/feed_forward/up/kernel"  # of the same shape
    for way in ways_of((24, 32), MENU):
        choice = dataclasses.replace(way, loss=0.0)
        solution = type("Only", (), {"chosen": {address: choice}, "table_bytes": None})
        config = model.config
        for step in steps_of(solution, MENU):
            config = step.plan(config)
        node = abstract_flat(config)[address]
        headers = 230 * len(jax.tree.leaves(node))
        assert way.bytes - headers == nbytes(node), way.label
        assert way.flops == matmul_flops(node), way.label
    assert {o.label for o in offers_of(weight, priced, MENU)} == {o.label for o in ways_of((24, 32), MENU)}


def test_more_bits_and_more_rank_lose_less():
    weight, priced = kernel()
    by_label = {o.label: o.loss for o in offers_of(weight, priced, MENU)}
    for group in ("", " in groups of 8"):
        losses = [by_label[f"{bits} bits{group}"] for bits in (2, 3, 4, 5, 8)]
        assert losses == sorted(losses, reverse=True) and losses[-1] > 0
    assert by_label["3 bits"] > by_label["3 bits in groups of 8"]
    ranks = sorted({o.rank for o in ways_of((24, 32), MENU) if o.rank})
    for low, high in itertools.pairwise(ranks):
        assert by_label[f"rank {low} in 8 bits"] > by_label[f"rank {high} in 8 bits"]
        assert by_label[f"rank {low} in 4 bits"] > by_label[f"rank {low} in 8 bits"]


def test_dominated_offers_go():
    offers = [
        Offer("bits", b, None, None, size, 1, loss) for b, size, loss in ((2, 10, 5.0), (3, 20, 6.0), (4, 30, 1.0))
    ]
    assert [o.bits for o in undominated(offers)] == [2, 4]
    assert [o.bits for o in undominated(offers, "flops")] == [4]


def test_the_tables_curve_falls_and_meets_its_layouts():
    rng = np.random.default_rng(0)
    table = (rng.normal(size=(400, 24)) @ np.diag(np.geomspace(1, 0.1, 24))).astype(np.float32)
    weights = 1 / (np.arange(400) + 3.0)
    curve = table_curve(table, weights / weights.sum(), np.diag(np.linspace(0.5, 1.5, 24)), 10.0)
    assert (np.diff(curve.losses) < 0).all() and (np.diff(curve.bytes) > 0).all()
    for size, loss in zip(curve.bytes, curve.losses, strict=True):
        assert curve.loss(size) == pytest.approx(loss)
    # Nothing stored loses all: half of what the tokens' vectors have in the metric.
    nothing = (
        0.5 * 10 * (weights / weights.sum() * np.einsum("vd,d,vd->v", table, np.linspace(0.5, 1.5, 24), table)).sum()
    )
    assert curve.losses[0] < nothing


# ── the answers' loss ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_loss_of_sentence_vectors():
    batches = calibration().batches(37, size=8)
    answers = Answers(tiny(), batches)
    other = tiny().replace(params=jax.tree.map(lambda leaf: leaf * 1.05, tiny().params))
    texts = [row for row in text().train]
    a, b = (m.encode(texts) for m in (tiny(), other))
    want = 1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert answers.parts == len(texts) and answers.unit == "1 - cosine"
    assert answers.loss(other) == pytest.approx(want.mean(), rel=1e-3)
    assert abs(answers.loss(tiny())) < 1e-6


def test_the_loss_of_a_causal_model_is_the_divergence():
    from test_statistics import DECODER, random_model

    model, other = random_model(DECODER), random_model(DECODER)
    other = other.replace(params=jax.tree.map(lambda leaf: leaf * 1.1, other.params))
    ids = np.random.default_rng(0).integers(5, DECODER.vocabulary, (2, 6)).astype(np.int32)
    mask = np.ones((2, 6), bool)
    mask[1, 4:] = False
    p, q = (np.asarray(jax.nn.log_softmax(m(ids, attention_mask=mask).logits), np.float64) for m in (model, other))
    want = ((np.exp(p) * (p - q)).sum(-1) * mask).sum() / mask.sum()
    answers = Answers(model, [(ids, mask)])
    assert answers.unit == "KL per token" and answers.parts == mask.sum()
    assert answers.loss(other) == pytest.approx(want, rel=1e-4)


def test_a_causal_models_report_has_its_divergence():
    from test_statistics import DECODER, random_model

    model = random_model(DECODER.replace(vocabulary=200))
    found = []
    for bits in (8, 4):
        recipe = fc.Recipe([fc.Quantize(bits=bits, rounding="nearest")])
        _, report = fc.compress(model, recipe, calibration=list(text().train), key=KEY)
        found.append(report.to_json()["fidelity"]["kl_per_token"])
    assert 0 < 10 * found[0] < found[1]  # a fourth of the bits: 256 times the squared error


# ── the step ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def trimmed():
    return Trim(positions=12, pooler="drop", dtype="float16")(tiny(), context(), key=KEY)


@functools.cache
def prices():
    return price(trimmed(), calibration(), ("bits", "rank", "table"), MENU)


def test_predictions_tell_the_order_of_real_losses():
    """Each kernel's 2 bits, alone: predicted and real losses rank alike (Spearman above 0.7), and are of one size."""
    model, answers = tiny(), Answers(tiny(), calibration().batches(37, size=8))
    predicted, real = [], []
    for address, offers in price(
        model, calibration(), ("bits",), Menu(ranks=(), groups=(8,), factor_group=8)
    ).kernels.items():
        step = fc.Quantize(bits=2, group=8, pattern=address, sentences=37)
        predicted.append(next(o.loss for o in offers if o.bits == 2))
        real.append(answers.loss(step(model, context(), key=KEY)))
    order = [np.argsort(np.argsort(v)) for v in (predicted, real)]
    assert np.corrcoef(*order)[0, 1] > 0.7
    assert 0.2 < sum(predicted) / sum(real) < 5


def test_smaller_sizes_are_predicted_to_lose_more():
    sizes = np.linspace(trimmed().nbytes * 0.9, trimmed().nbytes * 0.5, 5).astype(int).tolist()
    found = allocated_sizes(prices(), sizes, trimmed().config)
    assert len(found) >= 3
    losses = [solution.loss for _, solution in found]
    assert losses == sorted(losses)


def test_a_weight_moves_bytes_into_the_table():
    """The choice is the best by weighed losses; what it predicts is the loss as it is."""
    size, weighed = int(trimmed().nbytes * 0.5), dataclasses.replace(prices(), weights={"table": 10.0})
    ((_, plain),), ((_, found),) = (allocated_sizes(p, [size], trimmed().config) for p in (prices(), weighed))
    counted = [s.loss + 9.0 * s.chosen[TOKEN].loss for s in (plain, found)]
    assert counted[1] < counted[0] and plain.loss < found.loss
    assert found.chosen[TOKEN].bytes > plain.chosen[TOKEN].bytes
    assert found.loss == pytest.approx(sum(o.loss for o in found.chosen.values()))


@pytest.mark.parametrize("target", quick(["4x", "15KB"], ["4x"]))
def test_a_size_is_met_and_never_passed(target):
    step = Allocate(target=target, sentences=16, corrections=1)
    ctx = dataclasses.replace(context(), choices=[], spectra=[])
    small = step(trimmed(), ctx, key=KEY)
    allowed = parse_target(target, tiny().nbytes).value
    size = storage.file_size(tensors_of(small))
    assert 0.9 * allowed < size <= allowed  # of a model so small, a tenth is headers' names
    addresses = {row["address"] for row in ctx.choices if row["kind"] not in ("drop", "tie")}
    assert addresses == {TOKEN, *tree.select(tree.View(small.params), "layers/.*/kernel")}
    again = step(trimmed(), dataclasses.replace(context(), choices=[], spectra=[]), key=KEY)
    jax.tree.map(np.testing.assert_array_equal, small.params, again.params)


def test_a_speed_is_met():
    step = Allocate(target="1.5x-faster", sentences=16, corrections=0)
    small = step(tiny(), dataclasses.replace(context(), choices=[]), key=KEY)
    kernels = [a for a in tree.View(tiny().params) if a.startswith("layers/") and a.endswith("kernel")]
    before, after = (sum(matmul_flops(tree.View(m.params)[a]) for a in kernels) for m in (tiny(), small))
    assert before / after >= 1.5
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(small.params["layers"]))  # nothing is rounded


def test_a_loss_is_kept():
    step = Allocate(target="2%", sentences=37)
    ctx = dataclasses.replace(context(), choices=[], spectra=[])
    small = step(trimmed(), ctx, key=KEY)
    answers = Answers(tiny(), calibration().batches(37, size=32, seed=2))
    assert answers.loss(small) <= 0.02
    assert small.nbytes < 0.6 * tiny().nbytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "soon"}, "target 'soon': expected a factor"),
        ({"target": "4x", "actions": ()}, "actions must name some of"),
        ({"target": "4x", "corrections": -1}, "corrections must be 0 or more"),
        ({"target": "4x", "weights": {"table": 0.0}}, "weights of table must be a positive number, got 0.0"),
        ({"target": "4x", "weights": {"tabel": 2.0}}, "unknown kind 'tabel'; known: bits, rank, table; did you mean"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Allocate(**settings)


def test_an_allocation_applied_twice_is_refused():
    small = fc.Quantize(bits=8, rounding="mse", pattern="layers/.*/kernel")(tiny(), context(), key=KEY)
    with pytest.raises(ValueError, match="layers/0/attention/key/kernel is stored as quantized already"):
        Allocate(target="6x")(small, context(), key=KEY)
    with pytest.raises(ValueError, match="start from the original model"):
        Allocate(target="6x").plan(small.config)


def test_targets_out_of_reach_name_the_smallest():
    with pytest.raises(ValueError, match=r"target of 0.00 MB cannot be reached; the smallest .* 0\.0\d MB"):
        Allocate(target="900B").plan(trimmed().config)
    with pytest.raises(ValueError, match=r"40x-faster cannot be reached: .* \d+\.\d+x-faster"):
        Allocate(target="40x-faster").plan(tiny().config)


def test_the_plan_fits_the_target():
    config = trimmed().config
    for target in ("3x", "4x"):
        step = Allocate(target=target).resolve(tiny())
        planned = sum(nbytes(n) for n in abstract_flat(step.plan(config)).values())
        assert planned <= 1.02 * parse_target(target, tiny().nbytes).value
        assert step.bound(config) == int(parse_target(target, tiny().nbytes).value)


# ── sensitivity ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_curves_of_every_matrix_and_of_sizes():
    curves = sensitivity_curves(tiny(), calibration(), recipes=("light",), key=KEY)
    data = json.loads(json.dumps(curves.to_json()))
    assert {m["address"] for m in data["matrices"]} == {
        a for a in tree.View(tiny().params) if "layers" in a and "kernel" in a
    }
    for matrix in data["matrices"]:
        for curve in (matrix["bits"], matrix["ranks"]):
            losses = [entry["loss"] for entry in curve]
            assert losses == sorted(losses, reverse=True) and len(losses) == 4
    assert data["recipes"][0]["name"] == "light" and data["recipes"][0]["loss"] < 0.01
    page = curves.to_html()
    assert page.count("<img") == 3 and "layers/1/feed_forward/down/kernel" in page
    assert "attention/query" in {row[0] for row in curves.rows()}

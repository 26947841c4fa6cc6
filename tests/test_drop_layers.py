"""Leaving out layers: which, and that the others compute what they did."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick
from test_share import BERT, EPS, FAMILIES, drawn
from test_steps import calibration, inputs

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.compress import Context
from flaxcompress.compress.drop_layers import without_layers
from flaxcompress.compress.statistics import dense_model
from flaxcompress.export.merge import merge_deltas
from flaxcompress.formats import nbytes
from flaxcompress.model import abstract_flat
from flaxcompress.train.objectives.base import Run

SHARED = (
    FAMILIES["llama"]
    .replace(
        sharing=fc.Sharing(attention=(0, 1, 0, 2), feed_forward=(0, 0, 1, 1), norms=(0, 1, 2, 3), deltas=(0, 1, 2, 2)),
        deltas=fc.Deltas(rank=2),
        feed_forward_width=(20, 32),
    )
    .with_rule("layers/1/feed_forward/up/kernel", {"kind": "low_rank", "rank": 3})
)
LOCAL = FAMILIES["llama"].replace(window=3, local=(True, False, False, True))
CASES = {"llama": FAMILIES["llama"], "shared": SHARED, "local": LOCAL}


@functools.cache
def random_model(name: str) -> fc.Model:
    rng = np.random.default_rng(11)
    flat = {
        a: jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), node)
        for a, node in abstract_flat(CASES[name]).items()
    }
    flat = {a: node + 1 if a.endswith("/scale") else node for a, node in flat.items()}
    return fc.Model(params=tree.unflatten(flat), config=CASES[name], assets=drawn().assets)


def dropped(model: fc.Model, **settings) -> fc.Model:
    context = Context(original=model, calibration=calibration())
    return fc.DropLayers(**settings)(model, context, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "gone"),
    quick([(n, g) for n in CASES for g in ((1,), (0, 2), (3, 0), (0, 1, 3))], [("shared", (0, 2)), ("local", (3, 0))]),
)
def test_a_layer_that_adds_nothing_may_as_well_be_left_out(name, gone):
    """Before norms, a layer whose output maps give zero is the identity: each layer gets weights of its own for it."""
    model = random_model(name)
    ids, mask = inputs()
    got = dropped(model, layers=gone)(ids, mask).last_hidden_state
    merged = dense_model(merge_deltas(model))
    old = merged.config
    flat, own = tree.flatten(merged.params), {}
    for layer in range(4):
        for address, node in flat.items():
            at = tree.place(address)
            if at is not None and at.number == getattr(old.sharing, at.part)[layer]:
                silent = layer in gone and at.path in ("output/kernel", "down/kernel")
                own[at._replace(number=layer).address] = jnp.zeros_like(node) if silent else node
    widths = tuple(old.feed_forward_width_of(number) for number in old.sharing.feed_forward)
    plain = old.replace(sharing=fc.Sharing.own(4), feed_forward_width=widths)
    rest = {a: node for a, node in flat.items() if tree.place(a) is None}
    want = fc.Model(params=tree.unflatten({**rest, **own}), config=plain)(ids, mask).last_hidden_state
    # 4 layers of sums of up to 32 products.
    np.testing.assert_allclose(got[mask], want[mask], rtol=0, atol=4 * 8 * 32**0.5 * EPS * np.abs(want).max())


def test_the_first_layers_alone_give_a_hidden_state():
    """Of a model with norms after: the first two layers' output is the third hidden state."""
    ids, mask = inputs()
    want = drawn()(ids, mask, output_hidden_states=True).hidden_states[2]
    small = dropped(drawn(), layers=(2, 3))
    np.testing.assert_allclose(
        small(ids, mask).last_hidden_state[mask], want[mask], rtol=0, atol=64 * EPS * np.abs(want).max()
    )
    assert small.config.layers == 2 and small.config.sharing == fc.Sharing.own(2)


def test_a_student_is_compared_with_the_layers_it_stands_for():
    """The first two layers of four: nothing is missing of the teacher's first two, much of its last two."""
    ids, mask = inputs()
    small = dropped(drawn(), layers=(2, 3))
    batch = {"input_ids": ids, "attention_mask": mask}
    found = {}
    for layers in ((0, 1), (2, 3)):
        objective, teacher = fc.Distill(teacher=drawn(), cosine=0.0, logits=0.0, layers=layers).split()
        term = objective.loss(Run(small.params, small.config, jnp.float32), teacher, batch)["hidden"]
        found[layers] = float(term.total / term.weight)
    assert found[0, 1] < 1e-10 and found[2, 3] > 1e-3


@pytest.mark.parametrize(
    ("gone", "stand_for"), [((1,), [1, 2, 3]), ((0,), [1, 2, 3]), ((2, 3), [0, 3]), ((1, 2), [2, 3])]
)
def test_a_layer_stands_for_those_left_out_behind_it(gone, stand_for):
    context = Context(original=drawn())
    fc.DropLayers(layers=gone)(drawn(), context, key=jax.random.key(0))
    assert context.layers == stand_for


@pytest.mark.parametrize(("layers", "message"), [((0, 4), "4 layers, and no layer 4"), ((0,), "they cannot be")])
def test_layers_that_do_not_fit_are_refused(layers, message):
    small = dropped(drawn(), layers=(2, 3))
    ids, mask = inputs()
    with pytest.raises(ValueError, match=message):
        objective, teacher = fc.Distill(teacher=drawn(), layers=layers).split()
        run = Run(small.params, small.config, jnp.float32)
        objective.loss(run, teacher, {"input_ids": ids, "attention_mask": mask})


def test_a_count_leaves_out_those_of_least_influence():
    """Against cosines of hidden states in numpy."""
    ids, mask = inputs()
    states = [np.asarray(h, np.float64)[mask] for h in drawn()(ids, mask, output_hidden_states=True).hidden_states]
    unit = [h / np.linalg.norm(h, axis=-1, keepdims=True) for h in states]
    influence = [1 - (a * b).sum(-1).mean() for a, b in itertools.pairwise(unit)]
    gone = tuple(np.argsort(influence)[:2].tolist())
    assert sorted(gone) != [2, 3]  # which the plan takes
    by_count, by_hand = dropped(drawn(), count=2), dropped(drawn(), layers=gone)
    assert by_count.config == by_hand.config == fc.DropLayers(count=2).plan(BERT)
    by_share = dropped(drawn(), keep=0.6)  # 2.4 of 4
    assert by_share.config == by_hand.config == fc.DropLayers(keep=0.6).plan(BERT)
    for model in (by_count, by_share):
        jax.tree.map(np.testing.assert_array_equal, model.params, by_hand.params)


@pytest.mark.parametrize(
    ("layers", "settings", "kept"), [(6, {"keep": 0.5}, [0, 2, 5]), (12, {"count": 8}, [0, 4, 7, 11])]
)
def test_what_stays_at_even_distances_has_the_first_and_the_last(layers, settings, kept):
    config = BERT.replace(layers=layers, sharing=None)
    gone = tuple(layer for layer in range(layers) if layer not in kept)
    step = fc.DropLayers(choice="even", **settings)
    assert step.plan(config) == fc.DropLayers(layers=gone).plan(config)
    if layers == 6:
        model = fc.Model.init(config, key=jax.random.key(0))
        got, want = (
            s(model, Context(original=model), key=jax.random.key(0)) for s in (step, fc.DropLayers(layers=gone))
        )
        jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


def test_maps_stay_consistent():
    """Sets that nobody uses any more are gone, the others numbered anew, each in its format and width."""
    small, moved = without_layers(SHARED, (0, 1))
    assert small.sharing == fc.Sharing(attention=(0, 1), feed_forward=(0, 0), norms=(0, 1), deltas=(0, 0))
    assert small.feed_forward_width == 32
    assert moved["layers/0/attention/query/kernel"] == "layers/0/attention/query/kernel"
    assert moved["layers/1/attention/query/kernel"] == "layers/2/attention/query/kernel"
    assert moved["layers/0/feed_forward/up/kernel"] == "layers/1/feed_forward/up/kernel"
    flat = abstract_flat(small)
    assert set(flat) == {*moved, *(a for a in abstract_flat(SHARED) if tree.place(a) is None)}
    assert flat["layers/0/feed_forward/up/kernel"].rank == 3
    assert without_layers(SHARED, (2, 3))[0].formats == ()


def test_windows_follow_their_layers():
    assert without_layers(LOCAL, (0, 1))[0].local == (False, True)
    alike = without_layers(LOCAL, (0, 3))[0]
    assert alike.window == 0 and alike.local == (False, False)


def test_the_plan_of_a_count_is_no_less_than_any_choice():
    size = lambda config: sum(map(nbytes, abstract_flat(config).values()))  # noqa: E731
    for count in (1, 2, 3):
        largest = max(size(without_layers(SHARED, gone)[0]) for gone in itertools.combinations(range(4), count))
        assert size(fc.DropLayers(count=count).plan(SHARED)) == largest


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fc.DropLayers(), "give one of count, keep and layers"),
        (lambda: fc.DropLayers(count=1, layers=(0,)), "give one of count, keep and layers"),
        (lambda: fc.DropLayers(count=0), "nothing to leave out"),
        (lambda: fc.DropLayers(keep=0.5, count=2), "give one of count, keep and layers"),
        (lambda: fc.DropLayers(layers=(1,), choice="even"), "choice 'even' chooses layers"),
        (lambda: fc.DropLayers(keep=1.0), "keep 1.0 must lie in"),
        (lambda: fc.DropLayers(keep=0.9).plan(BERT), "keep 0.9 leaves nothing out of 4 layers"),
        (lambda: fc.DropLayers(layers=()), "nothing to leave out"),
        (lambda: fc.DropLayers(count=4).plan(BERT), "count 4 leaves nothing of 4 layers"),
        (lambda: fc.DropLayers(layers=(0, 1, 2, 3)).plan(BERT), "leaves nothing"),
        (lambda: fc.DropLayers(layers=(1, 1)).plan(BERT), "names one twice"),
        (lambda: fc.DropLayers(layers=(4,)).plan(BERT), r"no layer 4; the model has layers 0 … 3"),
        (
            lambda: fc.DropLayers(layers=(0,)).plan(FAMILIES["llama"].replace(first_norm=False)),
            "layer 0 has no norm before its attention",
        ),
        (
            lambda: fc.DropLayers(count=1).plan(
                BERT.replace(
                    pooler=False,
                    head="seq2seq_lm",
                    decoder=BERT.replace(
                        vocabulary=0, pooler=False, causal=True, sharing=fc.Sharing.own(4, cross_attention=True)
                    ),
                )
            ),
            "two stacks of layers",
        ),
    ],
)
def test_what_cannot_be_left_out_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_first_layer_without_its_norm_is_never_chosen():
    config = FAMILIES["llama"].replace(first_norm=False)
    planned = fc.DropLayers(count=3).plan(config)
    assert planned.layers == 1 and "layers/0/norms/attention/scale" not in abstract_flat(planned)

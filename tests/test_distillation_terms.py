"""Terms of distillation against loops in numpy: relations, attention, embeddings, hard labels, several teachers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick

import flaxcompress as fc
from flaxcompress import tree
from flaxcompress.model import abstract_flat
from flaxcompress.train.objectives.base import Run, mean_of

EPS = float(np.finfo(np.float32).eps)
OFF = {"cosine": 0.0, "hidden": 0.0, "logits": 0.0}
ENCODER = {"vocabulary": 40, "positions": 16, "pooler": False, "dropout": 0.0, "attention_dropout": 0.0}
DECODER = {
    **ENCODER,
    "causal": True,
    "norm_place": "pre",
    "norm": "rms",
    "gated": True,
    "rotary": fc.config.Rotary(),
    "final_norm": True,
    "embedding_norm": False,
    "head": "causal_lm",
}
GROUPED = {"heads": 4, "key_value_heads": 2}
IDS = np.random.default_rng(7).integers(5, 40, (3, 6)).astype(np.int32)
MASK = np.arange(6) < np.asarray([[6], [4], [1]])
BATCH = {"input_ids": IDS, "attention_mask": MASK}


def drawn(seed=0, **config) -> fc.Model:
    """Random weights from numpy, biases and norms too."""
    shape = {"width": 24, "layers": 2, "heads": 4, "feed_forward_width": 20}
    made = fc.ModelConfig(**{**ENCODER, **shape, **config})
    rng = np.random.default_rng(seed)
    flat = {}
    for address, node in abstract_flat(made).items():
        value = rng.normal(size=node.shape) * (0.3 if len(node.shape) == 2 else 0.1)
        flat[address] = jnp.asarray(value + address.endswith("/scale"), jnp.float32)
    return fc.Model(params=tree.unflatten(flat), config=made, assets=fc.Assets(files=()))


def terms_of(student: fc.Model, distill: fc.Distill, batch=BATCH):
    objective, constants = distill.split()

    def loss(params, constants, batch):
        return objective.loss(Run(params, student.config, jnp.float32), constants, batch)

    return jax.jit(loss)(student.params, constants, batch)


def mean(term) -> float:
    return float(term.total / term.weight)


def gradient_of(student: fc.Model, distill: fc.Distill, batch=BATCH):
    objective, constants = distill.split()

    def loss(params, constants):
        return mean_of(objective.loss(Run(params, student.config, jnp.float32), constants, batch))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(student.params, constants)


def outputs(model: fc.Model, **need):
    return fc.nn.run(model.params, model.config, jnp.float32, IDS, MASK, **need)


# ── relations ────────────────────────────────────────────────────────────────────────────────────────────────────────


def log_softmax(scores):
    scores = scores - scores.max()
    return scores - np.log(np.exp(scores).sum())


def relation_loops(student, teacher, heads, causal) -> float:
    """MiniLMv2's loss of projections [B, T, n], a row at a time, in float64."""
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        for b, row in enumerate(MASK):
            for t in np.flatnonzero(row):
                seen = [s for s in np.flatnonzero(row) if s <= t or not causal]
                for a in range(heads):
                    logs = []
                    for x in (ours[b], theirs[b]):
                        part = np.split(x, heads, axis=-1)[a]
                        scores = [part[t] @ part[s] / math.sqrt(part.shape[-1]) for s in seen]
                        logs.append(log_softmax(np.asarray(scores)))
                    total += (np.exp(logs[1]) * (logs[1] - logs[0])).sum() / heads
    return total / MASK.sum()


def flat64(x):
    return np.asarray(x, np.float64).reshape(*x.shape[:2], -1)


PAIRS = {
    "alike": ({}, {}, 0, (-1, -1)),
    "narrower_shallower": ({"width": 16, "heads": 2, "layers": 1}, {}, 8, (-1, -1)),
    "another_layer": ({"width": 48, "heads": 3}, {"layers": 3}, 12, (1, 0)),
    "decoder_from_grouped": ({**DECODER, "width": 16, "heads": 2}, {**DECODER, **GROUPED}, 2, (-2, -1)),
    "grouped_from_plain": ({**DECODER, **GROUPED, "layers": 1}, DECODER, 4, (-1, -1)),
    "decoder_from_encoder": (DECODER, {}, 4, (-1, -1)),
}


@pytest.mark.parametrize("name", quick(PAIRS, ("narrower_shallower", "decoder_from_grouped")))
def test_relations_equal_loops(name):
    ours, theirs, heads, layers = PAIRS[name]
    student, teacher = drawn(1, **ours), drawn(2, **theirs)
    settings = {"relations": 2.0, "relation_heads": heads, "relation_layers": layers}
    term = terms_of(student, fc.Distill(teacher=teacher, **OFF, **settings))["relations"]
    at = dict(zip(("teacher", "student"), layers, strict=True))
    vectors = {
        who: [flat64(x[at[who]]) for x in outputs(model, need_projections=True, need_logits=False).projections]
        for who, model in (("student", student), ("teacher", teacher))
    }
    causal = student.config.causal or teacher.config.causal
    want = relation_loops(vectors["student"], vectors["teacher"], heads or 4, causal)
    assert term.scale == 2.0 and want > 1e-2
    # Sums of up to 48 products and 6 keys; logarithms of probabilities of this size differ by a few roundings.
    scores = max(np.square(x).sum(-1).max() for x in [*vectors["student"], *vectors["teacher"]])
    assert abs(mean(term) - want) <= 8 * EPS * math.sqrt(48) * max(1.0, scores)


def test_projections_are_what_the_kernels_give():
    """Of BERT's kind, from the hidden state below: x @ kernel + bias."""
    model = drawn(3, layers=3)
    out = outputs(model, need_projections=True, need_hidden_states=True)
    flat = {address: np.asarray(node, np.float64) for address, node in tree.flatten(model.params).items()}
    for layer in range(3):
        x = np.asarray(out.hidden_states[layer], np.float64)
        for name, got in out.projections._asdict().items():
            at = f"layers/{layer}/attention/{name}"
            want = x @ flat[f"{at}/kernel"] + flat[f"{at}/bias"]
            assert got.shape == (3, 3, 6, 4, 6)
            np.testing.assert_allclose(flat64(got[layer]), want, rtol=0, atol=32 * EPS * np.abs(want).max())


def test_projections_are_what_scores_are_products_of():
    """With grouped keys and rotary positions: their softmax is the attention's probabilities."""
    model = drawn(3, **DECODER, **GROUPED)
    out = outputs(model, need_projections=True, need_attentions=True)
    assert out.projections.key.shape == (2, 3, 6, 2, 6) and out.projections.query.shape == (2, 3, 6, 4, 6)
    query, key = (np.asarray(x, np.float64) for x in out.projections[:2])
    key = np.repeat(key, 2, axis=3)
    scores = np.einsum("lbthd,lbshd->lbhts", query, key) / math.sqrt(6)
    sees = MASK[:, None, None, :] & np.tril(np.ones((6, 6), bool))
    scores = np.where(sees, scores, -np.inf)
    want = np.exp(scores - scores.max(-1, keepdims=True))
    want /= want.sum(-1, keepdims=True)
    np.testing.assert_allclose(out.attentions, want, rtol=0, atol=64 * EPS)


@pytest.mark.parametrize("kind", ["plain", "latent"])
def test_relations_at_equality_are_nothing_and_their_gradient_too(kind):
    latent = {"attention": fc.config.Latent(key_value_rank=8, plain_width=6, rotary_width=2, value_width=6)}
    config = {} if kind == "plain" else {**DECODER, **latent}
    student = drawn(1, **config)
    value, (ours, theirs) = gradient_of(student, fc.Distill(teacher=student, **OFF, relations=1.0))
    assert abs(float(value)) <= 64 * EPS
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(student.params))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(ours)) <= 1024 * EPS * scale
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(theirs))


# ── attention and embeddings ─────────────────────────────────────────────────────────────────────────────────────────

NARROW = {"width": 16, "layers": 2}
DEEP = {"layers": 3}


def attention_loops(student, teacher, layers, causal) -> float:
    """The mean over tokens of the mean over layers, heads and visible keys, in float64."""
    by_token = []
    for b, row in enumerate(MASK):
        for t in np.flatnonzero(row):
            seen = [s for s in np.flatnonzero(row) if s <= t or not causal]
            found = [
                (float(student[i, b, h, t, s]) - float(teacher[layer, b, h, t, s])) ** 2
                for i, layer in enumerate(layers)
                for h in range(student.shape[2])
                for s in seen
            ]
            by_token.append(np.mean(found))
    return float(np.mean(by_token))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_loops(causal):
    kind = {**DECODER, **GROUPED} if causal else {}
    student, teacher = drawn(1, **{**kind, **NARROW}), drawn(2, **(DECODER if causal else {}), **DEEP)
    distill = fc.Distill(teacher=teacher, **OFF, attention=3.0, layers=(2, 0))
    term = terms_of(student, distill)["attention"]
    ours, theirs = (outputs(model, need_attentions=True).attentions for model in (student, teacher))
    want = attention_loops(np.asarray(ours), np.asarray(theirs), (2, 0), causal)
    # Two sums of at most 6 keys and 8 heads of layers; probabilities have an error of some roundings.
    assert term.scale == 3.0 and want > 1e-3 and abs(mean(term) - want) <= 64 * EPS * want


@pytest.mark.slow
def test_attention_is_that_of_transformers(tmp_path):
    """Of two BERTs of random weights, both written and read by transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs, ours = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
        config = transformers.BertConfig(vocab_size=40, max_position_embeddings=16, initializer_range=0.4, **shape)
        model = transformers.BertModel(config, add_pooling_layer=False).eval()
        model.set_attn_implementation("eager")
        model.save_pretrained(tmp_path / str(seed))
        ours.append(fc.load(tmp_path / str(seed)))
        inputs = {"input_ids": torch.tensor(IDS).long(), "attention_mask": torch.tensor(MASK).long()}
        with torch.no_grad():
            theirs.append(torch.stack(model(**inputs, output_attentions=True).attentions).numpy())
    term = terms_of(ours[0], fc.Distill(teacher=ours[1], **OFF, attention=1.0))["attention"]
    want = attention_loops(theirs[0], theirs[1], (0, 1), False)
    assert want > 1e-3 and abs(mean(term) - want) <= 512 * EPS * want


def test_embeddings_are_the_first_hidden_state():
    student, teacher = drawn(1, layers=1), drawn(2, **DEEP)
    term = terms_of(student, fc.Distill(teacher=teacher, **OFF, embeddings=2.0))["embeddings"]
    a, b = (np.asarray(outputs(m, need_hidden_states=True).hidden_states[0], np.float64) for m in (student, teacher))
    want = np.square(a - b)[MASK].sum() / np.square(b)[MASK].sum()
    assert term.scale == 2.0 and abs(mean(term) - want) <= 16 * EPS * math.sqrt(b[MASK].size) * want


# ── hard labels, and the classic loss ────────────────────────────────────────────────────────────────────────────────

NEXT = np.where(MASK[:, 1:], IDS[:, 1:], -100)
NEXT = np.concatenate([NEXT, np.full((3, 1), -100)], 1).astype(np.int32)
CLASSES = {"head": "token_classification", "classes": 3}


@pytest.mark.parametrize("name", ["next_token", "classes"])
def test_hard_labels_are_cross_entropy(name):
    kind, labels = (DECODER, NEXT) if name == "next_token" else (CLASSES, np.where(NEXT < 0, -100, NEXT % 3))
    student, batch = drawn(1, **kind), {**BATCH, "labels": labels.astype(np.int32)}
    term = terms_of(student, fc.Distill(teacher=drawn(2, **kind), **OFF, hard=0.25), batch)["hard"]
    logits = np.asarray(outputs(student).logits, np.float64)
    want = -np.mean([log_softmax(logits[b, t])[labels[b, t]] for b, t in zip(*np.nonzero(labels >= 0), strict=True)])
    assert term.scale == 0.25 and float(term.weight) == (labels >= 0).sum() > 0
    assert abs(mean(term) - want) <= 32 * EPS * np.abs(logits).max()


def test_the_classic_loss_is_half_of_divergence_and_error():
    student, teacher = drawn(1, **CLASSES), drawn(2, **CLASSES)
    distill = fc.Distill.classic(teacher, 0.5)
    terms = terms_of(student, distill)
    assert set(terms) == {"logits", "logit_error"}
    q, p = (np.asarray(outputs(model).logits, np.float64)[MASK] for model in (student, teacher))
    logs = [[log_softmax(row) for row in rows] for rows in (p, q)]
    divergence = np.mean([(np.exp(a) * (a - b)).sum() for a, b in zip(*logs, strict=True)])
    want = (divergence + 0.5 * np.square(p - q).mean()) / 2
    assert abs(float(mean_of(terms)) - want) <= 64 * EPS * max(np.abs(p).max(), np.abs(q).max()) ** 2


def padded(batch, pad=3):
    """The same texts with more padding, of other tokens."""
    ids = np.pad(batch["input_ids"], ((0, 0), (0, pad)), constant_values=9)
    mask = np.pad(batch["attention_mask"], ((0, 0), (0, pad)))
    return {**batch, "input_ids": np.where(mask, ids, 17), "attention_mask": mask}


TEACHES = {
    "relations": ({"relations": 1.0, "relation_heads": 2}, {"width": 16, "heads": 2, "layers": 1}, {}),
    "relations_decoder": (
        {"relations": 1.0, "relation_heads": 2},
        {**DECODER, **GROUPED, "width": 16, "layers": 1},
        DECODER,
    ),
    "attention": ({"attention": 50.0, "layers": (1,)}, {"width": 16, "layers": 1}, {}),
    "embeddings": ({"embeddings": 1.0}, {"layers": 1}, {}),
}


@pytest.mark.parametrize("name", TEACHES)
def test_padding_does_not_count(name):
    settings, ours, theirs = TEACHES[name]
    student, distill = drawn(1, **ours), fc.Distill(teacher=drawn(2, **theirs), **{**OFF, **settings})
    for (key, a), b in zip(
        terms_of(student, distill).items(), terms_of(student, distill, padded(BATCH)).values(), strict=True
    ):
        assert float(a.weight) == float(b.weight), key
        assert abs(mean(a) - mean(b)) <= 128 * EPS * max(1.0, abs(mean(a))), key


@pytest.mark.parametrize("name", quick(TEACHES, ("relations_decoder",)))
def test_a_student_learns_the_term(name):
    settings, ours, theirs = TEACHES[name]
    student, distill = drawn(1, **ours), fc.Distill(teacher=drawn(2, **theirs), **{**OFF, **settings})
    value, (gradient, fixed) = gradient_of(student, distill)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(fixed))
    batches = fc.data.batches.StepBatches(lambda step: BATCH)
    options = {"optimizer": fc.Optimizer(learning_rate=0.01), "dtype": "float32"}
    after = fc.fit(student, distill, batches, steps=15, key=jax.random.key(0), **options)
    objective, constants = distill.split()
    left = mean_of(objective.loss(Run(after.params, after.config, jnp.float32), constants, BATCH))
    assert float(left) < 0.7 * float(value)


def test_relations_of_packed_documents_are_those_of_rows():
    student, teacher = drawn(1, **DECODER, **GROUPED), drawn(2, **DECODER)
    distill = fc.Distill(teacher=teacher, **OFF, relations=1.0)
    ids = np.concatenate([IDS[0, :6], IDS[1, :4], [0, 0]])[None].astype(np.int32)
    packs = np.asarray([[1] * 6 + [2] * 4 + [0] * 2], np.int32)
    packed = terms_of(student, distill, {"input_ids": ids, "packs": packs})["relations"]
    rows = {"input_ids": IDS[:2], "attention_mask": MASK[:2]}
    apart = terms_of(student, distill, rows)["relations"]
    assert float(packed.weight) == float(apart.weight) == 10
    assert abs(mean(packed) - mean(apart)) <= 128 * EPS * mean(apart)


WRONG = [
    ({"relations": 1.0, "relation_heads": 5}, {}, "5 relation heads do not divide all widths: .* divide 24"),
    ({"relations": 1.0, "relation_heads": 8}, {"width": 12}, "8 relation heads .* student's queries are 12 wide"),
    ({"relations": 1.0, "relation_layers": (0, 2)}, {}, "the student has 2 layers, and no layer 2"),
    ({"relations": 1.0, "relation_layers": (-4, 0)}, {}, "the teacher has 2 layers, and no layer -4"),
    ({"relations": 1.0, "relation_layers": (1,)}, {}, "relation_layers are two"),
    ({"relations": 1.0, "relation_heads": -1}, {}, "relation_heads must not be negative"),
    ({"attention": 1.0}, {"heads": 2}, "the teacher has 4 heads and the student 2; use relations"),
    ({"attention": 1.0}, {"layers": 1}, "2 of the teacher's layers is compared with the student's 1"),
    ({"embeddings": 1.0}, {"width": 16}, "embeddings have width 24, the student's 16"),
    ({"hard": 1.0}, {}, "hard labels need a student with a head"),
    ({"hard": 1.0}, CLASSES, "the batches have no labels"),
    ({"relations": -1.0}, {}, "relations must not be negative"),
    ({}, {}, "are all 0: nothing is learned"),
]


@pytest.mark.parametrize(("settings", "ours", "message"), WRONG)
def test_mistakes_are_named(settings, ours, message):
    with pytest.raises(ValueError, match=message):
        terms_of(drawn(1, **ours), fc.Distill(teacher=drawn(2), **{**OFF, **settings}))

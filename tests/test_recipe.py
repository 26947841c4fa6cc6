"""Recipes, plans, targets and the whole of `compress` on a tiny model."""

import json

import jax
import numpy as np
import pytest
from quick import quick
from tiny_models import make_model, make_sentences, words

import flaxcompress as fc
from flaxcompress.compress import recipe_names
from flaxcompress.compress.run import file_bytes
from flaxcompress.compress.target import parse_target

WORDS = words(400)


@pytest.fixture(scope="module")
def model():
    return make_model(WORDS, width=64, layers=2, feed_forward_width=128, positions=48)


@pytest.fixture(scope="module")
def sentences():
    return make_sentences(WORDS, 200)


def test_the_shipped_recipes_are_valid_and_round_trip():
    assert recipe_names() == ["balanced", "fast", "light", "nano", "small", "tiny"]
    for name in recipe_names():
        recipe = fc.Recipe.load(name)
        assert recipe.description
        assert fc.Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize("name", quick(["light", "balanced", "small", "tiny", "nano", "fast"], ["balanced"]))
def test_every_shipped_recipe_runs_and_lands_within_its_plan(model, sentences, name):
    recipe = fc.Recipe.load(name).with_heal_steps(2)
    if name in ("tiny", "nano"):  # a table this small cannot have so few bits: its basis alone is larger
        steps = [s for s in recipe.steps if not isinstance(s, fc.FactorizeEmbedding)]
        recipe = fc.Recipe([steps[0], fc.FactorizeEmbedding(average_bits=3.0), *steps[1:]])
    plan = recipe.plan(model)
    small, report = fc.compress(model, recipe, calibration=sentences, key=jax.random.key(0))
    assert small.nbytes <= plan.after < plan.before == model.nbytes
    assert [s["name"] for s in report.steps] == [s.name for s in recipe.steps]
    if name == "balanced":
        again, _ = fc.compress(model, recipe, calibration=sentences, key=jax.random.key(0))
        for a, b in zip(jax.tree.leaves(small.params), jax.tree.leaves(again.params), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_report_holds_what_scripts_rely_on(model, sentences, tmp_path):
    recipe = fc.Recipe([fc.Quantize(bits=8), fc.Heal(steps=3)])
    small, report = fc.compress(model, recipe, calibration=sentences, key=jax.random.key(0))
    fc.save(small, tmp_path / "out", report=report)
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    for key in ("params", "bytes", "flops_per_token"):
        assert set(data[key]) == {"before", "after"}
    assert data["bytes"]["after"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert set(data["fidelity"]) == {"data", "n", "mean_cosine", "rank_correlation", "neighbour_overlap_10"}
    assert set(data["steps"][0]) == {"name", "params", "bytes", "seconds"}
    assert min(data["encoded_per_second"]["before"], data["encoded_per_second"]["after"]) > 0
    assert data["seconds"] > 0 and data["versions"]["jax"] == jax.__version__
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and "base_model: someone/some-model" in card and "Quantize" in card
    assert "<html" in (tmp_path / "out" / "report.html").read_text().lower()


@pytest.mark.parametrize("target", quick(["3x", "4x", "5x", "6x", "80KB"], ["6x"]))
def test_a_target_is_met_and_never_passed(model, sentences, target):
    recipe = fc.Recipe.load("balanced").with_heal_steps(0).with_target(target, model)
    small, _ = fc.compress(model, recipe, calibration=sentences, key=jax.random.key(0))
    allowed = parse_target(target, model.nbytes).value
    assert 0.5 * allowed < file_bytes(small) <= allowed


@pytest.mark.parametrize("target", ["", "x", "8", "0x", "-2x", "10 miles", "1x", "900MB"])
def test_targets_that_make_no_sense_are_refused(model, target):
    with pytest.raises(ValueError, match="target"):
        fc.Recipe.load("balanced").with_target(target, model)


def test_a_target_refuses_a_recipe_whose_steps_it_would_drop(model):
    recipe = fc.Recipe([fc.ToLatentAttention(rank=8)])
    with pytest.raises(ValueError, match="cannot fit a recipe with ToLatentAttention"):
        recipe.with_target("4x", model)


def test_an_unreachable_target_names_the_smallest(model):
    with pytest.raises(ValueError, match=r"cannot be reached; the smallest .* MB"):
        fc.Recipe.load("balanced").with_target("1KB", model)


def test_the_share_of_scrambled_sentences_is_kept():
    recipe = fc.Recipe.from_yaml("scrambled: 0.25\nsteps: [{Quantize: {bits: 8}}]")
    for changed in (recipe.with_heal_steps(3), recipe.with_heal_steps(0), fc.Recipe.from_json(recipe.to_json())):
        assert changed.scrambled == 0.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [{Quantise: {bits: 8}}]", "did you mean 'Quantize'"),
        ("steps: [{Quantize: {bit: 8}}]", "did you mean 'bits'"),
        ("steps: [{Quantize: {bits: eight}}]", "expected int"),
        ("steps: [{Quantize: {bits: 7}}]", "bits must be one of"),
        ("steps: [{Quantize: {rounding: gptp}}]", "did you mean 'gptq'"),
        ("steps: [{LowRank: {rank: 4}}]", "pattern must be given"),
        ("steps: {Quantize: {bits: 8}}", "list of 'steps'"),
        ("step: []", "list of 'steps'"),
        ("steps: []\nnote: x", "unknown key 'note'"),
        ("steps: [{Quantize: {bits: 8}}]\nscrambled: 1.5", "scrambled must be a number from 0 to 1"),
        ("steps: [{Quantize: {bits: 8}}]\nscrambled: half", "scrambled must be a number from 0 to 1"),
        ("steps: [a: b: c", "not valid YAML"),
        ("steps: [{Quantize: {bits: 8}, Heal: {}}]", "one name with its settings"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message) as error:
        fc.Recipe.from_yaml(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (fc.Quantize(bits=8, pattern="layers/.*/kernels"), "matches no parameter"),
        (fc.LowRank(pattern=r"layers/\d+/attention/.*/kernel", rank=60), "rank <= 31"),
        (fc.LowRank(pattern=r"layers/\d+/attention/.*/kernel", rank=0), "rank 0"),
        (fc.LowRank(pattern=r"layers/\d+/attention/.*/kernel", rank=65, allow_larger=True), "1 … 64"),
        (fc.LowRank(pattern=r"layers/\d+/attention/.*/kernel"), "either rank or keep"),
        (fc.FactorizeEmbedding(rank=64), "rank <= "),
        (fc.FactorizeEmbedding(target_bytes=10), "too few"),
    ],
)
def test_a_plan_refuses_steps_that_do_not_fit(model, step, message):
    with pytest.raises(ValueError, match=message):
        fc.Recipe([step]).plan(model)


@pytest.fixture(scope="module")
def viewer():
    """A model of images."""
    patches = {"height": 8, "width": 8, "size": 4, "channels": 1}
    fields = {"width": 32, "layers": 2, "heads": 2, "feed_forward_width": 64, "positions": 5, "segments": 0}
    head = {"pooler": False, "head": "sequence_classification", "classes": 3}
    config = fc.ModelConfig.from_json({"vocabulary": 0, "patches": patches, **fields, **head})
    return fc.Model.init(config, key=jax.random.key(0))


KERNELS = r"layers/\d+/.*/kernel"
DECOMPOSING = [
    fc.LowRank(KERNELS, keep=0.5),
    fc.Tensorize(KERNELS, keep=0.5),
    fc.ShareBasis(KERNELS, keep=0.5),
    fc.Quantize(bits=4),
    fc.FactorizeEmbedding(rank=8),
    fc.TensorTrainEmbedding(rank=4),
    fc.AutoencodeEmbedding(rank=8),
]


@pytest.mark.parametrize("step", DECOMPOSING, ids=lambda step: step.name)
def test_a_step_applied_twice_is_refused_with_the_first_matrix(model, step):
    once = step.plan(model.config)
    with pytest.raises(ValueError, match=rf"{step.name}: .*(layers/0/attention/key/kernel|embedding/\w+) .* already"):
        step.plan(once)


@pytest.mark.parametrize(
    "step",
    [
        *DECOMPOSING[:3],
        fc.JointQueryKey(width=4),
        fc.JointValueOutput(width=4),
        fc.PruneChannels(keep=0.5),
        fc.Allocate(target="30kB"),
    ],
    ids=lambda step: step.name,
)
def test_what_is_rounded_is_not_decomposed_or_cut(model, step):
    with pytest.raises(
        ValueError, match=rf"{step.name}: layers/0/\w+/\w+/kernel is stored as quantized already; start"
    ):
        step.plan(fc.Quantize(bits=4).plan(model.config))


def test_rounding_passes_over_what_is_rounded(model):
    first = fc.Quantize(pattern="embedding/.*", bits=8).plan(model.config)
    both = fc.Quantize(bits=4).plan(first)
    assert both.format_rule("embedding/token")["bits"] == 8
    assert both.format_rule("layers/0/attention/key/kernel")["bits"] == 4


def test_a_model_of_images_is_compressed_without_text(viewer, tmp_path):
    recipe = fc.Recipe([fc.LowRank(".*/up/kernel", rank=8, whitening="none"), fc.Quantize(rounding="mse")])
    small, report = fc.compress(viewer, recipe, key=jax.random.key(0), work=tmp_path / "work")
    assert small.nbytes < viewer.nbytes / 3 and report.fidelity is None
    again, _ = fc.compress(viewer, recipe, key=jax.random.key(0), work=tmp_path / "work")  # with a step of before
    pixels = np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype("f")
    np.testing.assert_array_equal(small(pixel_values=pixels).logits, again(pixel_values=pixels).logits)


@pytest.mark.parametrize("step", [fc.Quantize(), fc.LowRank(".*/up/kernel", rank=4), fc.Heal(steps=1)])
def test_steps_that_need_text_refuse_a_model_of_images(viewer, step):
    with pytest.raises(ValueError, match=f"{step.name}: .* model of images; set rounding: mse"):
        fc.compress(viewer, fc.Recipe([step]), key=jax.random.key(0))


def test_text_for_a_model_of_images_is_refused(viewer, sentences):
    recipe = fc.Recipe([fc.Quantize(rounding="mse")])
    with pytest.raises(ValueError, match="images cannot be calibrated on text"):
        fc.compress(viewer, recipe, calibration=sentences, key=jax.random.key(0))


def test_a_model_without_tokenizer_is_refused(model):
    bare = model.replace(assets=fc.Assets(max_length=32))
    with pytest.raises(ValueError, match="no tokenizer"):
        fc.compress(bare, fc.Recipe([fc.Quantize()]), calibration=["a b c"] * 50, key=jax.random.key(0))

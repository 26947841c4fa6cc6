"""ViT against transformers: random configs, images of other sizes, the folder in PyTorch."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from quick import quick

import flaxcompress as fc
from flaxcompress.export.torch import check_folder
from flaxcompress.families import FAMILIES
from flaxcompress.model import abstract_flat
from flaxcompress.nn.image_embedding import cubic_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import family_cases as families  # noqa: E402

CLASSES = {"none": "ViTModel", "sequence_classification": "ViTForImageClassification"}


def drawn(head, number, folder):
    """(transformers' model, random generator), the model saved, in shards for odd numbers."""
    rng = np.random.default_rng([number, len(head)])
    print(f"vit {head}: seed {[number, len(head)]}")
    base, size = families.encoder(rng), int(rng.integers(2, 5))
    config = transformers.ViTConfig(
        **{k: base[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
        hidden_act=base["hidden_act"],
        layer_norm_eps=base["layer_norm_eps"],
        image_size=size * int(rng.integers(2, 5)) + int(rng.integers(0, 2)),
        patch_size=size,
        num_channels=int(rng.integers(1, 4)),
        qkv_bias=bool(rng.integers(2)),
        pooler_output_size=base["hidden_size"],
        num_labels=int(rng.integers(2, 6)),
    )
    network = families.perturbed(getattr(transformers, CLASSES[head])(config), number)
    network.save_pretrained(folder, max_shard_size="8KB" if number % 2 else "1GB")
    return network, rng


def images(config, rng, height=None, width=None):
    return rng.normal(size=(2, config.num_channels, height or config.image_size, width or config.image_size)).astype(
        "f"
    )


@pytest.mark.parametrize("number", quick(range(5), [1]))
@pytest.mark.parametrize("head", CLASSES)
def test_outputs_equal_those_of_transformers(head, number, tmp_path):
    network, rng = drawn(head, number, tmp_path)
    model, pixels = fc.load(tmp_path), images(network.config, rng)
    with torch.no_grad():
        want = network(pixel_values=torch.tensor(pixels), output_hidden_states=True)
    got = model(pixel_values=pixels, output_hidden_states=True)
    for ours, theirs in zip(got.hidden_states[:-1], want.hidden_states, strict=False):
        families.close(ours, theirs)
    if head == "none":
        families.close(got.last_hidden_state, want.last_hidden_state)
        families.close(got.pooled, want.pooler_output)
    else:
        families.close(got.logits, want.logits)


@pytest.mark.parametrize("number", quick(range(3), [0]))
def test_positions_stretch_to_other_sizes(number, tmp_path):
    network, rng = drawn("none", number, tmp_path)
    size = network.config.patch_size
    pixels = images(network.config, rng, size * 5 + 1, size * 2)
    with torch.no_grad():
        want = network(pixel_values=torch.tensor(pixels), interpolate_pos_encoding=True)
    families.close(fc.load(tmp_path)(pixels).last_hidden_state, want.last_hidden_state)


@pytest.mark.parametrize(("size", "new"), [(3, 7), (7, 3), (1, 4), (5, 5)])
def test_cubic_weights_are_those_of_pytorch(size, new):
    line = np.random.default_rng(size).normal(size=size)
    image = torch.tensor(np.tile(line, (1, 1, 4, 1)))
    want = torch.nn.functional.interpolate(image, (4, new), mode="bicubic", align_corners=False)[0, 0, 0]
    np.testing.assert_allclose(cubic_weights(size, new) @ line, want, atol=1e-12)


@pytest.mark.parametrize("head", quick(CLASSES, ["sequence_classification"]))
def test_a_round_trip_gives_identical_tensors(head, tmp_path):
    network, _ = drawn(head, 1, tmp_path / "theirs")
    model = fc.load(tmp_path / "theirs")
    fc.export(model, tmp_path / "ours", format="torch-dense")
    again = type(network).from_pretrained(tmp_path / "ours").state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(again[name], tensor), name
    names, flat = FAMILIES["vit"].names(model.config), abstract_flat(model.config)
    assert set(names) == set(flat)
    counted = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(flat))
    assert counted == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("head", quick(CLASSES, ["sequence_classification"]))
def test_a_saved_folder_computes_the_same_in_pytorch(head, tmp_path):
    network, rng = drawn(head, 2, tmp_path / "theirs")
    model = fc.load(tmp_path / "theirs")
    fc.save(model, tmp_path / "ours")
    assert fc.load(tmp_path / "ours").config == model.config
    fc.export(model, tmp_path / "dense", format="torch-dense")
    assert all(check_folder(model, tmp_path / name) <= 1e-4 for name in ("ours", "dense"))
    auto = transformers.AutoModel if head == "none" else transformers.AutoModelForImageClassification
    again = auto.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    for height in (None, network.config.patch_size * 6):
        pixels = images(network.config, rng, height)
        with torch.no_grad():
            got = again(pixel_values=torch.tensor(pixels))
        want = model(pixels)
        if head == "none":
            families.close(got.last_hidden_state, want.last_hidden_state)
        else:
            families.close(got.logits, want.logits)


def test_wrong_images_are_refused(tmp_path):
    network, rng = drawn("none", 0, tmp_path)
    model, pixels = fc.load(tmp_path), images(network.config, rng)
    for wrong in (pixels[0], pixels[:, :0], pixels[..., :1], pixels.astype(int), None):
        with pytest.raises(ValueError, match="pixel_values"):
            model(wrong)
    with pytest.raises(ValueError, match="nothing else"):
        model(pixels, np.ones((2, 3)))

"""Statistics of a model on text: against gradients taken token by token, kept in files, and cut over a mesh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_steps import CONFIG, context, text, tiny

from flaxcompress import tree
from flaxcompress.compress import Calibration, LowRank, statistics
from flaxcompress.config import ModelConfig, Rotary, Sharing
from flaxcompress.model import Model, init_params
from flaxcompress.text import Pooling

DECODER = ModelConfig(
    family="llama",
    vocabulary=50,
    width=16,
    layers=3,
    heads=4,
    key_value_heads=2,
    feed_forward_width=24,
    positions=16,
    segments=0,
    gated=True,
    norm="rms",
    norm_place="pre",
    final_norm=True,
    embedding_norm=False,
    position_embedding="none",
    rotary=Rotary(),
    causal=True,
    pooler=False,
    head="causal_lm",
    attention_bias=True,
    dropout=0.0,
    attention_dropout=0.0,
    initializer_range=0.3,
)
SHARED = CONFIG.replace(sharing=Sharing(attention=(0, 0), feed_forward=(0, 1), norms=(0, 1)), initializer_range=0.3)
KEY = jax.random.key(3)


def random_model(config: ModelConfig) -> Model:
    return Model(params=init_params(config, KEY), config=config, assets=tiny().assets)


def one_text(config: ModelConfig):
    ids = np.random.default_rng(0).integers(5, config.vocabulary, (1, 7)).astype(np.int32)
    mask = np.ones((1, 8), bool)
    mask[:, -1] = False  # padding answers nothing
    return np.pad(ids, ((0, 0), (0, 1))), mask


def gradients_by_token(model: Model, ids, mask) -> dict[str, np.ndarray]:
    """{linear map: [uses, T, m]}: biases with a row for each token and layer, in a model that shares nothing."""
    config, view = model.config, tree.View(model.params)
    own = config.unshared()
    flat = {}
    for address in tree.flatten(init_params(own, KEY)):
        if (at := tree.place(address)) is None:
            flat[address] = view[address]
        else:
            number = getattr(config.sharing, at.part)[at.number]
            node = view[at._replace(number=number).address]
            is_bias = address.endswith("/bias") and at.part in ("attention", "feed_forward")
            flat[address] = jnp.broadcast_to(node, (ids.shape[1], len(node))) if is_bias else node
    key = jax.random.fold_in(jax.random.key(0), 0)

    def answer(params):
        return statistics.answer(params, ids, mask, key, own, jnp.float32, Pooling("mean", True))

    found = tree.flatten(jax.jit(jax.grad(answer))(tree.unflatten(flat)))
    out: dict[str, list] = {}
    for address, gradient in found.items():
        at = tree.place(address)
        if at is not None and gradient.ndim == 2 and address.endswith("/bias"):
            shared = at._replace(number=getattr(config.sharing, at.part)[at.number]).address
            out.setdefault(shared.removesuffix("/bias"), []).append(np.asarray(gradient, np.float64))
    return {address: np.stack(parts) for address, parts in out.items()}


@pytest.mark.parametrize("config", [SHARED, DECODER], ids=["encoder", "decoder"])
def test_gradient_moments_are_sums_over_tokens(config):
    model = random_model(config)
    ids, mask = one_text(config)
    by_token = gradients_by_token(model, ids, mask)
    assert any("query" in a for a in by_token) and any("down" in a for a in by_token)
    found = statistics.gradient_moments(model, [(ids, mask)])
    kernels = tree.select(tree.View(model.params), "layers/.*/kernel")
    assert set(by_token) <= set(found) == {address.removesuffix("/kernel") for address in kernels}
    for address, gradients in by_token.items():
        want = np.einsum("utm,utn->mn", gradients, gradients) / mask.sum()
        # float32 gradients that went through the layers' sums in another order
        np.testing.assert_allclose(found[address], want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_a_causal_models_fisher_is_that_of_its_own_answers():
    """E[∇log p] is 0 under labels drawn from the model, so that over many draws the mean gradient vanishes."""
    model = random_model(DECODER)
    ids, mask = one_text(DECODER)

    @jax.jit
    def bias_gradient(key):
        def answer(scale):
            params = {**model.params, "final_norm": {"scale": scale}}
            return statistics.answer(params, ids, mask, key, DECODER, jnp.float32, Pooling())

        return jax.grad(answer)(model.params["final_norm"]["scale"])

    draws = np.stack([np.asarray(bias_gradient(jax.random.key(i))) for i in range(400)])
    spread = draws.std(0) / np.sqrt(len(draws))
    assert spread.min() > 0 and np.abs(draws.mean(0) / spread).max() < 5  # five deviations of the mean


def test_influence_is_one_minus_the_cosine_of_neighbouring_states():
    model = random_model(DECODER)
    ids, mask = one_text(DECODER)
    states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    states = np.asarray(jnp.stack(states) if isinstance(states, tuple) else states, np.float64)[:, 0, mask[0]]
    sizes = np.linalg.norm(states, axis=-1)
    cosines = (states[:-1] * states[1:]).sum(-1) / (sizes[:-1] * sizes[1:])
    found = statistics.influence(model, [(ids, mask)])
    # The model's last state is normalised at the end; what the last layer does is not.
    np.testing.assert_allclose(found[:-1], 1 - cosines.mean(1)[:-1], rtol=0, atol=1e-5)
    assert found.shape == (3,) and found[-1] > 0


def test_moments_of_layers_in_different_formats():
    """Layers that no scan can run together: the moments are those of the same weights, dense."""
    mixed = LowRank("layers/0/attention/query/kernel", rank=4, whitening="none")(tiny(), context(), key=KEY)
    own = Calibration(text(), tiny().assets, vocabulary=200)
    want, got = own.input_moments(statistics.dense_model(mixed)), own.input_moments(mixed)
    assert want.keys() == got.keys()
    for address in want:
        # float32 products in another order, over at most 32 terms
        np.testing.assert_allclose(got[address], want[address], rtol=0, atol=1e-5 * np.abs(want[address]).max())


def test_norms_are_the_channels_root_mean_squares():
    own = Calibration(text(), tiny().assets, vocabulary=200)
    moments, norms = own.input_moments(tiny()), own.norms(tiny())
    for address, norm in norms.items():
        np.testing.assert_allclose(norm**2, np.diagonal(moments[address]), rtol=1e-6)


def kept(folder):
    return Calibration(text(), tiny().assets, vocabulary=200, folder=folder)


def test_kept_statistics_are_read_and_not_measured(tmp_path, monkeypatch):
    folder = tmp_path / "statistics"
    first = {name: getattr(kept(folder), name)(tiny()) for name in ("input_moments", "fisher", "influence")}
    size = len(list(folder.iterdir()))
    assert size == 3
    for name in first:
        monkeypatch.setattr(statistics, name, None)
    for name, want in first.items():
        jax.tree.map(np.testing.assert_array_equal, getattr(kept(folder), name)(tiny()), want)
    again = kept(folder).input_moments(tiny())
    query, key = (f"layers/0/attention/{name}" for name in ("query", "key"))
    assert again[query] is again[key]  # one array, as it was


def test_kept_statistics_of_another_model_or_text_are_not_taken(tmp_path):
    kept(tmp_path).influence(tiny())
    changed = tiny().replace(params=jax.tree.map(lambda leaf: leaf * 1.1, tiny().params))
    assert np.abs(kept(tmp_path).influence(changed) - kept(tmp_path).influence(tiny())).max() > 1e-4
    other = Calibration(text(), tiny().assets, vocabulary=200, folder=tmp_path, max_length=5)
    other.influence(tiny())
    assert len(list(tmp_path.iterdir())) == 3


def test_damaged_kept_statistics_are_measured_again(tmp_path, caplog):
    want = kept(tmp_path).influence(tiny())
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-3])
    np.testing.assert_array_equal(kept(tmp_path).influence(tiny()), want)
    assert "measuring again" in caplog.text
    caplog.clear()
    np.testing.assert_array_equal(kept(tmp_path).influence(tiny()), want)
    assert not caplog.text


def test_statistics_that_cannot_be_kept_are_returned(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    own = Calibration(text(), tiny().assets, vocabulary=200, folder=tmp_path / "file")
    assert own.influence(tiny()).shape == (2,) and "could not be kept" in caplog.text


_ON_MESH = """
    import json, sys
    import numpy as np
    sys.path.insert(0, sys.argv[1])
    from test_steps import text, tiny
    from flaxcompress.compress import Calibration
    from flaxcompress.train.mesh import make_mesh

    plain = Calibration(text(), tiny().assets, vocabulary=200)
    cut = Calibration(text(), tiny().assets, vocabulary=200, mesh=make_mesh(data=8))
    found = {}
    for name in ("input_moments", "influence", "gradient_moments"):
        want, got = (getattr(c, name)(tiny()) for c in (plain, cut))
        want, got = (v if isinstance(v, dict) else {"": v} for v in (want, got))
        assert want.keys() == got.keys()
        found[name] = max(float(np.abs(got[a] - want[a]).max() / np.abs(want[a]).max()) for a in want)
    print(json.dumps(found))
"""


def test_a_mesh_sums_the_same_statistics():
    """16 texts a batch on one device and on 8 with two each; the same batches, so the same drawn answers."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    here = Path(__file__).parent
    paths = [str(here.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-c", textwrap.dedent(_ON_MESH), str(here)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert set(found) == {"input_moments", "influence", "gradient_moments"}
    assert max(found.values()) <= 1e-5, found

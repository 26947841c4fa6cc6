"""What calibration text says about a model: moments of inputs and of output gradients, Fisher information, influence.

Gradients are those of the model's answer to a text, drawn at random so that their second moments are a Gauss-Newton
matrix. A sentence encoder's answer is its vector v: with r standard normal, E[∇(r·v)∇(r·v)ᵀ] = JᵀJ, the matrix of
‖v - v*‖²/2. A causal model's are its next tokens: with labels drawn from the model, E[∇log p ∇log pᵀ] is the Fisher
matrix, that of the divergence KL(p‖p*) (Martens 2020, §5).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flaxcompress import tree
from flaxcompress.config import ModelConfig
from flaxcompress.encoding import compute_dtype, pool
from flaxcompress.formats import dense, take
from flaxcompress.model import Model
from flaxcompress.nn import GRADIENT_MOMENT
from flaxcompress.nn.bases import BASES, Whole, merge_bases
from flaxcompress.nn.transformer import run
from flaxcompress.progress import progress_bar
from flaxcompress.text import Pooling

Batch = tuple[Any, Any]  # ids [B, T] int32, mask [B, T] bool

# Linear maps that read the input of another one.
_SAME_INPUT = {
    "attention/key": "attention/query",
    "attention/value": "attention/query",
    "feed_forward/gate": "feed_forward/up",
}


def dense_model(model: Model) -> Model:
    """The same function with every matrix dense float32."""
    config, params = merge_bases(model.config, model.params)
    params = tree.update(params, lambda _, node: dense(node))
    return model.replace(params=params, config=config.replace(formats=()))  # pyright: ignore[reportAttributeAccessIssue]


def same_input(config: ModelConfig) -> dict[str, str]:
    """{linear map: the one whose input it reads}."""
    return {m: read for m, read in _SAME_INPUT.items() if not (config.projection_kernel and m.startswith("attention/"))}


def moments_of(inputs: Mapping[str, Any], mask: Any, same: Mapping[str, str] = _SAME_INPUT) -> dict[str, Any]:
    """{part/linear: Σ xᵀx over the tokens that `mask` allows}; maps that read one input share one entry."""
    out = {}
    for part, linears in inputs.items():
        for name, kept in linears.items():
            if f"{part}/{name}" in same:
                continue
            x = kept["x"].astype(jnp.float32)
            x = (x * mask[..., None]).reshape(-1, x.shape[-1])
            out[f"{part}/{name}"] = jax.lax.dot(x.T, x, precision=jax.lax.Precision.HIGHEST)
    return out


def input_moments(model: Model, batches: Sequence[Batch], *, progress: bool = False) -> dict[str, np.ndarray]:
    """{address of a linear map: C = E[xᵀx], [n, n] float32} over the real tokens.

    The maps of one layer that read the same input share one array. A shared weight set sums over its uses.
    """
    config = model.config
    total, tokens = None, 0
    with progress_bar("statistics", len(batches), show=progress) as advance:
        for ids, mask in batches:
            recorded = _batch_moments(model.params, ids, mask, config, compute_dtype())
            found = {int(first): parts for first, parts in recorded}  # the first layer of each segment is no sum
            total = found if total is None else jax.tree.map(jnp.add, total, found)
            tokens += int(mask.sum())
            advance()
    assert total is not None
    moments: dict[str, Any] = {}
    for first, parts in total.items():
        for name, stacked in parts.items():
            for i in range(stacked.shape[0]):
                part, linear = name.split("/")
                number = getattr(config.sharing, part)[first + i]
                address = f"layers/{number}/{part}/{linear}"
                value = np.asarray(stacked[i]) / tokens
                moments[address] = moments[address] + value if address in moments else value
    for address in tree.select(Whole(config, tree.View(model.params)), r"layers/.*/kernel"):
        *layer, part, linear, _ = address.split("/")
        if read := same_input(config).get(f"{part}/{linear}"):
            moments["/".join([*layer, part, linear])] = moments["/".join([*layer, read])]
    return moments


@functools.partial(jax.jit, static_argnums=(3, 4))
def _batch_moments(params, ids, mask, config: ModelConfig, dtype):
    record = functools.partial(moments_of, same=same_input(config))
    return run(params, config, dtype, ids, mask, need_logits=False, record=record).recorded


def answer(
    params: Any, ids: Any, mask: Any, key: jax.Array, config: ModelConfig, dtype: Any, pooling: Pooling, **more: Any
) -> Float[Array, ""]:
    """The drawn answer whose gradients count, summed over a batch: log p of drawn tokens, or r·v (see above)."""
    if config.head == "causal_lm":
        logits = run(params, config, dtype, ids, mask, **more).logits.astype(jnp.float32)
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], axis=-1)[..., 0]
        return (chosen * mask).sum()
    out = run(params, config, dtype, ids, mask, need_logits=False, **more)
    vectors = pool(out.last_hidden_state, mask, pooling)
    return (vectors * jax.random.normal(key, vectors.shape)).sum()


def _answers(model: Model, batches: Sequence[Batch], gradient, label: str, progress: bool) -> tuple[Any, int]:
    """The sum of `gradient(params, ids, mask, key, config, dtype, pooling)` over batches, and how many real tokens."""
    pooling = model.assets.pooling or Pooling()
    total, tokens = None, 0
    with progress_bar(label, len(batches), show=progress) as advance:
        for number, (ids, mask) in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(0), number)
            found = gradient(model.params, ids, mask, key, model.config, compute_dtype(), pooling)
            total = found if total is None else jax.tree.map(jnp.add, total, found)
            tokens += int(mask.sum())
            advance()
    assert total is not None
    return total, tokens


def fisher(model: Model, batches: Sequence[Batch], *, progress: bool = False) -> dict[str, np.ndarray]:
    """{address of a matrix: expected squared gradient of a batch's answer, in its shape}."""
    total, _ = _answers(dense_model(model), batches, _squared_gradient, "gradients", progress)
    return {address: np.asarray(node) / len(batches) for address, node in tree.flatten(total).items()}


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _squared_gradient(params, ids, mask, key, config: ModelConfig, dtype, pooling: Pooling):
    return jax.tree.map(jnp.square, jax.grad(answer)(params, ids, mask, key, config, dtype, pooling))


def gradient_moments(model: Model, batches: Sequence[Batch], *, progress: bool = False) -> dict[str, np.ndarray]:
    """{address of a linear map: G = E[gᵀg], [m, m] float32}, g the answer's gradient at the map's output, per token.

    With C = E[xᵀx] of its input, a change Δ of the kernel costs about tr(ΔᵀCΔG)/2 per token: the Kronecker-factored
    Gauss-Newton matrix (K-FAC, Martens & Grosse 2015), which takes a token's input and gradient as independent.
    """
    total, tokens = _answers(model, batches, _output_gradients, "gradients", progress)
    found: dict[str, np.ndarray] = {}
    for (part, run_name, path), stacked in total.items():
        for i, moment in enumerate(np.asarray(stacked)):
            found[f"layers/{int(run_name) + i}/{part}/{path}"] = moment / tokens
    return found


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _output_gradients(params, ids, mask, key, config: ModelConfig, dtype, pooling: Pooling):
    def tapped(zeros):
        return answer(_with_taps(params, zeros), ids, mask, key, config, dtype, pooling)

    return jax.grad(tapped)(_taps(params))


def _taps(params: Any) -> dict[tuple[str, str, str], Float[Array, "S m m"]]:
    """{(part, run, path of a linear map): zeros for each of the run's weight sets}."""
    found = {}
    for part, runs in params["layers"].items():
        for name, stacked in runs.items() if part != BASES else ():
            sets = tree.run_length(stacked)
            for path, node in tree.walk(stacked, ""):
                if path.endswith("/kernel"):
                    found[part, name, path.removesuffix("/kernel")] = jnp.zeros((sets, *[node.shape[-1]] * 2))
    return found


def _with_taps(params: Any, zeros: Mapping[tuple[str, str, str], Any]) -> Any:
    """The parameters with zeros beside the kernels."""
    copied = lambda stacked: tree.nest(dict(tree.walk(stacked, "")))  # noqa: E731
    layers = {part: {name: copied(run) for name, run in runs.items()} for part, runs in params["layers"].items()}
    for (part, name, path), zero in zeros.items():
        here = layers[part][name]
        for step in path.split("/"):
            here = here[step]
        here[GRADIENT_MOMENT] = zero
    return {**params, "layers": layers}


def token_gradient_moment(model: Model, batches: Sequence[Batch]) -> Float[np.ndarray, "D D"]:
    """G = E[gᵀg], g the answer's gradient with respect to a token's vector.

    An error e in a token's vector then costs about e·G·eᵀ: the metric in which a table should be approximated.
    """
    total, tokens = _answers(model, batches, _token_gradients, "gradients", False)
    return np.asarray(total, np.float64) / tokens


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _token_gradients(params, ids, mask, key, config: ModelConfig, dtype, pooling: Pooling):
    def answered(vectors):
        return answer(params, ids, mask, key, config, dtype, pooling, vectors=vectors)

    g = jax.grad(answered)(take(params["embedding"]["token"], ids))
    g = (g * mask[..., None]).reshape(-1, g.shape[-1])
    return jax.lax.dot(g.T, g, precision=jax.lax.Precision.HIGHEST)


def head_moment(model: Model, batches: Sequence[Batch]) -> Float[np.ndarray, "E E"]:
    """C = E[hᵀh] of the vectors that a head tied to the token table multiplies by it, logits = h @ tableᵀ.

    An error e in a token's row costs e·C·eᵀ in its logit, squared.
    """
    total, tokens = 0.0, 0
    for ids, mask in batches:
        total = total + _multiplied(model.params, ids, mask, model.config, compute_dtype())
        tokens += int(mask.sum())
    return np.asarray(total, np.float64) / tokens


@functools.partial(jax.jit, static_argnums=(3, 4))
def _multiplied(params, ids, mask, config: ModelConfig, dtype) -> Float[Array, "E E"]:
    """Σ hᵀh, h being the logits of the same model with the identity for a table."""
    vectors, width = take(params["embedding"]["token"], ids), config.table_width
    head = {name: jnp.zeros(width) if name == "bias" else part for name, part in params.get("head", {}).items()}
    embedding = {**params["embedding"], "token": jnp.eye(width)}
    params = {**params, "embedding": embedding, **({"head": head} if head else {})}
    logits = run(params, config.replace(vocabulary=width), dtype, ids, mask, vectors=vectors).logits
    h = logits.masked_lm if config.head == "pretraining" else logits
    h = (h * mask[..., None]).reshape(-1, width)
    return jax.lax.dot(h.T, h, precision=jax.lax.Precision.HIGHEST)


def influence(model: Model, batches: Sequence[Batch]) -> Float[np.ndarray, " L"]:
    """Block influence by layer: 1 - E[cos(h_l, h_{l+1})] over the real tokens (ShortGPT, Men et al. 2024, eq. 1)."""
    total, tokens = 0.0, 0
    for ids, mask in batches:
        total = total + _cosines(model.params, ids, mask, model.config, compute_dtype())
        tokens += int(mask.sum())
    return 1.0 - np.asarray(total, np.float64) / tokens


@functools.partial(jax.jit, static_argnums=(3, 4))
def _cosines(params, ids, mask, config: ModelConfig, dtype) -> Float[Array, " L"]:
    config = config.replace(final_norm=False)  # the last state as the last layer leaves it
    out = run(params, config, dtype, ids, mask, need_logits=False, need_hidden_states=True)
    states = out.hidden_states.astype(jnp.float32)
    before, after = states[:-1], states[1:]
    sizes = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
    cosines = (before * after).sum(-1) / jnp.maximum(sizes, 1e-12)
    return (cosines * mask).sum((1, 2))

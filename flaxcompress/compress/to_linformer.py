"""Full attention turned into Linformer attention, linear in the length of the sequence."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flaxcompress import tree
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.config import Linformer, ModelConfig
from flaxcompress.encoding import compute_dtype, lookup
from flaxcompress.formats import dense
from flaxcompress.model import Model, abstract_flat
from flaxcompress.nn import Transformer
from flaxcompress.nn.attention import Attention
from flaxcompress.nn.transformer import first_input
from flaxcompress.ops import attention_probabilities, project_places

_SEEN = "seen"  # the collection in which `_Watched` leaves its parts


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToLinformer(Step):
    """Turns an encoder's attention into Linformer's (Wang et al. 2020): keys and values projected from S places to k.

    Keys of place s go to slot s mod k (see `interleaved`), so that a sequence of exactly k tokens keeps every key; the
    projection of values is then the one by which the layers' outputs on calibration text come closest to those of full
    attention, a linear least-squares problem. Principal components over the places are no start: where their signs
    differ, the softmax sees keys that no token has. Heal the model afterwards, on sequences as long as it will see.

    Attributes:
      length: k.
      sharing: whether a layer's heads "head" share a projection of keys and one of values, or "none".
      sentences: of the calibration text, to fit the values' projections to.
      iterations: of conjugate gradients.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})

    length: int
    sharing: Literal["head", "none"] = "head"
    sentences: int = 64
    iterations: int = 50

    def plan(self, config: ModelConfig) -> ModelConfig:
        if config.attention is not None or config.decoder is not None:
            found = "a decoder" if config.attention is None else f"{config.attention.kind} attention"
            raise ValueError(f"ToLinformer: only encoders with full attention can be turned; this model has {found}")
        planned = config.replace(attention=Linformer(length=self.length, sharing=self.sharing))
        rule = {"kind": "dense", "dtype": "float32"}
        for address in abstract_flat(planned):  # rules for tables are not meant for these
            if address.endswith("sequence/table") and planned.format_rule(address) is not None:
                planned = planned.with_format(address, rule)
        return planned

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        del key
        config, planned = model.config, self.plan(model.config)
        batches = context.need(self).batches(self.sentences, pad=config.pad_token)
        inputs = [_attention_inputs(model, *(part[:, : config.positions] for part in batch)) for batch in batches]
        heads = config.groups if self.sharing == "none" else 1
        start = np.broadcast_to(interleaved(config.positions, self.length), (heads, config.positions, self.length))
        changes = {}
        for number in range(config.sharing.sets("attention")):
            params = _weights(model, number)
            uses = [layer for layer, used in enumerate(config.sharing.attention) if used == number]
            parts = [_fit_parts(config, params, x[layer], shared, start) for x, shared in inputs for layer in uses]
            values = fit_values(parts, start, iterations=self.iterations)
            address = f"layers/{number}/attention"
            for name, table in (("key", start), ("value", values)):
                flat = np.swapaxes(table, 0, 1).reshape(config.positions, -1)  # [n, h·k]
                changes[f"{address}/{name}_sequence/table"] = jnp.asarray(flat, jnp.float32)
        return Model(params=tree.replace(model.params, changes), config=planned, assets=model.assets)


class Parts(NamedTuple):
    """What the values' projection is fitted to, of one batch; heads are grouped by the projection that they use.

    Attributes:
      probabilities: of every token over the k slots of projected keys; zeros for padding.
      values: zeros for padding.
      outputs: what full attention takes from the values.
    """

    probabilities: Float[np.ndarray, "B G h T k"]
    values: Float[np.ndarray, "B G h S d"]
    outputs: Float[np.ndarray, "B G h T d"]


def interleaved(places: int, length: int) -> Float[np.ndarray, "n k"]:
    """A projection in which place s goes to slot s mod k, by 1/(1 + ⌊s/k⌋): those that come later count less."""
    out, place = np.zeros((places, length)), np.arange(places)
    out[place, place % length] = 1.0 / (1 + place // length)
    return out


def fit_values(parts: list[Parts], start: Float[np.ndarray, "G n k"], *, iterations: int) -> Float[np.ndarray, "G n k"]:
    """The projections F of least Σ‖P·Fᵀ·V - Y‖², by conjugate gradients from `start`, whose unseen places stay.

    P are the probabilities, V the values and Y the outputs of `parts`.
    """

    def back(sums: Any, values: Any) -> Any:
        return np.einsum("bghkd,bghsd->gsk", sums, values, optimize=True)

    def place(part: np.ndarray) -> np.ndarray:
        return np.pad(part, ((0, 0), (0, start.shape[1] - part.shape[1]), (0, 0)))

    def normal(x: np.ndarray) -> np.ndarray:
        total = np.zeros(start.shape)
        for (_, values, _), gram in zip(parts, grams, strict=True):
            projected = np.einsum("gsk,bghsd->bghkd", x[:, : values.shape[3]], values, optimize=True)
            total += place(back(gram @ projected, values))
        return total

    grams = [p.swapaxes(-1, -2) @ p for p, _, _ in parts]
    found = np.array(start, np.float64)
    wanted = sum(place(back(p.swapaxes(-1, -2) @ y, v)) for p, v, y in parts)
    rest = wanted - normal(found)
    direction, size = rest.copy(), float((rest**2).sum())
    first = size
    for _ in range(iterations):
        if size <= 1e-20 * first:
            break
        bent = normal(direction)
        step = size / float((direction * bent).sum())
        found, rest = found + step * direction, rest - step * bent
        size, before = float((rest**2).sum()), size
        direction = rest + size / before * direction
    return found


class _Watched(Attention):
    """Attention that also leaves its queries, keys, values and what tokens take from them."""

    def mix(self, query, key, value, context, **need):
        y, probabilities = super().mix(query, key, value, context, **need)
        self.sow(_SEEN, "parts", (query, key, value, y))
        return y, probabilities


def _attention_inputs(model: Model, ids: np.ndarray, mask: np.ndarray) -> tuple[list[jax.Array], Any]:
    """What each layer's attention reads, and what all layers see beside it."""
    vectors = lookup(model.params["embedding"]["token"], ids.reshape(-1)).reshape(*ids.shape, -1)
    given, dtype = (jnp.asarray(ids), jnp.asarray(mask)), compute_dtype()
    _, shared = first_input(model.params, given[0], model.config.replace(formats=()), dtype, given[1], vectors)
    segments = _recorded(model.params, *given, model.config, dtype)
    return [x for _, stacked in segments for x in stacked], shared


@functools.partial(jax.jit, static_argnums=(3, 4))
def _recorded(params: Any, ids: jax.Array, mask: jax.Array, config: ModelConfig, dtype: Any) -> Any:
    record = lambda inputs, _: inputs["attention"]["query"]["x"]  # noqa: E731
    out: Any = Transformer(config, dtype).apply({"params": params}, ids, mask, need_logits=False, record=record)
    return out.recorded


def _weights(model: Model, number: int) -> Any:
    prefix, view = f"layers/{number}/attention/", tree.View(model.params)
    return tree.nest({a.removeprefix(prefix): dense(view[a]) for a in view if a.startswith(prefix)})


def _fit_parts(config: ModelConfig, params: Any, x: jax.Array, shared: Any, keys: np.ndarray) -> Parts:
    """The parts of one weight set on one batch, with its keys projected."""
    probabilities, value, y = _watch(config.replace(formats=()), params, x, shared, jnp.asarray(keys, jnp.float32))
    groups, real = len(keys), np.asarray(shared.real)[:, None, :, None]

    def grouped(part: Any) -> np.ndarray:  # [B, H, T, ·] -> [B, G, h, T, ·]
        known = np.asarray(part, np.float64) * real
        return known.reshape(len(known), groups, -1, *known.shape[2:])

    value = np.repeat(np.asarray(value), config.heads // config.groups, 2)
    return Parts(grouped(probabilities), grouped(value.swapaxes(1, 2)), grouped(np.asarray(y).swapaxes(1, 2)))


@functools.partial(jax.jit, static_argnums=0)
def _watch(config: ModelConfig, params: Any, x: jax.Array, shared: Any, keys: jax.Array) -> Any:
    """(probabilities over projected keys [B, H, T, k], values [B, S, K, d], outputs [B, T, H, d])."""
    found: Any = _Watched(config, "").apply({"params": params}, x, shared, mutable=[_SEEN])
    query, key, value, y = found[1][_SEEN]["parts"][0]
    rows = keys.swapaxes(0, 1)[: x.shape[1]]  # [S, h, k]
    projected = project_places(key, rows, shared.real)
    return attention_probabilities(query, projected, None, None, scale=config.attention_scale), value, y

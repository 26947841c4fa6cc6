"""Calibration batches walked through a model layer by layer, its weights exchanged ahead of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flaxcompress import tree
from flaxcompress.compress.statistics import Batch, moments_of, same_input
from flaxcompress.config import ModelConfig, Sets
from flaxcompress.encoding import compute_dtype, lookup
from flaxcompress.formats import dense
from flaxcompress.model import Model
from flaxcompress.nn import INPUTS, Context, Layer
from flaxcompress.nn.attention_kinds import attention_kind
from flaxcompress.nn.deltas import layer_variables
from flaxcompress.nn.transformer import first_input
from flaxcompress.progress import progress_bar

_Linear = tuple[str, str]  # part and name of a linear map


def stages_of(config: ModelConfig) -> list[tuple[_Linear, ...]]:
    """What one layer computes, in order; the linear maps of a stage read the same input."""
    into = (("feed_forward", "up"), ("feed_forward", "gate")) if config.gated else (("feed_forward", "up"),)
    return [
        *(tuple(("attention", name) for name in stage) for stage in attention_kind(config).stages(config)),
        into,
        (("feed_forward", "down"),),
    ]


class Stage(NamedTuple):
    """Kernels that read one input, at their weight set's first use.

    Attributes:
      layer: which layer.
      addresses: the kernels.
      moments: C = E[xᵀx], [n, n] float32, of the input as it is through the weights exchanged so far.
    """

    layer: int
    addresses: tuple[str, ...]
    moments: Float[Array, "n n"]


class LayerWalk:
    """Walks batches through the layers: every layer is one program, whatever its formats, run on dense weights.

    Attributes:
      exchanged: {address: matrix [n, m] in any format} used in the model's stead; assign to exchange one from here on.
      masks: the batches' masks [B, T].
    """

    def __init__(self, model: Model, batches: list[Batch]):
        self._config = model.config.replace(formats=())  # one structure for all layers
        self._dtype = compute_dtype()
        self._weights = tree.View(model.params)
        self._sliced: dict[str, Any] = {}
        self.exchanged: dict[str, Any] = {}
        self.masks = [jnp.asarray(mask) for _, mask in batches]
        first = [self._first(model, ids, mask) for (ids, _), mask in zip(batches, self.masks, strict=True)]
        self._states, self._contexts = [x for x, _ in first], [context for _, context in first]
        self._tokens = float(sum(mask.sum() for _, mask in batches))

    def _first(self, model: Model, ids: np.ndarray, mask: jax.Array) -> tuple[jax.Array, Context]:
        vectors = lookup(model.params["embedding"]["token"], ids.reshape(-1)).reshape(*ids.shape, -1)
        return first_input(model.params, jnp.asarray(ids), self._config, self._dtype, mask, vectors)

    def stages(self, *, label: str, progress: bool = False) -> Iterator[Stage]:
        """Every stage of every layer in order; what is exchanged at a weight set's first use holds at later ones."""
        seen: set[str] = set()
        with progress_bar(label, self._config.layers, show=progress) as advance:
            for number in range(self._config.layers):
                for stage in stages_of(self._config):
                    addresses = tuple(self._address(number, part, f"{name}/kernel") for part, name in stage)
                    if not seen.issuperset(addresses):
                        seen.update(addresses)
                        yield Stage(number, addresses, self._moments(number, "/".join(stage[0])))
                params = self._params(number)
                for i in range(len(self.masks)):  # one by one, so that only one batch is held twice
                    self._states[i] = self._layer(params, number, i, self._states[i])
                advance()

    def outcome(self, stage: Stage, changes: Mapping[str, Any]) -> list[Float[Array, "B T D"]]:
        """The last layer's output per batch if `changes` were exchanged at this stage; nothing is kept."""
        states = self._states
        for number in range(stage.layer, self._config.layers):
            params = self._params(number, changes)
            states = [self._layer(params, number, i, x) for i, x in enumerate(states)]
        return states

    def kernel(self, address: str) -> Float[Array, "n m"]:
        """The dense matrix at an address, as exchanged."""
        if address in self.exchanged:
            self._sliced.pop(address, None)
            return dense(self.exchanged[address])
        if address not in self._sliced:
            self._sliced[address] = dense(self._weights[address])
        return self._sliced[address]

    def _address(self, layer: int, part: str, rest: str) -> str:
        return f"layers/{getattr(self._config.sharing, part)[layer]}/{part}/{rest}"

    def _params(self, layer: int, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        params: dict[str, Any] = {}
        for part in self._config.sharing.parts:
            prefix = self._address(layer, part, "")
            params[part] = tree.nest(
                {
                    a.removeprefix(prefix): dense(changes[a]) if changes and a in changes else self.kernel(a)
                    for a in self._weights
                    if a.startswith(prefix)
                }
            )
        return params

    def _layer(self, params: Any, layer: int, batch: int, x: jax.Array) -> jax.Array:
        return _run_layer(self._config, self._config.sharing.of_layer(layer), params, x, self._context(batch, layer))

    def _context(self, batch: int, layer: int) -> Context:
        return self._contexts[batch].within(self._config.local[layer])

    def _moments(self, number: int, name: str) -> jax.Array:
        total: Any = 0.0
        params = self._params(number)
        sets = self._config.sharing.of_layer(number)
        for i, x in enumerate(self._states):
            total = total + _layer_moments(self._config, sets, params, x, self._context(i, number), name)
        return total / self._tokens


def _structure(config: ModelConfig, sets: Sets) -> Sets:
    """Sets of a layer of the same structure, so that equal layers share one program."""
    return Sets() if config.first_norm else Sets(norms=min(sets.norms, 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_layer(config: ModelConfig, sets: Sets, params, x, context):
    out: Any = Layer(config, _structure(config, sets)).apply(layer_variables(params), x, context)
    return out.x


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def _layer_moments(config: ModelConfig, sets: Sets, params, x, context, name: str):
    _, recorded = Layer(config, _structure(config, sets)).apply(layer_variables(params), x, context, mutable=[INPUTS])
    return moments_of(recorded[INPUTS], context.real, same_input(config))[name]

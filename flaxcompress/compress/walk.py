"""Calibration batches walked through a model layer by layer, its weights exchanged ahead of them."""

from __future__ import annotations

import functools
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flaxcompress import tree
from flaxcompress.compress.statistics import Batch, moments_of, same_input
from flaxcompress.config import ModelConfig, Sets
from flaxcompress.encoding import compute_dtype
from flaxcompress.formats import dense
from flaxcompress.nn import INPUTS, Context, Layer
from flaxcompress.nn.attention_kinds import attention_kind
from flaxcompress.nn.bases import Whole
from flaxcompress.nn.deltas import layer_variables
from flaxcompress.nn.transformer import first_input
from flaxcompress.progress import progress_bar
from flaxcompress.weights import table_rows

_Linear = tuple[str, str]  # part and name of a linear map
_TOKEN = "embedding/token"
_FIRST = ("embedding/", "relative_bias/", "sequence/")  # what the first layer's input is made of


def stages_of(config: ModelConfig) -> list[tuple[_Linear, ...]]:
    """What one layer computes, in order; the linear maps of a stage read the same input."""
    into = (("feed_forward", "up"), ("feed_forward", "gate")) if config.gated else (("feed_forward", "up"),)
    return [
        *(tuple(("attention", name) for name in stage) for stage in attention_kind(config).stages(config)),
        into,
        (("feed_forward", "down"),),
    ]


def walked_kernels(config: ModelConfig) -> set[str]:
    """The addresses of all kernels that a walk's stages have."""
    sharing, maps = config.sharing, [linear for stage in stages_of(config) for linear in stage]
    return {
        f"layers/{getattr(sharing, part)[layer]}/{part}/{name}/kernel"
        for layer in range(config.layers)
        for part, name in maps
    }


class Stage(NamedTuple):
    """Kernels that read one input, at their weight set's first use.

    Attributes:
      layer: which layer.
      addresses: the kernels.
      moments: C = E[xᵀx], [n, n] float32, of the input as it is through the weights exchanged so far.
      cross: E[xᵀx₀], [n, n], x₀ the input as it is in the original; None in a walk that does not follow it.
    """

    layer: int
    addresses: tuple[str, ...]
    moments: Float[Array, "n n"]
    cross: Float[Array, "n n"] | None = None


class LayerWalk:
    """Walks batches through the layers: every layer is one program, whatever its formats, run on dense weights.

    What a layer takes is let go of when no later layer uses it, so that of weights that are read when they are asked
    for (`flaxcompress.weights`) one layer is held at a time.

    Attributes:
      exchanged: {address: matrix [n, m] in any format} used in the model's stead; assign to exchange one from here on.
      masks: the batches' masks [B, T].

    Args:
      weights: {address: matrix}, of a model in memory (`tree.View`) or of its files.
      follow_original: walk the model as it is beside the exchanged one, for the stages' `cross`: twice the time, and
        twice the memory of a layer's states.
      made: {address: matrix} that an earlier walk exchanged.
      passed: kernels that need no stage.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Any],
        batches: Sequence[Batch],
        *,
        follow_original: bool = False,
        made: Mapping[str, Any] | None = None,
        passed: Container[str] = (),
    ):
        self._config = config.replace(formats=())  # one structure for all layers
        self._dtype = compute_dtype()
        self._weights = Whole(config, weights) if config.sharing.bases else weights
        self._made, self._passed = {} if made is None else made, passed
        self._sliced: dict[str, Any] = {}
        self.exchanged: dict[str, Any] = {}
        self.masks = [jnp.asarray(mask) for _, mask in batches]
        outside = {a: weights[a] for a in weights if a.startswith(_FIRST) and a != _TOKEN}
        first = [self._first(outside, ids, mask) for (ids, _), mask in zip(batches, self.masks, strict=True)]
        self._states, self._contexts = [x for x, _ in first], [context for _, context in first]
        self._originals = list(self._states) if follow_original else None
        self._tokens = float(sum(mask.sum() for _, mask in batches))

    def _first(self, outside: Mapping[str, Any], ids: np.ndarray, mask: jax.Array) -> tuple[jax.Array, Context]:
        rows = table_rows(self._weights, _TOKEN, np.asarray(ids).reshape(-1))
        params = tree.nest({**outside, _TOKEN: rows})  # in the table's place, which is not looked into
        vectors = jnp.asarray(rows).reshape(*ids.shape, -1)
        return first_input(params, jnp.asarray(ids), self._config, self._dtype, mask, vectors)

    def stages(self, *, label: str, progress: bool = False) -> Iterator[Stage]:
        """Every stage of every layer in order; what is exchanged at a weight set's first use holds at later ones."""
        for _, stages in self.by_layer(label=label, progress=progress):
            yield from stages

    def by_layer(self, *, label: str, progress: bool = False) -> Iterator[tuple[int, Iterator[Stage]]]:
        """Each layer that has stages, and these, to be gone through before the next layer is asked for."""
        seen: set[str] = set()
        with progress_bar(label, self._config.layers, show=progress) as advance:
            for number in range(self._config.layers):
                wanted = {}
                for stage in stages_of(self._config):
                    addresses = tuple(self._address(number, part, f"{name}/kernel") for part, name in stage)
                    if not seen.issuperset(addresses) and not all(a in self._passed for a in addresses):
                        seen.update(addresses)
                        wanted["/".join(stage[0])] = addresses
                if wanted:
                    yield number, self._stages(number, wanted)
                self._step(self._states, self._params(number), number)
                if self._originals is not None:
                    self._step(self._originals, self._params(number, exchanged=False), number)
                self._let_go(number)
                advance()

    def _stages(self, number: int, wanted: Mapping[str, tuple[str, ...]]) -> Iterator[Stage]:
        for name, addresses in wanted.items():
            yield Stage(number, addresses, self._moments(number, name), self._cross(number, name))

    def _let_go(self, number: int) -> None:
        """Forgets what a layer took and no later one takes."""
        for part in self._config.sharing.parts:
            sets = getattr(self._config.sharing, part)
            if sets[number] not in sets[number + 1 :]:
                prefix = self._address(number, part, "")
                for held in (self._sliced, self.exchanged):
                    for address in [a for a in held if a.startswith(prefix)]:
                        del held[address]

    def _step(self, states: list[jax.Array], params: Any, number: int) -> None:
        for i in range(len(states)):  # one by one, so that only one batch is held twice
            states[i] = self._layer(params, number, i, states[i])

    def outcome(
        self, stage: Stage | None, changes: Mapping[str, Any], *, without: Collection[int] = ()
    ) -> list[Float[Array, "B T D"]]:
        """The last layer's output per batch if `changes` were exchanged at this stage; nothing is kept.

        Args:
          stage: None before the first.
          without: layers that are left out.
        """
        states = self._states
        for number in range(0 if stage is None else stage.layer, self._config.layers):
            if number in without:
                continue
            params = self._params(number, changes)
            states = [self._layer(params, number, i, x) for i, x in enumerate(states)]
        return states

    def kernel(self, address: str) -> Float[Array, "n m"]:
        """The dense matrix at an address, as exchanged."""
        for exchanged in (self.exchanged, self._made):
            if address in exchanged:
                if self._originals is None:
                    self._sliced.pop(address, None)
                return dense(exchanged[address])
        return self._original(address)

    def _original(self, address: str) -> Float[Array, "n m"]:
        if address not in self._sliced:
            self._sliced[address] = jnp.asarray(dense(self._weights[address]))
        return self._sliced[address]

    def _address(self, layer: int, part: str, rest: str) -> str:
        return f"layers/{getattr(self._config.sharing, part)[layer]}/{part}/{rest}"

    def _matrix(self, address: str, changes: Mapping[str, Any] | None, exchanged: bool) -> Float[Array, "n m"]:
        if changes and address in changes:
            return dense(changes[address])
        return self.kernel(address) if exchanged else self._original(address)

    def _params(
        self, layer: int, changes: Mapping[str, Any] | None = None, *, exchanged: bool = True
    ) -> dict[str, Any]:
        params: dict[str, Any] = {}
        for part in self._config.sharing.parts:
            prefix = self._address(layer, part, "")
            params[part] = tree.nest(
                {
                    a.removeprefix(prefix): self._matrix(a, changes, exchanged)
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

    def _cross(self, number: int, name: str) -> jax.Array | None:
        if self._originals is None:
            return None
        total: Any = 0.0
        pair = self._params(number), self._params(number, exchanged=False)
        sets = self._config.sharing.of_layer(number)
        for i, states in enumerate(zip(self._states, self._originals, strict=True)):
            total = total + _layer_cross(self._config, sets, pair, states, self._context(i, number), name)
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


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def _layer_cross(config: ModelConfig, sets: Sets, params, states, context, name: str):
    """Σ xᵀx₀ over the real tokens, of the input of a linear map in the exchanged layer and in the original one."""
    part, linear = name.split("/")
    inputs = []
    for weights, x in zip(params, states, strict=True):
        layer = Layer(config, _structure(config, sets))
        recorded: Any = layer.apply(layer_variables(weights), x, context, mutable=[INPUTS])[1]
        kept = recorded[INPUTS][part][linear]["x"].astype(jnp.float32)
        inputs.append((kept * context.real[..., None]).reshape(-1, kept.shape[-1]))
    return jax.lax.dot(inputs[0].T, inputs[1], precision=jax.lax.Precision.HIGHEST)

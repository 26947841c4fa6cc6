"""Where a run's arrays live: on one device, or spread over a mesh."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxcompress.config import ModelConfig
from flaxcompress.train.abstract import placed
from flaxcompress.train.sharding import batch_shardings, param_shardings, state_shardings, within
from flaxcompress.train.state import State, start
from flaxcompress.train.step import STOP, Recipe, train_step
from flaxcompress.train.trainable import partition

_STEP = jax.jit(train_step, static_argnums=0, donate_argnums=1)


class OneDevice:
    """Everything on the default device."""

    def context(self) -> Any:
        """What the run happens in."""
        return contextlib.nullcontext()

    def params(self, params: Any) -> Any:
        """A copy of the parameters that may be given up."""
        return jax.tree.map(lambda x: jax.numpy.array(x, copy=True), params)

    def constants(self, constants: Any) -> Any:
        """What the loss needs beside the parameters."""
        return constants

    def start(self, recipe: Recipe, trainable: Any) -> State:
        """The state before the first step."""
        return start(trainable, recipe.optimizer, average=recipe.average is not None)

    def batch(self, batch: Any, stop: bool = False) -> Any:
        """A batch from the host. A single process need not tell others that it is asked to stop."""
        del stop
        return batch

    def step(self, recipe: Recipe, state: State) -> Any:
        """(state, frozen, constants, batch, key) -> (state, report); the state is donated."""
        del state
        return functools.partial(_STEP, recipe)

    def lower(self, recipe: Recipe, state: State, *inputs: Any) -> Any:
        """A step on (frozen, constants, batch, key) that can be compiled, and is not run."""
        return _STEP.lower(recipe, state, *inputs)

    def gather(self, params: Any) -> Any:
        """The parameters as the caller gets them."""
        return params


class OnMesh(OneDevice):
    """Spread over a mesh, parameters as `sharding.py` says; each process gives its own rows of a batch."""

    def __init__(self, mesh: Mesh, config: ModelConfig):
        self.mesh, self.config = mesh, config

    def context(self) -> Any:
        return within(self.mesh)

    def params(self, params: Any) -> Any:
        shardings = param_shardings(jax.eval_shape(lambda: params), self.config, self.mesh)
        return jax.tree.map(self._put, params, shardings)

    def constants(self, constants: Any) -> Any:
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda x: self._put(x, everywhere), constants)

    def _put(self, x: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(jax.numpy.array(x, copy=True), sharding)
        host = np.asarray(x)  # every process has the whole array
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    def start(self, recipe: Recipe, trainable: Any) -> State:
        make = functools.partial(start, optimizer=recipe.optimizer, average=recipe.average is not None)
        shardings = self._shardings(recipe, trainable)
        return jax.jit(make, out_shardings=shardings)(trainable)

    def _abstract_start(self, recipe: Recipe, trainable: Any) -> State:
        return jax.eval_shape(lambda t: start(t, recipe.optimizer, average=recipe.average is not None), trainable)

    def _shardings(self, recipe: Recipe, trainable: Any) -> State:
        of = jax.tree.map(lambda x: x.sharding, trainable)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        average = of if recipe.average is not None else None
        progress = jax.tree.map(lambda _: everywhere, self._abstract_start(recipe, trainable).progress)
        return State(of, state_shardings(recipe.optimizer, trainable, of), average, progress)

    def abstract(
        self, recipe: Recipe, params: Any, constants: Any, batch: Any, trainable: str = ".*"
    ) -> tuple[State, Any, Any, Any]:
        """(state, frozen, constants, batch) without values, as a step of this run is given them."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        given = placed(params, param_shardings(params, self.config, self.mesh))
        moving, frozen = partition(given, trainable)
        state = placed(self._abstract_start(recipe, moving), self._shardings(recipe, moving))
        constants = placed(constants, jax.tree.map(lambda _: everywhere, constants))
        flags = jax.ShapeDtypeStruct((self.mesh.size,), jax.numpy.float32, sharding=self._each_device())
        return state, frozen, constants, {**placed(batch, batch_shardings(batch, self.mesh)), STOP: flags}

    def _each_device(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))

    def batch(self, batch: Any, stop: bool = False) -> Any:
        shardings = batch_shardings(batch, self.mesh)
        arrays = jax.tree.map(
            lambda x, sharding: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch, shardings
        )
        own = np.full(len(self.mesh.local_devices), float(stop), np.float32)
        return {**arrays, STOP: jax.make_array_from_process_local_data(self._each_device(), own)}

    def step(self, recipe: Recipe, state: State) -> Any:
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        own = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(functools.partial(train_step, recipe), donate_argnums=0, out_shardings=(own, everywhere))

    def lower(self, recipe: Recipe, state: State, *inputs: Any) -> Any:
        return self.step(recipe, state).lower(state, *inputs)

    def gather(self, params: Any) -> Any:
        if jax.process_count() == 1:
            return params
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(params, tiled=True)


def placement(mesh: Mesh | None, config: ModelConfig | None) -> OneDevice:
    """`OnMesh` where there is a mesh."""
    if mesh is None:
        return OneDevice()
    assert config is not None
    return OnMesh(mesh, config)

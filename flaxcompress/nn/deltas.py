"""The weights of low-rank deltas: for each linear map that they change, a pair of factors below the map's own path.

    {"attention": {"query": {"down": [n, R], "up": [R, m], "bias": [m]}}}

`Layer` gets them as a collection beside its parameters, in which each `Linear` finds its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxcompress import tree
from flaxcompress.config import SUBLAYERS, ModelConfig
from flaxcompress.formats import spec_for
from flaxcompress.formats.base import vector_init
from flaxcompress.nn.bases import BASES, put_on_bases
from flaxcompress.nn.linear import DELTAS


def init_deltas(config: ModelConfig, key: jax.Array, address: str, layer: Mapping[str, Any]) -> dict[str, Any]:
    """One weight set, of a layer with these (abstract) parameters; `up` and biases are zero: nothing changes at first.

    Raises ValueError for a target that is no linear map of the layer.
    """
    assert config.deltas is not None
    weights = dict(tree.walk({part: layer[part] for part in SUBLAYERS if part in layer}, ""))
    kernels = {path.removesuffix("/kernel"): node.shape for path, node in weights.items() if path.endswith("/kernel")}
    chosen = {name for target in config.deltas.targets for name in tree.select(kernels, target, where="deltas/targets")}
    rank, flat = config.deltas.rank, {}
    for number, name in enumerate(sorted(chosen)):
        n, m = kernels[name]
        for side, shape, draw in (
            ("down", (n, rank), nn.initializers.normal(n**-0.5)),
            ("up", (rank, m), nn.initializers.zeros_init()),
        ):
            spec = spec_for(config, f"{address}/{name}/{side}")
            flat[f"{name}/{side}"] = spec.init(jax.random.fold_in(key, number), shape, draw, table=False)
        if config.deltas.bias and f"{name}/bias" in weights:
            draw = vector_init(config, f"{address}/{name}/bias", nn.initializers.zeros_init())
            flat[f"{name}/bias"] = draw(key, (m,), jnp.float32)
    return tree.nest(flat)


def layer_variables(params: Mapping[str, Any]) -> dict[str, Any]:
    """The collections that `Layer.apply` takes, from one layer's parameters part by part."""
    params = put_on_bases(params) if BASES in params else params
    own = {part: weights for part, weights in params.items() if part != DELTAS}
    return {"params": own, DELTAS: params[DELTAS]} if DELTAS in params else {"params": own}

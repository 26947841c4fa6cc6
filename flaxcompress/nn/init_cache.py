"""An empty cache for a model's kind of attention."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from flaxcompress.config import ModelConfig
from flaxcompress.nn.attention_kinds import attention_kind
from flaxcompress.nn.cache import Cache, cache_slots
from flaxcompress.nn.depthwise import held_inputs


def init_cache(config: ModelConfig, batch: int, length: int, dtype: Any = jnp.float32, *, memory: int = 0) -> Cache:
    """An empty cache for `length` tokens, or fewer where every layer has a window; of the decoder where there is one.

    Args:
      memory: M, how many tokens the encoder has.
    """
    config = config.decoder or config
    slots = cache_slots(config, length)
    arrays = attention_kind(config).cache_arrays(config)
    shapes = {name: (heads, slots, width) for name, (heads, width) in arrays.items()}
    shapes |= {name: (1, count, config.width) for name, count in held_inputs(config).items()}
    crossing = bool(config.sharing.cross_attention)
    if crossing:
        shapes |= dict.fromkeys(("cross_key", "cross_value"), (config.groups, memory, config.head_dim))
    return Cache(
        layers={name: jnp.zeros((config.layers, batch, *shape), dtype) for name, shape in shapes.items()},
        real=jnp.zeros((batch, slots), bool),
        places=jnp.zeros(slots, jnp.int32),
        length=jnp.zeros((), jnp.int32),
        counts=jnp.zeros(batch, jnp.int32),
        memory_mask=jnp.zeros((batch, memory), bool) if crossing else None,
    )

"""Trained keys and values in front of those of the sequence (prefix tuning, Li & Liang 2021)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig
from flaxcompress.formats.base import vector_init
from flaxcompress.nn.context import Context
from flaxcompress.nn.linear import weight


class Prefix(nn.Module):
    """P keys and P values of every key/value head, [P, K·r] and [P, K·d], which every token sees.

    They are what attention compares with: no norm and no rotary position is applied to them.
    """

    config: ModelConfig
    address: str

    def setup(self):
        config, normal = self.config, nn.initializers.normal(self.config.initializer_range)
        for name, width in (("key", config.query_key_dim), ("value", config.head_dim)):
            init, shape = (
                vector_init(config, f"{self.address}/{name}", normal),
                (config.prefix_length, config.groups * width),
            )
            setattr(self, name, weight(self, name, init, shape))

    def __call__(
        self, key: Float[Array, "B S K r"], value: Float[Array, "B S K d"], context: Context
    ) -> tuple[Float[Array, "B P+S K r"], Float[Array, "B P+S K d"], Context]:
        """Keys and values with these in front, and the context in which they may be seen, without a bias."""
        mask, bias, length = context.mask, context.bias, self.config.prefix_length
        if mask is not None:
            mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(length, 0)], constant_values=True)
        if bias is not None:
            bias = jnp.pad(bias, ((0, 0), (0, 0), (length, 0)))
        return _behind(self.key, key), _behind(self.value, value), context._replace(mask=mask, bias=bias)


def _behind(prefix: Float[Array, "P k"], own: Float[Array, "B S K d"]) -> Float[Array, "B P+S K d"]:
    front = prefix.astype(own.dtype).reshape(1, -1, *own.shape[2:])
    return jnp.concatenate([jnp.broadcast_to(front, (own.shape[0], *front.shape[1:])), own], axis=1)

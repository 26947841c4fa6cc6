"""The position-wise feed-forward network."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig
from flaxcompress.nn.linear import Linear
from flaxcompress.ops import activate


class FeedForward(nn.Module):
    """down(activation(up(x))), [*B, D] -> [*B, D] through width F."""

    config: ModelConfig
    address: str

    def setup(self):
        config = self.config
        self.up = Linear(config, f"{self.address}/up", config.width, config.feed_forward_width)
        self.down = Linear(config, f"{self.address}/down", config.feed_forward_width, config.width)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(activate(self.up(x), self.config.activation))

"""The position-wise feed-forward network."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig
from flaxcompress.nn.linear import Linear, project_together
from flaxcompress.ops import activate


class FeedForward(nn.Module):
    """down(activation(up(x))), [*B, D] -> [*B, D] through width F; gated: down(activation(gate(x)) * up(x)).

    Attributes:
      inner: F.
    """

    config: ModelConfig
    address: str
    inner: int

    def setup(self):
        config, address = self.config, self.address
        width, inner, bias = config.width, self.inner, config.feed_forward_bias
        self.up = Linear(config, f"{address}/up", width, inner, bias)
        self.gate = Linear(config, f"{address}/gate", width, inner, bias) if config.gated else None
        self.down = Linear(config, f"{address}/down", inner, width, bias)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        if self.gate is None:
            return self.down(activate(self.up(x), self.config.activation))
        gate, up = project_together(x, (self.gate, self.up))
        return self.down(activate(gate, self.config.activation) * up)

"""The position-wise feed-forward network."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig
from flaxcompress.nn.cache import LayerCache
from flaxcompress.nn.context import Context
from flaxcompress.nn.depthwise import Depthwise, lead
from flaxcompress.nn.linear import Linear, project_together
from flaxcompress.nn.logical import constrain
from flaxcompress.ops import activate


class FeedForward(nn.Module):
    """down(activation(up(x))), [*B, D] -> [*B, D] through width F; gated: down(activation(gate(x)) * up(x)).

    With `config.feed_forward_kernel`, `convolve` comes before.

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
        if kernel := config.feed_forward_kernel:
            self.depthwise = Depthwise(config, f"{address}/depthwise", kernel, width)

    def convolve(
        self, x: Float[Array, "B T D"], context: Context, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """The depthwise convolution over the sequence, and the cache with the last inputs exchanged."""
        x, before, cache = lead(x, "feed_forward_inputs", context, cache)
        return self.depthwise(x, before), cache

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        if self.gate is None:
            inner = activate(self.up(x), self.config.activation)
        else:
            gate, up = project_together(x, (self.gate, self.up))
            inner = activate(gate, self.config.activation) * up
        return self.down(constrain(inner, "batch", *("length",) * (x.ndim - 2), "mlp"))

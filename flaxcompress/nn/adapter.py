"""A narrow network behind a sublayer."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig
from flaxcompress.nn.linear import Linear
from flaxcompress.ops import activate


class Adapter(nn.Module):
    """y + up_project(activation(down_project(y))), [B, T, D] -> [B, T, D]; the former is drawn as zeros.

    See `config.Adapters`.
    """

    config: ModelConfig
    address: str

    def setup(self):
        config, adapters = self.config, self.config.adapters
        assert adapters is not None
        self.down_project = Linear(config, f"{self.address}/down_project", config.width, adapters.width)
        zeros = nn.initializers.zeros_init()
        self.up_project = Linear(config, f"{self.address}/up_project", adapters.width, config.width, initializer=zeros)
        self.activation = adapters.activation

    def __call__(self, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return y + self.up_project(activate(self.down_project(y), self.activation))

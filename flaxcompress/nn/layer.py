"""One transformer layer."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from flaxcompress.config import ModelConfig
from flaxcompress.nn.add_norm import Norms
from flaxcompress.nn.attention import Attention
from flaxcompress.nn.feed_forward import FeedForward


class Layer(nn.Module):
    """Post-norm: x = norm(x + attention(x)); x = norm(x + feed_forward(x)).

    Its parameters form one tree per part ("attention", "feed_forward", "norms"), which `Stack` shares separately.

    Attributes:
      sets: the weight set of each part, in the order of `config.PARTS`; they decide the formats.
    """

    config: ModelConfig
    sets: tuple[int, int, int]

    def setup(self):
        attention, feed_forward, norms = self.sets
        self.attention = Attention(self.config, f"layers/{attention}/attention")
        self.feed_forward = FeedForward(self.config, f"layers/{feed_forward}/feed_forward")
        self.norms = Norms(self.config, f"layers/{norms}/norms")
        self.drop = nn.Dropout(self.config.dropout)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"] | None = None,
        bias: Float[Array, "H T T"] | None = None,
        *,
        deterministic: bool = True,
        need_probabilities: bool = False,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B H T T"] | None]:
        y, probabilities = self.attention(
            x, mask, bias, deterministic=deterministic, need_probabilities=need_probabilities
        )
        x = self.norms.attention(x + self.drop(y, deterministic=deterministic)).astype(x.dtype)
        y = self.feed_forward(x)
        x = self.norms.feed_forward(x + self.drop(y, deterministic=deterministic)).astype(x.dtype)
        return x, probabilities

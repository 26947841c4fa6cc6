"""One transformer layer."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig
from flaxcompress.nn.add_norm import Norms
from flaxcompress.nn.attention import Attention
from flaxcompress.nn.cache import LayerCache
from flaxcompress.nn.context import Context
from flaxcompress.nn.feed_forward import FeedForward


class Layer(nn.Module):
    """Post-norm: x = norm(x + f(x)); pre-norm: x = x + f(norm(x)); for f attention, then feed-forward.

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
        self.norms = Norms(self.config, norms)
        self.drop = nn.Dropout(self.config.dropout)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context = Context(),  # noqa: B008  (a tuple, never changed)
        *,
        cache: LayerCache | None = None,
        deterministic: bool = True,
        need_probabilities: bool = False,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B H T S"] | None, LayerCache | None]:
        """The layer's output, its attention probabilities when asked for, and its cache with the tokens stored."""
        pre = self.config.norm_place == "pre"
        attend = {"cache": cache, "deterministic": deterministic, "need_probabilities": need_probabilities}
        before = self.norms.before(x) if pre else x
        y, probabilities, cache = self.attention(before, context, **attend)
        x = x + self.drop(y, deterministic=deterministic)
        x = x if pre else self.norms.before(x)
        y = self.feed_forward(self.norms.feed_forward(x).astype(x.dtype) if pre else x)
        x = x + self.drop(y, deterministic=deterministic)
        if not pre:
            x = self.norms.feed_forward(x).astype(x.dtype)
        return x, probabilities, cache

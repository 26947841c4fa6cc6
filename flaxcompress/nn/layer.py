"""One transformer layer."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig, Sets
from flaxcompress.nn.add_norm import Norms
from flaxcompress.nn.attention_kinds import attention_kind
from flaxcompress.nn.cache import LayerCache
from flaxcompress.nn.context import Context
from flaxcompress.nn.cross_attention import CrossAttention
from flaxcompress.nn.feed_forward import FeedForward


class LayerOutput(NamedTuple):
    """A layer's output, its attention probabilities when asked for, and its cache with the tokens stored."""

    x: Float[Array, "B T D"]
    probabilities: Any = None
    cross_probabilities: Any = None
    cache: LayerCache | None = None


class Layer(nn.Module):
    """Attention, attention to the encoder's output in a decoder that has one, feed-forward: each added to its input.

    Its parameters form one tree per part (see `config.PARTS`), which `Stack` shares separately.

    Attributes:
      sets: the weight set of each part; they decide the formats.
      prefix: what the addresses begin with.
    """

    config: ModelConfig
    sets: Sets = Sets()
    prefix: str = ""

    def setup(self):
        config, sets = self.config, self.sets
        at = {part: f"{self.prefix}layers/{number}/{part}" for part, number in sets._asdict().items()}
        self.attention = attention_kind(config)(config, at["attention"])
        if config.sharing.cross_attention:
            self.cross_attention = CrossAttention(config, at["cross_attention"])
        self.feed_forward = FeedForward(config, at["feed_forward"], config.feed_forward_width_of(sets.feed_forward))
        self.norms = Norms(config, sets.norms, self.prefix)
        self.drop = nn.Dropout(config.dropout)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context = Context(),  # noqa: B008  (a tuple, never changed)
        *,
        cache: LayerCache | None = None,
        deterministic: bool = True,
        need_probabilities: bool = False,
        drop_rate: Any = None,
    ) -> LayerOutput:
        """Runs the layer; `cache` is given while decoding, `drop_rate` (see `Norms.residual`) while training."""
        need = {"deterministic": deterministic, "need_probabilities": need_probabilities}

        def attend(x: Any) -> Any:
            nonlocal cache
            y, probabilities, cache = self.attention(x, context, cache=cache, **need)
            return self.drop(y, deterministic=deterministic), probabilities

        def attend_to_memory(x: Any) -> Any:
            nonlocal cache
            y, probabilities, cache = self.cross_attention(x, context, cache=cache, **need)
            return self.drop(y, deterministic=deterministic), probabilities

        def feed(x: Any) -> Any:
            nonlocal cache
            if self.config.feed_forward_kernel:
                x, cache = self.feed_forward.convolve(x, context, cache)
            return self.drop(self.feed_forward(x), deterministic=deterministic), None

        residual = functools.partial(self.norms.residual, drop_rate=drop_rate)
        together = {"attention": attend, **({} if self.config.parallel == "none" else {"feed_forward": feed})}
        x, other = residual(x, together)
        probabilities, cross = other["attention"], None
        if self.config.sharing.cross_attention:
            x, other = residual(x, {"cross_attention": attend_to_memory})
            cross = other["cross_attention"]
        if "feed_forward" not in together:
            x, _ = residual(x, {"feed_forward": feed})
        return LayerOutput(x, probabilities, cross, cache)

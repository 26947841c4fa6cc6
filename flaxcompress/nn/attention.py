"""Multi-head self-attention."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from flaxcompress.config import ModelConfig
from flaxcompress.nn.linear import Linear, project_together
from flaxcompress.ops import attend_values, attention_probabilities, dot_product_attention


class Attention(nn.Module):
    """[B, T, D] -> [B, T, D], and the probabilities [B, H, T, T] when asked for (Vaswani et al. 2017, §3.2)."""

    config: ModelConfig
    address: str

    def setup(self):
        width = self.config.width
        for name in ("query", "key", "value", "output"):
            setattr(self, name, Linear(self.config, f"{self.address}/{name}", width, width))
        self.drop = nn.Dropout(self.config.attention_dropout)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"] | None,
        bias: Float[Array, "H T T"] | None = None,
        *,
        deterministic: bool = True,
        need_probabilities: bool = False,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B H T T"] | None]:
        config = self.config
        parts = project_together(x, (self.query, self.key, self.value))
        query, key, value = (p.reshape(*p.shape[:-1], config.heads, config.head_width) for p in parts)
        dropping = not deterministic and config.attention_dropout > 0
        if dropping or need_probabilities:
            probabilities = attention_probabilities(query, key, mask, bias)
            dropped = self.drop(probabilities, deterministic=deterministic)
            y = attend_values(dropped, value)
        else:
            probabilities = None
            y = dot_product_attention(query, key, value, mask, bias)
        y = self.output(y.reshape(*y.shape[:-2], config.width))
        return y, probabilities if need_probabilities else None

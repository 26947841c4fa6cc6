"""What stands on top of the layers."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig
from flaxcompress.formats import attend
from flaxcompress.formats.base import vector_init
from flaxcompress.nn.add_norm import Norm
from flaxcompress.nn.linear import Linear
from flaxcompress.ops import activate


class Pooler(nn.Module):
    """tanh of a linear map of the first token, [B, T, D] -> [B, D] (BERT's pooled output)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        width = self.config.width
        return jnp.tanh(Linear(self.config, "pooler/dense", width, width, name="dense")(x[:, 0]))


class MaskedLM(nn.Module):
    """Vocabulary logits from a transform to width E and the token table, tied, [B, T, D] -> [B, T, V], float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], table, pooled) -> Float[Array, "B T V"]:
        del pooled
        config = self.config
        y = Linear(config, "head/transform", config.width, config.table_width, config.head_bias, name="transform")(x)
        y = activate(y, config.head_activation or config.activation)
        y = Norm(config, "head/norm", name="norm")(y).astype(x.dtype)
        bias = self.param("bias", vector_init(config, "head/bias", nn.initializers.zeros_init()), (config.vocabulary,))
        return attend(y, table).astype(jnp.float32) + bias


class ReplacedToken(nn.Module):
    """Whether each token was put there by a generator, as a logit [B, T], float32 (ELECTRA, Clark et al. 2020)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], table, pooled) -> Float[Array, "B T"]:
        del table, pooled
        config = self.config
        y = Linear(config, "head/transform", config.width, config.width, name="transform")(x)
        y = activate(y, config.head_activation or config.activation)
        return Linear(config, "head/output", config.width, 1, name="output")(y)[..., 0].astype(jnp.float32)


class CausalLM(nn.Module):
    """Logits of the next token, [B, T, D] -> [B, T, V], float32: by the token table, or a kernel of its own.

    The input is scaled by `config.logit_scale` first.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], table, pooled) -> Float[Array, "B T V"]:
        del pooled
        config = self.config
        x = x if config.logit_scale == 1.0 else x * jnp.asarray(config.logit_scale, x.dtype)
        if config.tied:
            y = attend(x, table).astype(jnp.float32)
        else:
            output = Linear(config, "head/output", config.width, config.vocabulary, False, name="output")
            y = output(x).astype(jnp.float32)
        if not config.logit_bias:
            return y
        zeros = vector_init(config, "head/bias", nn.initializers.zeros_init())
        return y + self.param("bias", zeros, (config.vocabulary,))


class SequenceClassification(nn.Module):
    """Class logits [B, C], float32, from the pooled output, or from the first token where there is no pooler."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], table, pooled) -> Float[Array, "B C"]:
        del table
        config = self.config
        y = x[:, 0] if pooled is None else pooled
        return Linear(config, "head/output", config.width, config.classes, name="output")(y).astype(jnp.float32)


class TokenClassification(nn.Module):
    """Class logits of every token, [B, T, C], float32; with two classes, an answer's first and last token."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], table, pooled) -> Float[Array, "B T C"]:
        del table, pooled
        config = self.config
        return Linear(config, "head/output", config.width, config.classes, name="output")(x).astype(jnp.float32)


HEADS: dict[str, type[nn.Module]] = {
    "masked_lm": MaskedLM,
    "replaced_token": ReplacedToken,
    "causal_lm": CausalLM,
    "seq2seq_lm": CausalLM,
    "sequence_classification": SequenceClassification,
    "token_classification": TokenClassification,
    "span": TokenClassification,
}

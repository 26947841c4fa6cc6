"""What stands on top of the layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig, add_head_name
from flaxcompress.formats import attend
from flaxcompress.formats.base import vector_init
from flaxcompress.nn.add_norm import Norm
from flaxcompress.nn.linear import Linear
from flaxcompress.nn.logical import constrain
from flaxcompress.ops import activate


class HeadInputs(NamedTuple):
    """What a head may read beside the last layer's output x [B, T, D]; fields that there are not are None.

    Attributes:
      table: the token table, in its format.
      pooled: the pooler's output, [B, D].
      ids: the token ids, [B, T].
      mask: which tokens are no padding, [B, T]; None: all.
    """

    table: Any = None
    pooled: Any = None
    ids: Any = None
    mask: Any = None


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
    def __call__(self, x: Float[Array, "B T D"], given: HeadInputs) -> Float[Array, "B T V"]:
        return masked_lm(self, x, given)


def masked_lm(head: Any, x: Float[Array, "B T D"], given: HeadInputs) -> Float[Array, "B T V"]:
    """What `MaskedLM` computes, with the weights of `head`; inside a compact method."""
    config = head.config
    y = Linear(config, "head/transform", config.width, config.table_width, config.head_bias, name="transform")(x)
    y = activate(y, config.head_activation or config.activation)
    y = Norm(config, "head/norm", name="norm")(y).astype(x.dtype)
    bias = head.param("bias", vector_init(config, "head/bias", nn.initializers.zeros_init()), (config.vocabulary,))
    return constrain(attend(y, given.table).astype(jnp.float32) + bias, "batch", "logit_length", "vocab")


class PretrainingLogits(NamedTuple):
    """Logits, float32: of every token [B, T, V], and of the two sentences' order [B, C]."""

    masked_lm: Any
    sentence_order: Any


class Pretraining(nn.Module):
    """A masked LM and, from the pooled output, whether two sentences are in order: (logits [B, T, V], logits [B, C]).

    ALBERT's sentence order (Lan et al. 2020, §3.1); BERT's next sentence has the same form (Devlin et al. 2019).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], given: HeadInputs) -> PretrainingLogits:
        config = self.config
        order = Linear(config, "head/order", config.width, config.classes, name="order")(given.pooled)
        return PretrainingLogits(masked_lm(self, x, given), order.astype(jnp.float32))


class ReplacedToken(nn.Module):
    """Whether each token was put there by a generator, as a logit [B, T], float32 (ELECTRA, Clark et al. 2020)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], given: HeadInputs) -> Float[Array, "B T"]:
        del given
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
    def __call__(self, x: Float[Array, "B T D"], given: HeadInputs) -> Float[Array, "B T V"]:
        config = self.config
        x = x if config.logit_scale == 1.0 else x * jnp.asarray(config.logit_scale, x.dtype)
        if config.tied:
            y = attend(x, given.table).astype(jnp.float32)
        else:
            output = Linear(config, "head/output", config.width, config.vocabulary, False, name="output")
            y = output(x).astype(jnp.float32)
        y = constrain(y, "batch", "logit_length", "vocab")
        if not config.logit_bias:
            return y
        zeros = vector_init(config, "head/bias", nn.initializers.zeros_init())
        return y + self.param("bias", zeros, (config.vocabulary,))


def pool_sequence(x: Float[Array, "B T D"], given: HeadInputs, config: ModelConfig) -> Float[Array, "B D"]:
    """One vector for each sequence, as `config.classifier.pooling` says."""
    how = config.classifier.pooling
    if how == "pooler" and given.pooled is not None:
        return given.pooled
    if how in ("pooler", "first"):
        return x[:, 0]
    real = jnp.ones(x.shape[:2], bool) if given.mask is None else given.mask
    if how == "mean":
        weights = real.astype(jnp.float32)[..., None]
        return ((x.astype(jnp.float32) * weights).sum(1) / jnp.maximum(weights.sum(1), 1.0)).astype(x.dtype)
    counted = real if how == "last" else given.ids != config.pad_token
    last = jnp.where(counted, jnp.arange(x.shape[1]), 0).max(1)  # the first token where none counts
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def classify(x: Float[Array, "*B D"], config: ModelConfig) -> Float[Array, "*B C"]:
    """Class logits, float32, after the transform that `config.classifier` may ask for; inside a compact method."""
    classifier, width = config.classifier, config.width
    if classifier.transform:
        x = Linear(config, "head/transform", width, width, config.head_bias, name="transform")(x)
        x = activate(x, config.head_activation or config.activation)
    if classifier.norm:
        x = Norm(config, "head/norm", name="norm")(x).astype(x.dtype)
    output = Linear(config, "head/output", width, config.classes, classifier.bias, name="output")
    return output(x).astype(jnp.float32)


class SequenceClassification(nn.Module):
    """Class logits [B, C], float32, of one vector for each sequence."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], given: HeadInputs) -> Float[Array, "B C"]:
        return classify(pool_sequence(x, given, self.config), self.config)


class TokenClassification(nn.Module):
    """Class logits of every token, [B, T, C], float32; with two classes, an answer's first and last token."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], given: HeadInputs) -> Float[Array, "B T C"]:
        del given
        return classify(x, self.config)


HEADS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "masked_lm": MaskedLM,
    "pretraining": Pretraining,
    "replaced_token": ReplacedToken,
    "causal_lm": CausalLM,
    "seq2seq_lm": CausalLM,
    "sequence_classification": SequenceClassification,
    "token_classification": TokenClassification,
    "span": TokenClassification,
}
# Those whose logits of a token depend on that token's vector alone ("pretraining": its masked LM).
BY_TOKEN = ("masked_lm", "pretraining", "replaced_token", "causal_lm", "seq2seq_lm", "token_classification", "span")


class FunctionHead(nn.Module):
    """A head that is a function of (x [B, T, D], `HeadInputs`, config); Linen modules that it makes are its weights."""

    config: ModelConfig
    function: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], given: HeadInputs) -> Any:
        return self.function(x, given, self.config)


def register_head(name: str, head: Any) -> Any:
    """Makes a head for a task of one's own known as `ModelConfig(head=name)`; returns `head`.

    Args:
      name: a name in lower case, none of `HEADS`. Registered again, it means the new head from then on.
      head: a Linen module with the attribute `config`, called with (x [B, T, D], `HeadInputs`), or a function of (x,
        `HeadInputs`, config) in which Linen modules may be made, each with a name. What it returns, one array or
        several, is the model's `logits`; their first axis is the batch.

    Raises:
      ValueError: the name is taken, or is none.
      TypeError: `head` is neither.

    Example:
      >>> def regression(x, given, config):
      ...     return Linear(config, "head/output", config.width, 1, name="output")(x[:, 0])[..., 0]
      >>> fc.register_head("regression", regression)
      >>> model = fc.load("minilm", head="regression", key=jax.random.key(0))
    """
    is_module = isinstance(head, type) and issubclass(head, nn.Module)
    if not is_module and (isinstance(head, type) or not callable(head)):
        raise TypeError(f"register_head: {name!r} needs a Linen module's class or a function, got {head!r}")
    add_head_name(name)
    made: Any = head if is_module else functools.partial(FunctionHead, function=head)
    if HEADS.get(name, made) is not made:
        jax.clear_caches()  # compiled programs know heads by name
    HEADS[name] = made
    return head

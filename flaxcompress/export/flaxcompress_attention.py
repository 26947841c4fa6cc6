"""The PyTorch side of attention; modeling_flaxcompress.py imports it.

A kind of self-attention is a class with `declare`, which makes its weights, and `__call__`; one entry in `KINDS`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Seen(NamedTuple):
    """What a layer sees beside its input.

    mask: keys that may be seen, [B, 1, 1 or T, S].
    bias: added to the scores, [H, T, S].
    turn: (cos, sin) of the tokens' angles, [B, 1, T, d/2].
    past: the generation cache and the layer's number in it.
    memory, memory_mask: the encoder's output [B, M, D] and which of it may be seen, [B, 1, 1, M].
    """

    mask: Any = None
    bias: Any = None
    turn: Any = None
    past: Any = None
    memory: Any = None
    memory_mask: Any = None


def rotate(x, cos, sin):
    """Turns the pairs (x_i, x_{i+d/2}) of [B, H, T, d] by their angles, in float32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def attend_heads(net, query, key, value, mask, bias, need_probabilities):
    """softmax(QKᵀ·scale + bias)V of [B, H, T, d], and the probabilities [B, H, T, S] when asked for."""
    c = net.structure
    dropout = c["attention_dropout"] if net.root.training else 0.0
    if key.shape[1] != query.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if c["attention_scale"] is None else c["attention_scale"]
    # A row without any key would be 0/0: it sees every key, and its result is zeroed.
    some = mask.any(-1, keepdim=True)
    allowed = mask | ~some
    if not need_probabilities:
        added = allowed if bias is None else bias.to(query.dtype).masked_fill(~allowed, -torch.inf)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=added, dropout_p=dropout, scale=scale)
        return y * some, None
    scores = (query * scale @ key.transpose(-1, -2)).float()
    scores = scores if bias is None else scores + bias
    probabilities = scores.masked_fill(~allowed, -torch.inf).softmax(-1) * some
    return F.dropout(probabilities, dropout).to(query.dtype) @ value, probabilities


class Attention:
    """Multi-head attention with rotary positions, norms of queries and keys, and grouped keys and values."""

    @staticmethod
    def declare(net, address):
        """Makes the weights of one weight set."""
        c = net.structure
        width, inner, shared = c["width"], c["heads"] * net.head_width, net.groups * net.head_width
        for name, features in (("query", inner), ("key", shared), ("value", shared)):
            net.add_linear(f"{address}/{name}", width, features, c["attention_bias"])
        net.add_linear(f"{address}/output", inner, width, c["output_bias"])
        if c["query_key_norm"]:
            net.add_norm(f"{address}/query_norm", net.head_width)
            net.add_norm(f"{address}/key_norm", net.head_width)

    def __call__(self, net, x, address, seen, need_probabilities):
        """[B, T, D] -> [B, T, D], and the probabilities when asked for."""
        query, key, value = (
            net.linear(x, f"{address}/{name}").unflatten(-1, (-1, net.head_width)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        if net.structure["query_key_norm"]:
            query, key = net.norm(query, f"{address}/query_norm"), net.norm(key, f"{address}/key_norm")
        if seen.turn is not None:
            query, key = rotate(query, *seen.turn), rotate(key, *seen.turn)
        if seen.past is not None:
            cache, layer = seen.past
            key, value = getattr(cache, "self_attention_cache", cache).update(key, value, layer)
        y, probabilities = attend_heads(net, query, key, value, seen.mask, seen.bias, need_probabilities)
        return net.linear(y.transpose(1, 2).flatten(-2), f"{address}/output"), probabilities


class CrossAttention:
    """Attention of a decoder's tokens to the encoder's output, whose keys and values a cache keeps."""

    @staticmethod
    def declare(net, address):
        """Makes the weights of one weight set."""
        c = net.structure
        width, inner, shared = c["width"], c["heads"] * net.head_width, net.groups * net.head_width
        for name, features in (("query", inner), ("key", shared), ("value", shared)):
            net.add_linear(f"{address}/{name}", width, features, c["attention_bias"])
        net.add_linear(f"{address}/output", inner, width, c["output_bias"])

    def __call__(self, net, x, address, seen, need_probabilities):
        """[B, T, D] -> [B, T, D], and the probabilities [B, H, T, M] when asked for."""
        heads = lambda y: y.unflatten(-1, (-1, net.head_width)).transpose(1, 2)  # noqa: E731
        query = heads(net.linear(x, f"{address}/query"))
        cache, layer = seen.past or (None, 0)
        if cache is not None and cache.is_updated.get(layer):
            kept = cache.cross_attention_cache.layers[layer]
            key, value = kept.keys, kept.values
        else:
            key, value = (heads(net.linear(seen.memory, f"{address}/{name}")) for name in ("key", "value"))
            if cache is not None:
                key, value = cache.cross_attention_cache.update(key, value, layer)
                cache.is_updated[layer] = True
        y, probabilities = attend_heads(net, query, key, value, seen.memory_mask, None, need_probabilities)
        return net.linear(y.transpose(1, 2).flatten(-2), f"{address}/output"), probabilities


KINDS = {"full": Attention}


def attention_kind(structure):
    """The class of the structure's kind of self-attention."""
    return KINDS["full"]

"""The PyTorch side of attention; modeling_flaxcompress.py imports it.

A kind of self-attention is a class with `declare`, which makes its weights, and `__call__`; one entry in `KINDS`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer

from .flaxcompress_formats import take


class Seen(NamedTuple):
    """What a layer sees beside its input.

    mask: keys that may be seen, [B, 1, 1 or T, S].
    bias: added to the scores, [H, T, S].
    turn: (cos, sin) of the tokens' angles, [B, 1, T, d/2].
    past: the generation cache and the layer's number in it.
    real: which of the tokens are no padding, [B, T].
    memory, memory_mask: the encoder's output [B, M, D] and which of it may be seen, [B, 1, 1, M].
    """

    mask: Any = None
    bias: Any = None
    turn: Any = None
    past: Any = None
    real: Any = None
    memory: Any = None
    memory_mask: Any = None


def rotate(x, cos, sin):
    """Turns the pairs (x_i, x_{i+d/2}) of [B, H, T, d] by their angles, in float32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def split_heads(y, width):
    """[B, T, H·d] -> [B, H, T, d]."""
    return y.unflatten(-1, (-1, width)).transpose(1, 2)


def depthwise(x, taps, causal, before=None):
    """y_t = Σ_i taps_i · x_{t-p+i} of [B, T, D], zeros beyond the ends; before: the p inputs in front of the first."""
    width = taps.shape[0]
    left = width - 1 if causal else width // 2
    front = x.new_zeros(x.shape[0], left, x.shape[2]) if before is None else before
    padded = torch.cat([front, x], 1)
    padded = F.pad(padded, (0, 0, 0, width - 1 - left)).transpose(1, 2)
    weight = taps.float().T[:, None]
    return F.conv1d(padded.float(), weight, groups=weight.shape[0]).transpose(1, 2).to(x.dtype)


def lead(x, seen, width, shift):
    """x with zeros for padding, and the width - 1 inputs in front of it from the cache (None without one).

    The cache keeps them as a layer of its own, numbered from `shift` on, so that beams reorder them too.
    """
    x = x * seen.real[..., None].to(x.dtype)
    if seen.past is None:
        return x, None
    cache, layer = seen.past
    layers = getattr(cache, "self_attention_cache", cache).layers
    while len(layers) <= shift + layer:
        layers.append(DynamicLayer())
    kept = layers[shift + layer]
    before = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    if kept.get_seq_length():
        before = kept.keys[:, 0]
    last = torch.cat([before, x], 1)[:, 1 - width :, :][:, None]
    if not kept.is_initialized:
        kept.lazy_initialization(last, last)
    kept.keys, kept.values = last, last[..., :0]
    return x, before


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
    def rotary_width(net):
        """How much of a head's query and key has rotary positions."""
        return net.scored_width

    @staticmethod
    def declare(net, address):
        """Makes the weights of one weight set."""
        c, width = net.structure, net.structure["width"]
        sizes = {"query": c["heads"] * net.scored_width, "key": net.groups * net.scored_width}
        for name, features in (*sizes.items(), ("value", net.groups * net.head_width)):
            net.add_linear(f"{address}/{name}", width, features, c["attention_bias"])
            if c["projection_kernel"]:
                net.add_taps(f"{address}/{name}_depthwise", c["projection_kernel"], width)
        net.add_linear(f"{address}/output", c["heads"] * net.head_width, width, c["output_bias"])
        if c["query_key_norm"]:
            net.add_norm(f"{address}/query_norm", net.scored_width)
            net.add_norm(f"{address}/key_norm", net.scored_width)
        for name, features in (("key", sizes["key"]), ("value", net.groups * net.head_width)):
            if c["prefix_length"]:
                net.add_vectors(f"{address}/prefix/{name}", c["prefix_length"], features)

    def __call__(self, net, x, address, seen, need_probabilities):
        """[B, T, D] -> [B, T, D], and the probabilities when asked for."""
        query, key, value = self.project(net, x, address, seen)
        if net.structure["query_key_norm"]:
            query, key = net.norm(query, f"{address}/query_norm"), net.norm(key, f"{address}/key_norm")
        if seen.turn is not None:
            query, key = rotate(query, *seen.turn), rotate(key, *seen.turn)
        if seen.past is not None:
            cache, layer = seen.past
            key, value = getattr(cache, "self_attention_cache", cache).update(key, value, layer)
        if net.structure["prefix_length"]:
            key, value, seen = self.behind_prefix(net, key, value, address, seen)
        y, probabilities = self.mix(net, query, key, value, address, seen, need_probabilities)
        return net.linear(y.transpose(1, 2).flatten(-2), f"{address}/output"), probabilities

    def project(self, net, x, address, seen):
        """Queries, keys and values, [B, heads, T, width] each."""
        names, width = ("query", "key", "value"), net.structure["projection_kernel"]
        inputs = dict.fromkeys(names, x)
        if width:
            x, before = lead(x, seen, width, net.structure["layers"])
            inputs = {name: net.depthwise(x, f"{address}/{name}_depthwise", before) for name in names}
        widths = (net.scored_width, net.scored_width, net.head_width)
        return [split_heads(net.linear(inputs[n], f"{address}/{n}"), w) for n, w in zip(names, widths, strict=True)]

    def behind_prefix(self, net, key, value, address, seen):
        """Keys and values with the trained ones in front, and what is seen of them: all, without a bias."""
        front, length = [], net.structure["prefix_length"]
        for name, own in (("key", key), ("value", value)):
            heads = split_heads(net.weight(f"{address}/prefix/{name}").to(own.dtype)[None], own.shape[-1])
            front.append(torch.cat([heads.expand(own.shape[0], -1, -1, -1), own], 2))
        bias = None if seen.bias is None else F.pad(seen.bias, (length, 0))
        return *front, seen._replace(mask=F.pad(seen.mask, (length, 0), value=True), bias=bias)

    def mix(self, net, query, key, value, address, seen, need_probabilities):
        """What tokens take from the values, [B, H, T, d], and the probabilities when asked for."""
        return attend_heads(net, query, key, value, seen.mask, seen.bias, need_probabilities)


class LinformerAttention(Attention):
    """Attention to keys and values that are projected along the sequence; the probabilities are [B, H, T, k]."""

    @staticmethod
    def declare(net, address):
        """Makes the weights of one weight set; a projection that layers share is the network's."""
        Attention.declare(net, address)
        c, kind = net.structure, net.structure["attention"]
        columns = kind["length"] * (net.groups if kind["sharing"] == "none" else 1)
        for name in {"layer": (), "key_value": ("sequence",)}.get(kind["sharing"], ("key_sequence", "value_sequence")):
            net.add_table(f"{address}/{name}/table", c["positions"], columns)

    def mix(self, net, query, key, value, address, seen, need_probabilities):
        """What tokens take from the projected values, and the probabilities when asked for."""
        sharing, real = net.structure["attention"]["sharing"], seen.real[:, None, :, None]
        at = {"layer": ("sequence",) * 2, "key_value": (f"{address}/sequence",) * 2}
        at = at.get(sharing, (f"{address}/key_sequence", f"{address}/value_sequence"))
        places = torch.arange(key.shape[2], device=key.device)
        rows = [take(net.weight(f"{a}/table"), places).to(key.dtype) for a in at]
        heads = [r.unflatten(-1, (-1, net.structure["attention"]["length"])).permute(1, 2, 0) for r in rows]
        key, value = heads[0] @ (key * real), heads[1] @ (value * real)
        every = seen.real.new_ones(1, 1, 1, key.shape[2])
        return attend_heads(net, query, key, value, every, None, need_probabilities)


class NystromAttention(Attention):
    """Softmax attention approximated from landmarks, the means of segments of a row's tokens.

    Rows of no more tokens than landmarks are exact. The probabilities are the approximated matrix [B, H, T, T].
    """

    @staticmethod
    def declare(net, address):
        """Makes the weights of one weight set."""
        Attention.declare(net, address)
        if width := net.structure["attention"]["convolution"]:
            net.add_taps(f"{address}/convolution", width, net.structure["heads"])

    def mix(self, net, query, key, value, address, seen, need_probabilities):
        """What tokens take from the values, and the probabilities when asked for."""
        c, kind = net.structure, net.structure["attention"]
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        value = value * seen.real[:, None, :, None]
        scale = query.shape[-1] ** -0.5 if c["attention_scale"] is None else c["attention_scale"]
        left, right = nystrom_factors(query.float() * scale, key.float(), seen.real, **self.sizes(kind))
        dropped = F.dropout(right, c["attention_dropout"], net.root.training)
        y = (left @ (dropped @ value.float())).to(value.dtype)
        if kind["convolution"]:
            taps = net.weight(f"{address}/convolution/taps").repeat_interleave(value.shape[-1], 1)
            flat = value.transpose(1, 2).flatten(-2)
            y = y + split_heads(depthwise(flat, taps, False), value.shape[-1])
        return y, left @ right if need_probabilities else None

    @staticmethod
    def sizes(kind):
        """Of the approximation."""
        return {"landmarks": kind["landmarks"], "iterations": kind["iterations"]}


def nystrom_factors(query, key, real, landmarks, iterations):
    """Two factors [B, H, T, m] and [B, H, m, T] whose product stands for the probabilities; queries are scaled."""
    count = real.sum(1, keepdim=True)
    segment = (real.cumsum(1) - 1) * landmarks // count.clamp(min=1)
    member = (segment[..., None] == torch.arange(landmarks, device=real.device)) & real[..., None]
    sizes = member.sum(1)
    means = (member / sizes.clamp(min=1)[:, None]).float().transpose(1, 2)[:, None]
    keep = real[:, None, :, None]
    query_mean, key_mean = means @ (query * keep), means @ (key * keep)
    filled = (sizes > 0)[:, None, None, :]
    right = masked_softmax(query_mean @ key.transpose(-1, -2), real[:, None, None, :] & filled.transpose(-1, -2))
    exact = member[:, None].float().expand(-1, query.shape[1], -1, -1)
    middle = masked_softmax(query_mean @ key_mean.transpose(-1, -2), filled & filled.transpose(-1, -2))
    left = masked_softmax(query @ key_mean.transpose(-1, -2), filled) @ pseudo_inverse(middle, iterations)
    return torch.where((count <= landmarks)[:, None, None], exact, left), right


def masked_softmax(scores, allowed):
    """Over the entries that are allowed; zeros where none is."""
    some = allowed.any(-1, keepdim=True)
    return scores.masked_fill(~(allowed | ~some), -torch.inf).softmax(-1) * some


def pseudo_inverse(a, iterations):
    """A⁺ of matrices of softmax rows, by iteration."""
    eye = torch.eye(a.shape[-1], device=a.device)
    largest = a.sum(-2).amax(-1) * a.sum(-1).amax(-1)
    z = a.transpose(-1, -2) / largest.clamp(min=torch.finfo(a.dtype).tiny)[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


class LatentAttention:
    """Multi-head latent attention: keys and values of all heads come from one latent, which the cache keeps."""

    @staticmethod
    def rotary_width(net):
        """How much of a head's query and key has rotary positions."""
        return net.structure["attention"]["rotary_width"]

    @staticmethod
    def declare(net, address):
        """Makes the weights of one weight set."""
        c, kind = net.structure, net.structure["attention"]
        query_width, rank = c["width"], kind["key_value_rank"]
        if kind["query_rank"]:
            query_width = kind["query_rank"]
            net.add_linear(f"{address}/query_latent", c["width"], query_width, c["attention_bias"])
            if kind["norms"]:
                net.add_vector(f"{address}/query_norm/scale", query_width)
        inner = kind["plain_width"] + kind["rotary_width"]
        net.add_linear(f"{address}/query", query_width, c["heads"] * inner, kind["query_bias"])
        net.add_linear(f"{address}/latent", c["width"], rank + kind["rotary_width"], c["attention_bias"])
        if kind["norms"]:
            net.add_vector(f"{address}/latent_norm/scale", rank)
        net.add_linear(f"{address}/expand", rank, c["heads"] * (kind["plain_width"] + kind["value_width"]), False)
        net.add_linear(f"{address}/output", c["heads"] * kind["value_width"], c["width"], c["output_bias"])

    def __call__(self, net, x, address, seen, need_probabilities):
        """[B, T, D] -> [B, T, D], and the probabilities when asked for."""
        kind = net.structure["attention"]
        own, turned = kind["plain_width"], kind["rotary_width"]
        narrow = x
        if kind["query_rank"]:
            narrow = self.norm(net, net.linear(x, f"{address}/query_latent"), f"{address}/query_norm")
        query = split_heads(net.linear(narrow, f"{address}/query"), own + turned)
        latent, key = net.linear(x, f"{address}/latent")[:, None].split([kind["key_value_rank"], turned], -1)
        latent = self.norm(net, latent, f"{address}/latent_norm")
        query = torch.cat([query[..., :own], self.turn(query[..., own:], kind, seen)], -1)
        key = self.turn(key, kind, seen)
        if seen.past is not None:
            cache, layer = seen.past
            latent, key = getattr(cache, "self_attention_cache", cache).update(latent, key, layer)
        expanded = split_heads(net.linear(latent[:, 0], f"{address}/expand"), own + kind["value_width"])
        keys = torch.cat([expanded[..., :own], key.expand(-1, expanded.shape[1], -1, -1)], -1)
        value = expanded[..., own:]
        y, probabilities = attend_heads(net, query, keys, value, seen.mask, seen.bias, need_probabilities)
        return net.linear(y.transpose(1, 2).flatten(-2), f"{address}/output"), probabilities

    def norm(self, net, x, address):
        """The RMS norm of a latent, computed in float32, returned in x's dtype; x itself where latents have none."""
        if not net.structure["attention"]["norms"]:
            return x
        scale = net.weight(f"{address}/scale").float()
        return F.rms_norm(x.float(), scale.shape, scale, net.structure["attention"]["norm_epsilon"]).to(x.dtype)

    def turn(self, x, kind, seen):
        """Rotary positions; the pairs lie side by side where they are interleaved."""
        if seen.turn is None or not x.shape[-1]:
            return x
        x = torch.cat([x[..., 0::2], x[..., 1::2]], -1) if kind["interleaved"] else x
        return rotate(x, *seen.turn)


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


KINDS = {
    "full": Attention,
    "latent": LatentAttention,
    "linformer": LinformerAttention,
    "nystrom": NystromAttention,
}


def attention_kind(structure):
    """The class of the structure's kind of self-attention."""
    return KINDS[(structure["attention"] or {"kind": "full"})["kind"]]

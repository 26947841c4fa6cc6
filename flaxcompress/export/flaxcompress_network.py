"""The PyTorch side of embeddings and layers; modeling_flaxcompress.py imports it."""

import functools
import math
import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .flaxcompress_attention import CrossAttention, Seen, attention_kind, depthwise, lead
from .flaxcompress_formats import build, matmul, take

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class States(NamedTuple):
    """What a stack of layers gives; fields that were not asked for, or that the structure lacks, are None."""

    last_hidden_state: torch.Tensor
    pooler_output: Any = None
    hidden_states: Any = None
    attentions: Any = None
    cross_attentions: Any = None


class Network:
    """Embeddings, layers, final norm and pooler of one stack: the encoder's, or the decoder's with its own prefix.

    The weights belong to `root`, under their addresses; `structure` is the stack's config.
    """

    def __init__(self, root, structure, formats, prefix=""):
        self.root, self.structure, self.formats, self.prefix = root, structure, formats, prefix
        c = structure
        self.head_width = c["head_width"] or c["width"] // c["heads"]
        self.scored_width = c["query_key_width"] or self.head_width
        self.groups = c["key_value_heads"] or c["heads"]
        self.narrow = c["embedding_width"] or c["width"]
        self.attention = attention_kind(structure)()
        self.cross_attention = CrossAttention()
        self._declare()

    # ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _declare(self):
        c, width = self.structure, self.structure["width"]
        if c["patches"]:
            p = c["patches"]
            self.add_linear("embedding/patch", p["channels"] * p["size"] ** 2, width)
            self.add_vector("embedding/first", width)
            self.add_table("embedding/position", 1 + (p["height"] // p["size"]) * (p["width"] // p["size"]), width)
        else:
            self._declare_tables()
        if c["embedding_width"]:
            self.add_linear("embedding/projection", self.narrow, width)
        if c["relative_buckets"]:
            self.add_table("relative_bias/table", c["relative_buckets"], c["heads"])
        if (c["attention"] or {}).get("sharing") == "layer":
            self.add_table("sequence/table", c["positions"], c["attention"]["length"])
        sets = {part: range(max(numbers) + 1) for part, numbers in c["sharing"].items()}
        for number in sets["attention"]:
            self.attention.declare(self, f"layers/{number}/attention")
        for number in sets.get("cross_attention", ()):
            self.cross_attention.declare(self, f"layers/{number}/cross_attention")
        for number in sets["feed_forward"]:
            self._declare_feed_forward(f"layers/{number}/feed_forward")
        for number in sets["norms"]:
            for name in sets:
                if name != "norms" and (name != "attention" or c["first_norm"] or number):
                    self.add_norm(f"layers/{number}/norms/{name}", width)
        if c["final_norm"]:
            self.add_norm("final_norm", width)
        if c["pooler"]:
            self.add_linear("pooler/dense", width, width)

    def _declare_tables(self):
        c = self.structure
        if c["vocabulary"]:
            self.add_table("embedding/token", c["vocabulary"], self.narrow)
        if c["position_embedding"] == "learned":
            self.add_table("embedding/position", c["positions"] + c["position_offset"], self.narrow)
        if c["segments"]:
            self.add_table("embedding/segment", c["segments"], self.narrow)
        if c["embedding_norm"]:
            self.add_norm("embedding/norm", self.narrow)

    def _declare_feed_forward(self, address):
        c, inner, bias = self.structure, self.structure["feed_forward_width"], self.structure["feed_forward_bias"]
        for name in ("gate", "up") if c["gated"] else ("up",):
            self.add_linear(f"{address}/{name}", c["width"], inner, bias)
        self.add_linear(f"{address}/down", inner, c["width"], bias)
        if c["feed_forward_kernel"]:
            self.add_taps(f"{address}/depthwise", c["feed_forward_kernel"], c["width"])

    def _add(self, address, shape, table=False):
        address = self.prefix + address
        spec = next((spec for pattern, spec in self.formats if re.fullmatch(pattern, address)), None)
        setattr(self.root, address, build(spec, shape, table))

    def add_table(self, address, rows, width):
        """An embedding table."""
        self._add(address, (rows, width), table=True)

    def add_vector(self, address, size):
        """A bias, or another vector."""
        self._add(address, (size,))

    def add_linear(self, address, n, m, bias=True):
        """A kernel [n, m] and its bias."""
        self._add(f"{address}/kernel", (n, m))
        if bias:
            self.add_vector(f"{address}/bias", m)

    def add_norm(self, address, width):
        """A norm's scale and, where the model has them, bias."""
        self.add_vector(f"{address}/scale", width)
        if self.structure["norm"] == "layer" and self.structure["norm_bias"]:
            self.add_vector(f"{address}/bias", width)

    def add_taps(self, address, width, features):
        """A depthwise convolution's weights, [k, D]."""
        self._add(f"{address}/taps", (width, features))

    def weight(self, address):
        """The parameter or module at an address."""
        return getattr(self.root, self.prefix + address)

    def has(self, address):
        """Whether there is a weight at an address."""
        return hasattr(self.root, self.prefix + address)

    def linear(self, x, address):
        """x @ kernel + bias, [*B, n] -> [*B, m]; the bias may be absent."""
        y = matmul(x, self.weight(f"{address}/kernel"))
        return y + self.weight(f"{address}/bias").to(x.dtype) if self.has(f"{address}/bias") else y

    def depthwise(self, x, address, before=None):
        """A depthwise convolution over the sequence, causal in causal models."""
        return depthwise(x, self.weight(f"{address}/taps"), self.structure["causal"], before)

    def norm(self, x, address):
        """The model's norm over the last axis, computed in float32, returned in x's dtype."""
        scale, epsilon = self.weight(f"{address}/scale").float(), self.structure["norm_epsilon"]
        if self.structure["norm"] == "rms":
            return F.rms_norm(x.float(), scale.shape, scale, epsilon).to(x.dtype)
        bias = self.weight(f"{address}/bias").float() if self.has(f"{address}/bias") else None
        return F.layer_norm(x.float(), scale.shape, scale, bias, epsilon).to(x.dtype)

    def drop(self, x):
        """Dropout between sub-layers, while training."""
        return F.dropout(x, self.structure["dropout"], self.root.training)

    # ── embeddings and positions ─────────────────────────────────────────────────────────────────────────────────

    def embed(self, ids, segments, positions, rows=None):
        """[B, T] ids -> [B, T, D] in the model's dtype; rows are the token table's where it is another stack's."""
        c = self.structure
        x = take(self.weight("embedding/token"), ids) if rows is None else rows
        x = x * c["embedding_scale"]
        if c["position_embedding"] != "none":
            if c["position_offset"]:  # tokens other than padding are counted; padding has the row before theirs
                real = ids != c["pad_token"]
                positions = real.cumsum(1) * real + c["position_offset"] - 1
            learned = c["position_embedding"] == "learned"
            x = x + (take(self.weight("embedding/position"), positions) if learned else self.sinusoids(positions))
        if c["segments"]:
            x = x + take(self.weight("embedding/segment"), torch.zeros_like(ids) if segments is None else segments)
        x = self.norm(x, "embedding/norm") if c["embedding_norm"] else x
        x = self.drop(x.to(self.root.dtype))
        return self.linear(x, "embedding/projection") if c["embedding_width"] else x

    def sinusoids(self, positions):
        """sin(p/10000^(2i/E)) of every position p for i < E/2, then the cosines."""
        steps = torch.arange(0, self.narrow, 2, dtype=torch.float64, device=positions.device) / self.narrow
        angles = positions[..., None].float() * (10_000.0**-steps).float()
        return torch.cat([angles.sin(), angles.cos()[..., : self.narrow // 2]], -1)

    def embed_pixels(self, pixels):
        """[B, C, height, width] -> [B, 1 + patches, D]: a class token, then the patches in rows."""
        p, (height, width) = self.structure["patches"], pixels.shape[2:]
        size, grid = p["size"], (p["height"] // p["size"], p["width"] // p["size"])
        if pixels.shape[1] != p["channels"] or min(height, width) < size:
            raise ValueError(
                f"pixel_values: shape {list(pixels.shape)}; wanted {p['channels']} channels, {size} pixels"
            )
        down, across = height // size, width // size
        cut = pixels[:, :, : down * size, : across * size].unflatten(3, (across, size)).unflatten(2, (down, size))
        cut = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # rows of patches, each channel by channel
        x = self.linear(cut.to(self.root.dtype), "embedding/patch")
        places = take(self.weight("embedding/position"), torch.arange(1 + grid[0] * grid[1], device=pixels.device))
        first, rest = places[:1], places[1:]
        if (down, across) != grid:
            image = rest.unflatten(0, grid).permute(2, 0, 1)[None]
            rest = F.interpolate(image, (down, across), mode="bicubic", align_corners=False)[0].flatten(1).T
        x = torch.cat([self.weight("embedding/first").to(x.dtype).expand(x.shape[0], 1, -1), x], 1)
        return self.drop(x + torch.cat([first, rest]).to(x.dtype))

    def rotation(self, positions, local):
        """(cos, sin) [B, 1, T, d/2] of the angles by which pairs are turned; None without rotary positions."""
        c = self.structure
        if c["rotary"] is None:
            return None
        r, width = c["rotary"], self.attention.rotary_width(self)
        own = local and r["local_theta"] is not None
        steps = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
        frequency = 1.0 / (r["local_theta"] if own else r["theta"]) ** steps
        if r["scaling"] == "linear" and not own:
            frequency = frequency / r["factor"]
        elif r["scaling"] == "llama3" and not own:  # low frequencies are divided, high ones left, a blend between
            turns = r["original_positions"] * frequency / (2 * math.pi)
            low, high = r["low_frequency_factor"], r["high_frequency_factor"]
            smooth = ((turns - low) / (high - low)).clamp(0, 1)
            frequency = (1 - smooth) * frequency / r["factor"] + smooth * frequency
        elif r["scaling"] == "yarn" and not own:  # the same, but the blend is by the place of the frequency
            ends = [r["original_positions"] / (r[f"{n}_frequency_factor"] * 2 * math.pi) for n in ("high", "low")]
            first, last = (width * math.log(end) / (2 * math.log(r["theta"])) for end in ends)
            first, last = (math.floor(first), math.ceil(last)) if r["whole"] else (first, last)
            first, last = max(first, 0), min(last, width - 1)
            last = first + 0.001 if first == last else last
            divided = ((torch.arange(width // 2, device=positions.device) - first) / (last - first)).clamp(0, 1)
            frequency = divided * frequency / r["factor"] + (1 - divided) * frequency
        angles = positions[:, None, :, None].float() * frequency.float()
        return angles.cos() * r["magnitude"], angles.sin() * r["magnitude"]

    def relative_bias(self, length, keys, device):
        """A bias on the scores of the last `length` tokens by key - query, [H, T, S], buckets wider far away."""
        c = self.structure
        offset = torch.arange(keys, device=device)[None, :] - torch.arange(keys - length, keys, device=device)[:, None]
        count = c["relative_buckets"] if c["causal"] else c["relative_buckets"] // 2
        away = -offset.clamp(max=0) if c["causal"] else offset.abs()
        near, distance = count // 2, c["relative_distance"]
        far = torch.log(away.clamp(min=1).float() / near) / math.log(distance / near) * (count - near)
        buckets = torch.where(away < near, away, (near + far.long()).clamp(max=count - 1))
        buckets = buckets if c["causal"] else buckets + (offset > 0) * count
        return take(self.weight("relative_bias/table"), buckets).permute(2, 0, 1)

    # ── layers ───────────────────────────────────────────────────────────────────────────────────────────────────

    def masks(self, mask, length):
        """Which keys [B, 1, 1 or T, S] the last `length` tokens see in global and in local layers, by mask [B, S]."""
        c, keys = self.structure, mask.shape[1]
        place = torch.arange(keys, device=mask.device)
        distance = place[keys - length :, None] - place[None, :]
        allowed = mask.ne(0)[:, None, None, :]
        if c["causal"]:
            allowed = allowed & (distance >= 0)
        return allowed, allowed & (distance.abs() <= c["window"]) if c["window"] else allowed

    def __call__(
        self,
        ids,
        mask=None,
        segments=None,
        positions=None,
        past=None,
        rows=None,
        memory=None,
        memory_mask=None,
        need_states=False,
        need_attentions=False,
    ):
        """Everything from token ids, or pixels, to `States`.

        past is a transformers Cache of earlier tokens, which the mask then covers too; memory [B, M, D] what a decoder
        attends to, by memory_mask [B, M].
        """
        c = self.structure
        if c["patches"]:
            x = self.embed_pixels(ids)
            mask = ids.new_ones(x.shape[:2])
            return self.run(x, mask, torch.arange(x.shape[1])[None], Seen(), None, need_states, need_attentions)
        length, before = ids.shape[1], 0 if past is None else past.get_seq_length()
        if before + length > c["positions"]:
            raise ValueError(f"input_ids: {before + length} tokens, but the model has {c['positions']} positions")
        for name, given, columns in (("attention_mask", mask, before + length), ("token_type_ids", segments, length)):
            if given is not None and given.shape != (ids.shape[0], columns):
                raise ValueError(f"{name}: shape {list(given.shape)} is not {[ids.shape[0], columns]}")
        mask = ids.new_ones(ids.shape[0], before + length) if mask is None else mask
        if positions is None:
            positions = torch.arange(before, before + length, device=ids.device)[None]
        x = self.embed(ids, segments, positions, rows)
        bias = self.relative_bias(length, before + length, ids.device) if c["relative_buckets"] else None
        if memory is not None:
            memory_mask = ids.new_ones(memory.shape[:2]) if memory_mask is None else memory_mask
            memory_mask = memory_mask.ne(0)[:, None, None, :]
        seen = Seen(bias=bias, memory=memory, memory_mask=memory_mask)
        return self.run(x, mask, positions, seen, past, need_states, need_attentions)

    def run(self, x, mask, positions, seen, past, need_states, need_attentions):
        """All layers, the final norm and the pooler."""
        c = self.structure
        masks = self.masks(mask, x.shape[1])
        turns = [self.rotation(positions, local) for local in (False, True)]
        seen = seen._replace(real=mask[:, -x.shape[1] :].ne(0))
        states, attentions, crossed = [x], [], []
        for layer in range(c["layers"]):
            at = {part: f"layers/{sets[layer]}/{part}" for part, sets in c["sharing"].items()}
            local = c["local"][layer]
            kept = None if past is None else (past, layer)
            x, *probabilities = self.layer(
                x, at, seen._replace(mask=masks[local], turn=turns[local], past=kept), need_attentions
            )
            states.append(x)
            attentions.append(probabilities[0])
            crossed.append(probabilities[1])
        if c["final_norm"]:
            x = states[-1] = self.norm(x, "final_norm")
        return States(
            x,
            torch.tanh(self.linear(x[:, 0], "pooler/dense")) if c["pooler"] else None,
            tuple(states) if need_states else None,
            tuple(attentions) if need_attentions else None,
            tuple(crossed) if need_attentions and "cross_attention" in c["sharing"] else None,
        )

    def layer(self, x, at, seen, need_attentions):
        """One layer: its output and, when asked for, its probabilities on tokens and on the encoder's."""
        x, probabilities = self.residual(
            x, f"{at['norms']}/attention", lambda x: self.attention(self, x, at["attention"], seen, need_attentions)
        )
        crossed = None
        if "cross_attention" in at:
            attend = lambda x: self.cross_attention(self, x, at["cross_attention"], seen, need_attentions)  # noqa: E731
            x, crossed = self.residual(x, f"{at['norms']}/cross_attention", attend)
        feed = lambda x: (self.feed_forward(x, at["feed_forward"], seen), None)  # noqa: E731
        x, _ = self.residual(x, f"{at['norms']}/feed_forward", feed)
        return x, probabilities, crossed

    def residual(self, x, norm, sublayer):
        """x with what a sublayer makes of it added, normalised before or after."""
        if self.structure["norm_place"] == "pre":
            y, other = sublayer(self.norm(x, norm) if self.has(f"{norm}/scale") else x)
            return x + self.drop(y), other
        y, other = sublayer(x)
        return self.norm(x + self.drop(y), norm), other

    def feed_forward(self, x, address, seen):
        """down(activation(up(x))), or gated: down(activation(gate(x)) * up(x)); a convolution may come before."""
        if width := self.structure["feed_forward_kernel"]:
            x, before = lead(x, seen, width, 2 * self.structure["layers"])
            x = self.depthwise(x, f"{address}/depthwise", before)
        activate, up = ACTIVATIONS[self.structure["activation"]], self.linear(x, f"{address}/up")
        y = activate(self.linear(x, f"{address}/gate")) * up if self.structure["gated"] else activate(up)
        return self.linear(y, f"{address}/down")

    def head_activation(self, x):
        """The head's own activation, or that of the layers."""
        return ACTIVATIONS[self.structure["head_activation"] or self.structure["activation"]](x)

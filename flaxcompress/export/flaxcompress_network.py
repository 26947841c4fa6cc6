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
    "tanh": torch.tanh,
}


SUBLAYERS = ("attention", "cross_attention", "feed_forward")


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
        self.kernels = {}  # {address of a linear map: (n, m)}
        self.deltas = self.bases = None  # the addresses of the running layer's deltas and bases
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
        inner = c["feed_forward_width"]  # a list has one for each weight set
        for number in sets["feed_forward"]:
            self._declare_feed_forward(
                f"layers/{number}/feed_forward", inner[number] if isinstance(inner, list) else inner
            )
        for number in sets["norms"]:
            for name in self.norm_names(number):
                self.add_norm(f"layers/{number}/norms/{name}", width)
            for name in c["adapters"]["after"] if c["adapters"] else ():
                self.add_linear(f"layers/{number}/norms/{name}_adapter/down_project", width, c["adapters"]["width"])
                self.add_linear(f"layers/{number}/norms/{name}_adapter/up_project", c["adapters"]["width"], width)
        for number in sets.get("deltas", ()):
            self._declare_deltas(number, c["sharing"]["deltas"].index(number))
        for layer, number in enumerate(c["sharing"].get("bases", ())):
            self._declare_bases(number, layer)
        if c["final_norm"]:
            self.add_norm("final_norm", width)
        if c["pooler"]:
            self.add_linear("pooler/dense", width, width)

    def norm_names(self, number):
        """The norms of a weight set: one per sublayer, two in a sandwich, one for all where parallel ones share it."""
        c = self.structure
        sublayers = [name for name in SUBLAYERS if name in c["sharing"]]
        names = sublayers[:1] if c["parallel"] == "one_norm" else list(sublayers)
        if not c["first_norm"] and number == 0:
            names.remove("attention")
        return names + [f"{name}_after" for name in sublayers if c["norm_place"] == "sandwich"]

    def _declare_tables(self):
        c = self.structure
        if c["vocabulary"]:
            self.add_table("embedding/token", c["vocabulary"], self.narrow)
        if c["position_embedding"] == "learned":
            self.add_table(
                "embedding/position", c["positions"] + c["prefix_length"] + c["position_offset"], self.narrow
            )
        if c["segments"]:
            self.add_table("embedding/segment", c["segments"], self.narrow)
        if c["embedding_norm"]:
            self.add_norm("embedding/norm", self.narrow)
        if c["lexicon"]:
            self.add_table("embedding/lexicon/table", c["lexicon"]["entries"], c["lexicon"]["width"])
            self.add_linear("embedding/lexicon/projection", c["lexicon"]["width"], self.narrow, bias=False)
            self.add_linear("embedding/lexicon/gate", 2 * self.narrow, self.narrow)

    def _declare_feed_forward(self, address, inner):
        c, bias = self.structure, self.structure["feed_forward_bias"]
        for name in ("gate", "up") if c["gated"] else ("up",):
            self.add_linear(f"{address}/{name}", c["width"], inner, bias)
        self.add_linear(f"{address}/down", inner, c["width"], bias)
        if c["feed_forward_kernel"]:
            self.add_taps(f"{address}/depthwise", c["feed_forward_kernel"], c["width"])

    def _declare_deltas(self, number, layer):
        """Two factors, and a bias, for each linear map that they change, shaped as in a layer that uses them."""
        c, deltas = self.structure, self.structure["deltas"]
        for part in SUBLAYERS:
            base = f"layers/{c['sharing'][part][layer]}/" if part in c["sharing"] else None
            for address, (n, m) in list(self.kernels.items()):
                target = address.removeprefix(base or "/")
                if base and target.startswith(f"{part}/") and any(re.fullmatch(p, target) for p in deltas["targets"]):
                    self._add(f"layers/{number}/deltas/{target}/down", (n, deltas["rank"]))
                    self._add(f"layers/{number}/deltas/{target}/up", (deltas["rank"], m))
                    if deltas.get("bias") and hasattr(self.root, f"{self.prefix}{address}/bias"):
                        self.add_vector(f"layers/{number}/deltas/{target}/bias", m)

    def _declare_bases(self, number, layer):
        """The left factors that a layer's kernels leave out."""
        c = self.structure
        for part in SUBLAYERS:
            base = f"layers/{c['sharing'][part][layer]}/" if part in c["sharing"] else None
            for address, (n, _) in list(self.kernels.items()):
                spec, path = self._spec(f"{address}/kernel") or {}, address.removeprefix(base or "/")
                shared = base and path.startswith(f"{part}/") and (spec.get("left") or {}).get("kind") == "basis"
                if shared and not self.has(f"layers/{number}/bases/{path}/kernel"):
                    self._add(f"layers/{number}/bases/{path}/kernel", (n, spec["rank"]))

    def _spec(self, address):
        """The format of the matrix at an address."""
        return next((spec for pattern, spec in self.formats if re.fullmatch(pattern, self.prefix + address)), None)

    def _add(self, address, shape, table=False):
        setattr(self.root, self.prefix + address, build(self._spec(address), shape, table))

    def add_table(self, address, rows, width):
        """An embedding table."""
        self._add(address, (rows, width), table=True)

    def add_vector(self, address, size):
        """A bias, or another vector."""
        self._add(address, (size,))

    def add_linear(self, address, n, m, bias=True):
        """A kernel [n, m] and its bias."""
        self.kernels[address] = n, m
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
        self.add_vectors(f"{address}/taps", width, features)

    def add_vectors(self, address, count, size):
        """Several vectors, [count, size]."""
        self._add(address, (count, size))

    def weight(self, address):
        """The parameter or module at an address."""
        return getattr(self.root, self.prefix + address)

    def has(self, address):
        """Whether there is a weight at an address."""
        return hasattr(self.root, self.prefix + address)

    def linear(self, x, address):
        """x @ kernel + bias, [*B, n] -> [*B, m]; the bias may be absent."""
        kernel, path = self.weight(f"{address}/kernel"), address.split("/", 2)[-1]
        shared = getattr(kernel, "left", kernel) is None
        y = kernel(x, self.weight(f"{self.bases}/{path}/kernel")) if shared else matmul(x, kernel)
        y = y + self.weight(f"{address}/bias").to(x.dtype) if self.has(f"{address}/bias") else y
        delta = f"{self.deltas}/{path}"
        if self.deltas is None or not self.has(f"{delta}/down"):
            return y
        deltas = self.structure["deltas"]
        scale = 1.0 if deltas["alpha"] is None else deltas["alpha"] / deltas["rank"]
        y = y + matmul(matmul(x, self.weight(f"{delta}/down")), self.weight(f"{delta}/up")) * scale
        return y + self.weight(f"{delta}/bias").to(x.dtype) if self.has(f"{delta}/bias") else y

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

    def embed(self, ids, segments, positions, rows=None, features=None):
        """[B, T] ids -> [B, T, D] in the model's dtype; rows are the token table's where it is another stack's."""
        c = self.structure
        x = take(self.weight("embedding/token"), ids) if rows is None else rows
        x = x * c["embedding_scale"]
        if c["position_embedding"] != "none":
            if c["position_offset"]:  # tokens other than padding are counted; padding has the row before theirs
                real = ids != c["pad_token"]
                positions = (real.cumsum(1) + c["prefix_length"]) * real + c["position_offset"] - 1
            learned = c["position_embedding"] == "learned"
            x = x + (take(self.weight("embedding/position"), positions) if learned else self.sinusoids(positions))
        if c["segments"]:
            x = x + take(self.weight("embedding/segment"), torch.zeros_like(ids) if segments is None else segments)
        x = x if features is None else self.fuse(x, features)
        x = self.norm(x, "embedding/norm") if c["embedding_norm"] else x
        x = self.drop(x.to(self.root.dtype))
        return self.linear(x, "embedding/projection") if c["embedding_width"] else x

    def fuse(self, x, features):
        """x [B, T, E] with the vectors of a lexicon's terms, through a gate, where feature ids [B, T] are above 0."""
        if not self.structure["lexicon"]:
            raise ValueError("feature_ids: the model has no lexicon")
        if features.shape != x.shape[:2]:
            raise ValueError(f"feature_ids: shape {list(features.shape)} is not {list(x.shape[:2])}")
        vectors = take(self.weight("embedding/lexicon/table"), (features - 1).clamp(min=0))
        added = self.linear(vectors, "embedding/lexicon/projection")
        gate = torch.sigmoid(self.linear(torch.cat([x, added], -1), "embedding/lexicon/gate"))
        return torch.where(features[..., None] > 0, x + gate * added, x)

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
        r = c["rotary"]
        width = self.attention.rotary_width(self) if r["pairs"] is None else r["pairs_of"]
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
        if r["pairs"] is not None:
            frequency = frequency[r["pairs"]]
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
        features=None,
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
        positions = positions + c["prefix_length"]
        x = self.embed(ids, segments, positions, rows, features)
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
            self.deltas, self.bases = at.get("deltas"), at.get("bases")
            rate = c["layer_dropout"] * (layer + 1) / c["layers"]
            x, *probabilities = self.layer(
                x, at, seen._replace(mask=masks[local], turn=turns[local], past=kept), need_attentions, rate
            )
            states.append(x)
            attentions.append(probabilities[0])
            crossed.append(probabilities[1])
        self.deltas = self.bases = None
        if c["final_norm"]:
            x = states[-1] = self.norm(x, "final_norm")
        return States(
            x,
            torch.tanh(self.linear(x[:, 0], "pooler/dense")) if c["pooler"] else None,
            tuple(states) if need_states else None,
            tuple(attentions) if need_attentions else None,
            tuple(crossed) if need_attentions and "cross_attention" in c["sharing"] else None,
        )

    def layer(self, x, at, seen, need_attentions, rate):
        """One layer: its output and, when asked for, its probabilities on tokens and on the encoder's."""
        norms, parallel = at["norms"], self.structure["parallel"] != "none"
        attend = lambda x: self.attention(self, x, at["attention"], seen, need_attentions)  # noqa: E731
        feed = lambda x: (self.feed_forward(x, at["feed_forward"], seen), None)  # noqa: E731
        together = {"attention": attend, "feed_forward": feed} if parallel else {"attention": attend}
        x, other = self.residual(x, norms, together, rate)
        crossed = {}
        if "cross_attention" in at:
            attend = lambda x: self.cross_attention(self, x, at["cross_attention"], seen, need_attentions)  # noqa: E731
            x, crossed = self.residual(x, norms, {"cross_attention": attend}, rate)
        if not parallel:
            x, _ = self.residual(x, norms, {"feed_forward": feed}, rate)
        return x, other["attention"], crossed.get("cross_attention")

    def residual(self, x, norms, sublayers, rate):
        """x with what sublayers make of it added, normalised before, after, or both; and what else they returned.

        While training, an example does with probability `rate` without what one adds.
        """
        c, other = self.structure, {}
        before, total = c["norm_place"] != "post", x * c["residual_scale"]
        for name, sublayer in sublayers.items():
            norm = f"{norms}/{'attention' if c['parallel'] == 'one_norm' else name}"
            y, other[name] = sublayer(self.norm(x, norm) if before and self.has(f"{norm}/scale") else x)
            y = self.adapted(self.drop(y), f"{norms}/{name}_adapter")
            y = self.norm(y, f"{norms}/{name}_after") if c["norm_place"] == "sandwich" else y
            if self.root.training and rate:
                y = y * (torch.rand(len(y), 1, 1, device=y.device) >= rate) / (1 - rate)
            total = total + y
        return total if before else self.norm(total, f"{norms}/{next(iter(sublayers))}"), other

    def adapted(self, y, address):
        """y + up(activation(down(y))) where there is an adapter."""
        if not self.has(f"{address}/down_project/kernel"):
            return y
        activate = ACTIVATIONS[self.structure["adapters"]["activation"]]
        return y + self.linear(activate(self.linear(y, f"{address}/down_project")), f"{address}/up_project")

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

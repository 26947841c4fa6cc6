"""The PyTorch side of a folder that flaxcompress saved; needs torch and transformers only.

    AutoModel.from_pretrained(FOLDER, trust_remote_code=True)

`config.flaxcompress` holds the structure, and the rules that give every matrix its storage format. Parameters are named
as in model.safetensors: "embedding/norm/scale" is a tensor of the model itself, "embedding/token.left.values" one of
the module "embedding/token". A matrix is a *kernel* [n, m] (multiplied: x @ W) or a *table* [V, D] (rows looked up).
A new format is one class (or function) and one entry in `KINDS`.
"""

import functools
import math
import re

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    TokenClassifierOutput,
)


class FlaxCompressConfig(PretrainedConfig):
    """Holds flaxcompress's own config, a JSON object, under the key `flaxcompress`."""

    model_type = "flaxcompress"

    def __init__(self, flaxcompress=None, **kwargs):
        self.flaxcompress = flaxcompress or {}
        super().__init__(**kwargs)


# ── weight formats ───────────────────────────────────────────────────────────────────────────────────────────────────


def build(spec, shape, table):
    """An empty matrix of `shape` in the format that the JSON object `spec` describes; None is dense.

    The result is a parameter (a dense matrix) or a module with `forward(x)`, `attend(x)` and `take(ids)`; call them
    through the functions `matmul`, `attend` and `take`.
    """
    spec = spec or {"kind": "dense"}
    if spec["kind"] not in KINDS:
        raise ValueError(f"format {spec['kind']!r} is not among {sorted(KINDS)}: the folder needs a newer flaxcompress")
    return KINDS[spec["kind"]](spec, shape, table)


def matmul(x, w):
    """x @ W, in x's dtype."""
    return x @ w.to(x.dtype) if isinstance(w, torch.Tensor) else w(x)


def attend(x, w):
    """x @ Wᵀ, in x's dtype."""
    return x @ w.to(x.dtype).T if isinstance(w, torch.Tensor) else w.attend(x)


def take(w, ids):
    """The rows `ids` of a table, in float32."""
    return F.embedding(ids, w).float() if isinstance(w, torch.Tensor) else w.take(ids)


def stored(dtype):
    """The storage dtype of a name; None (whatever dtype the model is loaded in) for float32."""
    return None if dtype == "float32" else getattr(torch, dtype)


PER_WORD = {1: 8, 2: 4, 3: 8, 4: 2, 8: 1}  # codes in one word of whole bytes, by bits
OFFSET = {1: 0.5, 2: 1.5, 3: 3.5, 4: 8.0, 8: 128.0}  # code - level of packed codes, by bits


def unpack(packed, bits, count):
    """The first `count` codes of every row of bytes, int32; the first code lies in the lowest bits."""
    n_bytes = PER_WORD[bits] * bits // 8
    parts = packed.unflatten(-1, (-1, n_bytes)).to(torch.int32)
    words = sum(parts[..., i] << (8 * i) for i in range(n_bytes))
    codes = torch.stack([(words >> (bits * i)) & (2**bits - 1) for i in range(PER_WORD[bits])], -1)
    return codes.flatten(-2)[..., :count]


def packed_width(count, bits):
    """Bytes that `count` codes take in one row."""
    return -(-count // PER_WORD[bits]) * PER_WORD[bits] * bits // 8


def dense(spec, shape, table):
    """A plain tensor, stored in the spec's dtype."""
    return nn.Parameter(torch.zeros(shape, dtype=stored(spec.get("dtype", "float32"))))


class LowRank(nn.Module):
    """W = left @ right, [n, R] · [R, m], never multiplied out; each factor in a format of its own."""

    def __init__(self, spec, shape, table):
        super().__init__()
        n, m = shape
        self.left = build(spec.get("left"), (n, spec["rank"]), table)
        self.right = build(spec.get("right"), (spec["rank"], m), False)

    def forward(self, x):
        return matmul(matmul(x, self.left), self.right)

    def attend(self, x):
        return attend(attend(x, self.right), self.left)

    def take(self, ids):
        return matmul(take(self.left, ids), self.right)


class Rows(nn.Module):
    """A matrix held as coded rows: the rows of a table, or the outputs of a kernel (so that W is rowsᵀ).

    A subclass stores `values` [rows, bytes] and `scale` [rows, groups], and defines `decode`.
    """

    def __init__(self, spec, table, rows, row_bytes, groups=1, integer=torch.uint8):
        super().__init__()
        self.table = table
        self.register_buffer("values", torch.zeros(rows, row_bytes, dtype=integer))
        self.scale = nn.Parameter(torch.zeros(rows, groups, dtype=getattr(torch, spec.get("scale_dtype", "float16"))))

    def decode(self, values, scale):
        """Some rows in float32 from their codes and scales."""
        raise NotImplementedError

    def matrix(self, dtype):
        """W, [n, m]."""
        rows = self.decode(self.values, self.scale).to(dtype)
        return rows if self.table else rows.T

    def forward(self, x):
        return x @ self.matrix(x.dtype)

    def attend(self, x):
        return x @ self.matrix(x.dtype).T

    def take(self, ids):
        if not self.table:
            return F.embedding(ids, self.matrix(torch.float32))
        return self.decode(F.embedding(ids, self.values), F.embedding(ids, self.scale))  # type: ignore


class Quantized(Rows):
    """w = level·scale, one scale per group of neighbours in a row; 8 bits are int8 levels, fewer are packed codes."""

    def __init__(self, spec, shape, table):
        bits, group = spec.get("bits", 8), spec.get("group")
        rows, columns = shape if table else shape[::-1]
        groups = -(-columns // group) if group else 1
        integer = torch.int8 if bits == 8 else torch.uint8
        super().__init__(spec, table, rows, packed_width(columns, bits), groups, integer)
        self.bits, self.group, self.columns = bits, group, columns

    def decode(self, values, scale):
        scale = scale.float()
        if self.group:
            scale = scale.repeat_interleave(self.group, -1)[..., : self.columns]
        if self.bits == 8:
            return values.float() * scale
        return (unpack(values, self.bits, self.columns).float() - OFFSET[self.bits]) * scale


class Banded(Rows):
    """A table w = step(bits)·level·scale: bands of columns, each with its own number of bits; one scale per row."""

    STEP = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3534, 8: 0.0310}  # noqa: RUF012

    def __init__(self, spec, shape, table):
        widths = [packed_width(columns, bits) if bits else 0 for columns, bits in spec["bands"]]
        super().__init__(spec, table, shape[0], sum(widths))
        self.bands = [(width, columns, bits) for width, (columns, bits) in zip(widths, spec["bands"], strict=True)]

    def decode(self, values, scale):
        parts, start = [], 0
        for width, columns, bits in self.bands:  # a band of 0 bits is all zeros
            codes = values[..., start : start + width]
            zeros = scale.new_zeros(*values.shape[:-1], columns, dtype=torch.float32)
            parts.append((unpack(codes, bits, columns) - OFFSET[bits]) * self.STEP[bits] if bits else zeros)
            start += width
        return torch.cat(parts, -1) * scale.float()


class Bucketed(nn.Module):
    """A table whose rows fall into tiers, each tier a table in a format of its own.

    `assignment` holds each row's tier, packed; a tier's table holds its rows in the order of their ids.
    """

    def __init__(self, spec, shape, table):
        super().__init__()
        self.rows, self.sizes = shape[0], [tier["rows"] for tier in spec["tiers"]]
        self.bits = 2 if len(self.sizes) <= 4 else 4
        self.tiers = nn.Module()  # children "0", "1", …: parameters or modules
        for number, tier in enumerate(spec["tiers"]):
            setattr(self.tiers, str(number), build(tier["format"], (tier["rows"], shape[1]), True))
        self.register_buffer("assignment", torch.zeros(packed_width(self.rows, self.bits), dtype=torch.uint8))

    def tables(self):
        """(first place, size, table) of every tier when the tables are laid end to end."""
        start = 0
        for number, size in enumerate(self.sizes):
            yield start, size, getattr(self.tiers, str(number))
            start += size

    def places(self):
        """[V]: where each id's row lies in the tables laid end to end."""
        tier = unpack(self.assignment, self.bits, self.rows)
        places = torch.zeros_like(tier, dtype=torch.int64)
        for number, (start, _, _) in enumerate(self.tables()):
            mine = tier == number
            places = torch.where(mine, start + mine.cumsum(0) - 1, places)
        return places

    def attend(self, x):
        return torch.cat([attend(x, table) for _, _, table in self.tables()], -1)[..., self.places()]

    def take(self, ids):
        place = F.embedding(ids, self.places()[:, None])[..., 0]
        out = 0.0
        for start, size, table in self.tables():
            row = place - start
            mine = (row >= 0) & (row < size)
            out = out + torch.where(mine[..., None], take(table, row.clamp(0, size - 1)), 0.0)
        return out


KINDS = {"dense": dense, "low_rank": LowRank, "quantized": Quantized, "banded": Banded, "bucketed": Bucketed}


# ── the network ──────────────────────────────────────────────────────────────────────────────────────────────────────

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def rotate(x, cos, sin):
    """Turns the pairs (x_i, x_{i+d/2}) of [B, H, T, d] by their angles, in float32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class FlaxCompressModel(PreTrainedModel):
    """A transformer whose matrices may be in any format and whose layers may share weight sets.

    Made from a config alone, its weights are zeros: they come from a saved folder.
    """

    config_class = FlaxCompressConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    heads: tuple = ()  # those that a class with a head can run; the plain model takes any
    compute: torch.Tensor

    def __init__(self, config):
        if self.heads and config.flaxcompress["head"] not in self.heads:
            wanted, found = " or ".join(self.heads), config.flaxcompress["head"]
            raise ValueError(f"{type(self).__name__} needs the head {wanted}, but this folder's head is {found!r}")
        super().__init__(config)
        c = self.structure = config.flaxcompress
        self.register_buffer("compute", torch.empty(0), persistent=False)  # empty: only its dtype matters
        width, inner, narrow = c["width"], c["feed_forward_width"], c["embedding_width"] or c["width"]
        if c["patches"]:
            p = c["patches"]
            self._linear("embedding/patch", p["channels"] * p["size"] ** 2, width)
            self._vector("embedding/first", width)
            self._table("embedding/position", 1 + (p["height"] // p["size"]) * (p["width"] // p["size"]), width)
        else:
            self._tables(c, narrow)
        if c["embedding_width"]:
            self._linear("embedding/projection", narrow, width)
        if c["relative_buckets"]:
            self._table("relative_bias/table", c["relative_buckets"], c["heads"])
        sets = {part: range(max(numbers) + 1) for part, numbers in c["sharing"].items()}
        head_width, groups = c["head_width"] or width // c["heads"], c["key_value_heads"] or c["heads"]
        for number in sets["attention"]:
            address = f"layers/{number}/attention"
            self._linear(f"{address}/query", width, c["heads"] * head_width, c["attention_bias"])
            self._linear(f"{address}/key", width, groups * head_width, c["attention_bias"])
            self._linear(f"{address}/value", width, groups * head_width, c["attention_bias"])
            self._linear(f"{address}/output", c["heads"] * head_width, width, c["output_bias"])
            if c["query_key_norm"]:
                self._norm(f"{address}/query_norm", head_width)
                self._norm(f"{address}/key_norm", head_width)
        for number in sets["feed_forward"]:
            for name in ("gate", "up") if c["gated"] else ("up",):
                self._linear(f"layers/{number}/feed_forward/{name}", width, inner, c["feed_forward_bias"])
            self._linear(f"layers/{number}/feed_forward/down", inner, width, c["feed_forward_bias"])
        for number in sets["norms"]:
            if c["first_norm"] or number:
                self._norm(f"layers/{number}/norms/attention", width)
            self._norm(f"layers/{number}/norms/feed_forward", width)
        if c["final_norm"]:
            self._norm("final_norm", width)
        if c["pooler"]:
            self._linear("pooler/dense", width, width)
        if c["head"] == "masked_lm":  # the plain model keeps the head too, so that saving it loses nothing
            self._linear("head/transform", width, narrow, c["head_bias"])
            self._norm("head/norm", narrow)
            self._vector("head/bias", c["vocabulary"])
        elif c["head"] == "replaced_token":
            self._linear("head/transform", width, width)
            self._linear("head/output", width, 1)
        elif c["classes"]:
            self._linear("head/output", width, c["classes"])
        elif c["head"] == "causal_lm" and not c["tied"]:
            self._linear("head/output", width, c["vocabulary"], bias=False)
        self.post_init()

    def _tables(self, c, width):
        """What token ids are looked up in."""
        self._table("embedding/token", c["vocabulary"], width)
        if c["position_embedding"] == "learned":
            self._table("embedding/position", c["positions"] + c["position_offset"], width)
        if c["segments"]:
            self._table("embedding/segment", c["segments"], width)
        if c["embedding_norm"]:
            self._norm("embedding/norm", width)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """As in transformers, but a tensor that the folder lacks is an error: there is nothing to put in its place."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{args[0] if args else cls.__name__}: {len(missing)} tensors are missing: {missing[:4]}")
        return (model, info) if output_loading_info else model

    @property
    def dtype(self):
        """What activations are computed in, which some weights may be stored more narrowly than."""
        return self.compute.dtype

    def _weight(self, address, shape, table=False):
        rules = self.structure["formats"]
        spec = next((spec for pattern, spec in rules if re.fullmatch(pattern, address)), None)
        setattr(self, address, build(spec, shape, table))

    def _table(self, address, rows, width):
        self._weight(address, (rows, width), table=True)

    def _vector(self, address, size):
        self._weight(address, (size,))

    def _linear(self, address, n, m, bias=True):
        self._weight(f"{address}/kernel", (n, m))
        if bias:
            self._vector(f"{address}/bias", m)

    def _norm(self, address, width):
        self._vector(f"{address}/scale", width)
        if self.structure["norm"] == "layer" and self.structure["norm_bias"]:
            self._vector(f"{address}/bias", width)

    def weight(self, address):
        """The parameter or module at an address."""
        return getattr(self, address)

    def linear(self, x, address):
        """x @ kernel + bias, [*B, n] -> [*B, m]; the bias may be absent."""
        y = matmul(x, self.weight(f"{address}/kernel"))
        bias = getattr(self, f"{address}/bias", None)
        return y if bias is None else y + bias.to(x.dtype)

    def norm(self, x, address):
        """The model's norm over the last axis, computed in float32, returned in x's dtype."""
        scale, epsilon = self.weight(f"{address}/scale").float(), self.structure["norm_epsilon"]
        if self.structure["norm"] == "rms":
            return F.rms_norm(x.float(), scale.shape, scale, epsilon).to(x.dtype)
        bias = getattr(self, f"{address}/bias", None)
        return F.layer_norm(x.float(), scale.shape, scale, None if bias is None else bias.float(), epsilon).to(x.dtype)

    def drop(self, x):
        """Dropout between sub-layers, while training."""
        return F.dropout(x, self.structure["dropout"], self.training)

    def embed(self, ids, segments, positions):
        """[B, T] ids -> [B, T, D] in the model's dtype."""
        c = self.structure
        x = take(self.weight("embedding/token"), ids)
        if c["position_embedding"] == "learned":
            if c["position_offset"]:  # tokens other than padding are counted; padding has the row before theirs
                real = ids != c["pad_token"]
                positions = real.cumsum(1) * real + c["position_offset"] - 1
            x = x + take(self.weight("embedding/position"), positions)
        if c["segments"]:
            x = x + take(self.weight("embedding/segment"), torch.zeros_like(ids) if segments is None else segments)
        x = self.norm(x, "embedding/norm") if c["embedding_norm"] else x
        x = self.drop(x.to(self.dtype))
        return self.linear(x, "embedding/projection") if c["embedding_width"] else x

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
        x = self.linear(cut.to(self.dtype), "embedding/patch")
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
        r, width = c["rotary"], c["head_width"] or c["width"] // c["heads"]
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
        angles = positions[:, None, :, None].float() * frequency.float()
        return angles.cos(), angles.sin()

    def relative_bias(self, length, device):
        """A bias on the scores by key - query, [H, T, T]: half of the buckets for each direction, wider far away."""
        half = self.structure["relative_buckets"] // 2
        near, distance = half // 2, self.structure["relative_distance"]
        place = torch.arange(length, device=device)
        offset = place[None, :] - place[:, None]
        away = offset.abs()
        far = torch.log(away.clamp(min=1).float() / near) / math.log(distance / near) * (half - near)
        far = (near + far.long()).clamp(max=half - 1)
        buckets = (offset > 0) * half + torch.where(away < near, away, far)
        return take(self.weight("relative_bias/table"), buckets).permute(2, 0, 1)

    def attention(self, x, mask, bias, turn, address, need_probabilities, past=None):
        """Multi-head self-attention and, when asked for, its probabilities [B, H, T, S]; and the keys and values.

        mask is [B, 1, 1 or T, S], bias [H, T, S] or None, turn what `rotation` returned, past earlier keys and values.
        """
        c, dropout = self.structure, self.structure["attention_dropout"] if self.training else 0.0
        groups = c["key_value_heads"] or c["heads"]
        query, key, value = (
            self.linear(x, f"{address}/{name}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for name, heads in (("query", c["heads"]), ("key", groups), ("value", groups))
        )
        if c["query_key_norm"]:
            query, key = self.norm(query, f"{address}/query_norm"), self.norm(key, f"{address}/key_norm")
        if turn is not None:
            query, key = rotate(query, *turn), rotate(key, *turn)
        if past is not None:
            key, value = past(key, value)
        if groups != c["heads"]:
            key, value = (t.repeat_interleave(c["heads"] // groups, 1) for t in (key, value))
        # A row without any key would be 0/0: it sees every key, and its result is zeroed.
        some = mask.any(-1, keepdim=True)
        allowed = mask | ~some
        if need_probabilities:
            scores = (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).float()
            scores = scores if bias is None else scores + bias
            probabilities = scores.masked_fill(~allowed, -torch.inf).softmax(-1) * some
            y = F.dropout(probabilities, dropout).to(x.dtype) @ value
        else:
            probabilities = None
            added = allowed if bias is None else bias.to(x.dtype).masked_fill(~allowed, -torch.inf)
            y = F.scaled_dot_product_attention(query, key, value, attn_mask=added, dropout_p=dropout) * some
        return self.linear(y.transpose(1, 2).flatten(-2), f"{address}/output"), probabilities

    def masks(self, mask, length):
        """Which keys [B, 1, 1 or T, S] the last `length` tokens see in global and in local layers, by mask [B, S]."""
        c, keys = self.structure, mask.shape[1]
        place = torch.arange(keys, device=mask.device)
        distance = place[keys - length :, None] - place[None, :]
        allowed = mask.ne(0)[:, None, None, :]
        if c["causal"]:
            allowed = allowed & (distance >= 0)
        return allowed, allowed & (distance.abs() <= c["window"]) if c["window"] else allowed

    def encode(self, ids, mask, segments, need_states, need_attentions, positions=None, past=None):
        """All layers and the pooler; None for an output means what the config says.

        past is a transformers Cache of earlier tokens, which the mask then covers too.
        """
        if self.structure["patches"]:
            x = self.embed_pixels(ids)
            mask = ids.new_ones(x.shape[:2])
            return self._layers(x, mask, None, need_states, need_attentions, torch.arange(x.shape[1])[None], None)
        c, length = self.structure, ids.shape[1]
        before = 0 if past is None else past.get_seq_length()
        if before + length > c["positions"]:
            raise ValueError(f"input_ids: {before + length} tokens, but the model has {c['positions']} positions")
        for name, given, columns in (("attention_mask", mask, before + length), ("token_type_ids", segments, length)):
            if given is not None and given.shape != (ids.shape[0], columns):
                raise ValueError(f"{name}: shape {list(given.shape)} is not {[ids.shape[0], columns]}")
        mask = ids.new_ones(ids.shape[0], before + length) if mask is None else mask
        if positions is None:
            positions = torch.arange(before, before + length, device=ids.device)[None]
        x = self.embed(ids, segments, positions)
        bias = self.relative_bias(length, ids.device) if c["relative_buckets"] else None
        return self._layers(x, mask, bias, need_states, need_attentions, positions, past)

    def _layers(self, x, mask, bias, need_states, need_attentions, positions, past):
        c, length = self.structure, x.shape[1]
        need_states = self.config.output_hidden_states if need_states is None else need_states
        need_attentions = self.config.output_attentions if need_attentions is None else need_attentions
        masks, turns = self.masks(mask, length), [self.rotation(positions, local) for local in (False, True)]
        states: tuple = (x,)
        attentions: tuple = ()
        for layer in range(c["layers"]):
            at = {part: f"layers/{sets[layer]}/{part}" for part, sets in c["sharing"].items()}
            local = c["local"][layer]
            keep = None if past is None else functools.partial(past.update, layer_idx=layer)
            need = (at["attention"], need_attentions, keep)
            x, probabilities = self.layer(x, (masks[local], bias, turns[local], *need), at)
            states += (x,) if need_states else ()
            attentions += (probabilities,)
        if c["final_norm"]:
            x = self.norm(x, "final_norm")
            states = (*states[:-1], x)
        return BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=torch.tanh(self.linear(x[:, 0], "pooler/dense")) if c["pooler"] else None,
            hidden_states=states if need_states else None,
            attentions=attentions if need_attentions else None,
        )

    def layer(self, x, attend, at):
        """One layer, normalised before or after attention and feed-forward; `attend` are `attention`'s arguments."""
        norms, pre = at["norms"], self.structure["norm_place"] == "pre"
        before = pre and hasattr(self, f"{norms}/attention/scale")
        y, probabilities = self.attention(self.norm(x, f"{norms}/attention") if before else x, *attend)
        x = x + self.drop(y)
        x = x if pre else self.norm(x, f"{norms}/attention")
        y = self.drop(self.feed_forward(self.norm(x, f"{norms}/feed_forward") if pre else x, at["feed_forward"]))
        return x + y if pre else self.norm(x + y, f"{norms}/feed_forward"), probabilities

    def feed_forward(self, x, address):
        """down(activation(up(x))), or gated: down(activation(gate(x)) * up(x))."""
        activate, up = ACTIVATIONS[self.structure["activation"]], self.linear(x, f"{address}/up")
        y = activate(self.linear(x, f"{address}/gate")) * up if self.structure["gated"] else activate(up)
        return self.linear(y, f"{address}/down")

    def head_activation(self, x):
        """The head's own activation, or that of the layers."""
        return ACTIVATIONS[self.structure["head_activation"] or self.structure["activation"]](x)

    def _answer(self, out, return_dict):
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        pixel_values=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
    ):
        """[B, T] token ids, or pixel_values, -> last_hidden_state [B, T, D], pooler_output [B, D] if there is one."""
        x = input_ids if pixel_values is None else pixel_values
        out = self.encode(x, attention_mask, token_type_ids, output_hidden_states, output_attentions)
        return self._answer(out, return_dict)


class FlaxCompressForMaskedLM(FlaxCompressModel):
    """Vocabulary logits [B, T, V], float32, from a transform and the token table (tied)."""

    heads = ("masked_lm",)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        labels=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
    ):
        """[B, T] token ids -> logits [B, T, V]; with labels, also the mean loss over those that are not -100."""
        out = self.encode(input_ids, attention_mask, token_type_ids, output_hidden_states, output_attentions)
        y = self.linear(out.last_hidden_state, "head/transform")
        y = self.norm(self.head_activation(y), "head/norm")
        logits = attend(y, self.weight("embedding/token")).float() + self.weight("head/bias").float()
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        out = MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions)
        return self._answer(out, return_dict)


class FlaxCompressForPreTraining(FlaxCompressModel):
    """A logit [B, T], float32, for each token: whether a generator put it there (ELECTRA's discriminator)."""

    heads = ("replaced_token",)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        labels=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
    ):
        """[B, T] token ids -> logits [B, T]; with labels (1: replaced), also the mean loss over real tokens."""
        out = self.encode(input_ids, attention_mask, token_type_ids, output_hidden_states, output_attentions)
        y = self.head_activation(self.linear(out.last_hidden_state, "head/transform"))
        logits = self.linear(y, "head/output")[..., 0].float()
        loss = None
        if labels is not None:
            real = torch.ones_like(labels) if attention_mask is None else attention_mask
            loss = F.binary_cross_entropy_with_logits(logits[real != 0], labels[real != 0].float())
        out = TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions
        )
        return self._answer(out, return_dict)


class FlaxCompressForCausalLM(FlaxCompressModel, GenerationMixin):
    """Logits [B, T, V], float32, of the next token, from the token table (tied) or a kernel of the head's own."""

    heads = ("causal_lm",)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
        logits_to_keep=0,
        **unused,
    ):
        """[B, T] token ids -> logits [B, T, V]; with labels, also the mean loss of predicting each token."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        need = (output_hidden_states, output_attentions, position_ids, past_key_values)
        out = self.encode(input_ids, attention_mask, None, *need)
        x: torch.Tensor = out.last_hidden_state  # type: ignore
        x = x[:, -logits_to_keep:] if logits_to_keep else x
        tied = self.structure["tied"]
        logits = (attend(x, self.weight("embedding/token")) if tied else self.linear(x, "head/output")).float()
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        out = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return self._answer(out, return_dict)


class FlaxCompressForClassification(FlaxCompressModel):
    """Class logits, float32: [B, C] of a text or an image, [B, T, C] of every token."""

    heads = ("sequence_classification", "token_classification")

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        pixel_values=None,
        labels=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
    ):
        """Token ids [B, T], or pixel_values, -> logits; with labels, also the mean loss where they are not -100."""
        x = input_ids if pixel_values is None else pixel_values
        out = self.encode(x, attention_mask, token_type_ids, output_hidden_states, output_attentions)
        y: torch.Tensor = out.last_hidden_state  # type: ignore
        if self.structure["head"] == "sequence_classification":
            y = y[:, 0] if out.pooler_output is None else out.pooler_output
        logits = self.linear(y, "head/output").float()
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        kept = {"hidden_states": out.hidden_states, "attentions": out.attentions}
        return self._answer(TokenClassifierOutput(loss=loss, logits=logits, **kept), return_dict)


class FlaxCompressForQuestionAnswering(FlaxCompressModel):
    """Logits [B, T], float32, of an answer's first and last token."""

    heads = ("span",)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        start_positions=None,
        end_positions=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
    ):
        """[B, T] token ids -> start_logits and end_logits; with positions, also their mean loss."""
        out = self.encode(input_ids, attention_mask, token_type_ids, output_hidden_states, output_attentions)
        start, end = self.linear(out.last_hidden_state, "head/output").float().unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (F.cross_entropy(start, start_positions) + F.cross_entropy(end, end_positions)) / 2
        kept = {"hidden_states": out.hidden_states, "attentions": out.attentions}
        out = QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, **kept)
        return self._answer(out, return_dict)

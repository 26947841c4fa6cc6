"""The PyTorch side of weight formats; modeling_flaxcompress.py imports it.

A matrix is a *kernel* [n, m] (multiplied: x @ W) or a *table* [V, D] (rows looked up). A new format is one class (or
function) and one entry in `KINDS`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


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


class TensorTrain(nn.Module):
    """W[i, j] = G_1[:, i_1, j_1, :] · … · G_d[:, i_d, j_d, :], i and j in mixed radix, rows padded up to Π n_k."""

    def __init__(self, spec, shape, table):
        super().__init__()
        self.rows, self.padded = shape[0], math.prod(spec["rows"])
        ranks, self.cores = [1, *spec["ranks"], 1], nn.Module()  # children "0", "1", …: [r_{k-1}, n_k, m_k, r_k]
        for k, (n, m) in enumerate(zip(spec["rows"], spec["columns"], strict=True)):
            core = torch.zeros(ranks[k], n, m, ranks[k + 1], dtype=stored(spec.get("dtype", "float32")))
            setattr(self.cores, str(k), nn.Parameter(core))

    def train_of(self):
        """The cores in order."""
        return [getattr(self.cores, str(k)) for k in range(len(list(self.cores.parameters())))]

    def contract(self, x, step, axis):
        """x [*B, Π a_k] -> [*B, Π b_k], core by core."""
        y = x.reshape(-1, 1, x.shape[-1])
        for core in self.train_of():
            y = y.unflatten(-1, (core.shape[axis], -1))
            y = torch.einsum(step, y, core.to(x.dtype)).flatten(0, 1)
        return y.reshape(*x.shape[:-1], -1)

    def forward(self, x):
        return self.contract(F.pad(x, (0, self.padded - self.rows)), "brnz,rnms->bmsz", 1)

    def attend(self, x):
        return self.contract(x, "brmz,rnms->bnsz", 2)[..., : self.rows]

    def take(self, ids):
        y, below = torch.ones(*ids.shape, 1, 1, device=ids.device), self.padded
        for core in self.train_of():
            below //= core.shape[1]
            slices = core.float()[:, ids // below % core.shape[1]]  # [r, *B, m_k, s]
            y = torch.einsum("...ar,r...ms->...ams", y, slices).flatten(-3, -2)
        return y[..., 0]


KINDS = {
    "dense": dense,
    "low_rank": LowRank,
    "quantized": Quantized,
    "banded": Banded,
    "bucketed": Bucketed,
    "tensor_train": TensorTrain,
}

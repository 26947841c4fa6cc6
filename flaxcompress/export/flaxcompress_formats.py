"""The PyTorch side of weight formats; modeling_flaxcompress.py imports it.

A matrix is a *kernel* [n, m] (multiplied: x @ W) or a *table* [V, D] (rows looked up). A new format is one class (or
function) and one entry in `KINDS`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .flaxcompress_decomposed import CP, TensorTrain, Tucker, stored


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


PER_WORD = {1: 8, 2: 4, 3: 8, 4: 2, 5: 8, 6: 4, 8: 1}  # codes in one word of whole bytes, by bits
OFFSET = {1: 0.5, 2: 1.5, 3: 3.5, 4: 8.0, 5: 16.0, 6: 32.0, 8: 128.0}  # code - level of packed codes, by bits


def unpack(packed, bits, count):
    """The first `count` codes of every row of bytes, int32; the first code lies in the lowest bits."""
    n_bytes = PER_WORD[bits] * bits // 8
    parts = F.pad(packed.unflatten(-1, (-1, n_bytes)).to(torch.int32), (0, 1))
    pairs = parts[..., :-1] | parts[..., 1:] << 8  # a code lies in one byte, or in that and the next
    starts = [bits * i for i in range(PER_WORD[bits])]
    codes = torch.stack([(pairs[..., at // 8] >> at % 8) & (2**bits - 1) for at in starts], -1)
    return codes.flatten(-2)[..., :count]


def packed_width(count, bits):
    """Bytes that `count` codes take in one row."""
    return -(-count // PER_WORD[bits]) * PER_WORD[bits] * bits // 8


def dense(spec, shape, table):
    """A plain tensor, stored in the spec's dtype."""
    return nn.Parameter(torch.zeros(shape, dtype=stored(spec.get("dtype", "float32"))))


def basis(spec, shape, table):
    """A left factor that stands elsewhere: whoever multiplies by the whole gives it."""
    return None


class LowRank(nn.Module):
    """W = left @ right, [n, R] · [R, m], never multiplied out; each factor in a format of its own."""

    def __init__(self, spec, shape, table):
        super().__init__()
        n, m = shape
        self.left = build(spec.get("left"), (n, spec["rank"]), table)
        self.right = build(spec.get("right"), (spec["rank"], m), False)

    def forward(self, x, basis=None):
        return matmul(matmul(x, self.left if basis is None else basis), self.right)

    def attend(self, x):
        return attend(attend(x, self.right), self.left)

    def take(self, ids):
        return matmul(take(self.left, ids), self.right)


class Adapted(nn.Module):
    """W = base + scale·delta, each in a format of its own; `magnitude`, where there is one, are its columns' norms."""

    def __init__(self, spec, shape, table):
        super().__init__()
        self.scale = spec.get("scale", 1.0)
        self.base = build(spec.get("base"), shape, table)
        self.delta = build(spec.get("delta"), shape, table)
        self.rows, self.table = shape[0], table
        self.magnitude = nn.Parameter(torch.zeros(shape[1])) if spec.get("magnitude") else None

    def scaled(self, y):
        """y with its columns multiplied by magnitude/norm, the norm without a gradient."""
        if self.magnitude is None:
            return y
        with torch.no_grad():
            device = self.magnitude.device
            if self.table:
                every = torch.arange(self.rows, device=device)
                parts = [take(w, every) for w in (self.base, self.delta)]
            else:
                every = torch.eye(self.rows, device=device)
                parts = [matmul(every, w) for w in (self.base, self.delta)]
            norm = (parts[0] + self.scale * parts[1]).float().norm(dim=0)
        return y * (self.magnitude / norm.clamp(min=torch.finfo(norm.dtype).tiny)).to(y.dtype)

    def forward(self, x):
        return self.scaled(matmul(x, self.base) + self.scale * matmul(x, self.delta))

    def attend(self, x):
        x = self.scaled(x)
        return attend(x, self.base) + self.scale * attend(x, self.delta)

    def take(self, ids):
        return self.scaled(take(self.base, ids) + self.scale * take(self.delta, ids))


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


class Scaled(Rows):
    """w = level·scale, one scale per group of neighbours in a row."""

    def __init__(self, spec, shape, table, bits, dtype=torch.uint8):
        rows, columns = shape if table else shape[::-1]
        group = spec.get("group")
        groups = -(-columns // group) if group else 1
        super().__init__(spec, table, rows, packed_width(columns, bits), groups, dtype)
        self.group, self.columns = group, columns

    def levels(self, values):
        """The levels of stored values."""
        raise NotImplementedError(f"{type(self).__name__}.levels")

    def decode(self, values, scale):
        scale = scale.float()
        if self.group:
            scale = scale.repeat_interleave(self.group, -1)[..., : self.columns]
        return self.levels(values) * scale


class Quantized(Scaled):
    """Integers: 8 bits are int8 levels, fewer are packed codes."""

    def __init__(self, spec, shape, table):
        bits = spec.get("bits", 8)
        super().__init__(spec, shape, table, bits, torch.int8 if bits == 8 else torch.uint8)
        self.bits = bits

    def levels(self, values):
        if self.bits == 8:
            return values.float()
        return unpack(values, self.bits, self.columns).float() - OFFSET[self.bits]


class FP8(Scaled):
    """Floating point in 8 bits, e4m3: the bits of each number."""

    def __init__(self, spec, shape, table):
        super().__init__(spec, shape, table, 8)

    def levels(self, values):
        return values.view(torch.float8_e4m3fn).float()


class NF4(Scaled):
    """NormalFloat in 4 bits: 16 quantiles of a normal distribution."""

    LEVELS = (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )

    def __init__(self, spec, shape, table):
        super().__init__(spec, shape, table, 4)

    def levels(self, values):
        return torch.tensor(self.LEVELS, device=values.device)[unpack(values, 4, self.columns).long()]


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


class Kept(nn.Module):
    """A matrix of which some entries are stored: their values are a table, or a kernel, dense or quantized."""

    def __init__(self, shape, table):
        super().__init__()
        self.table = table
        self.rows, self.columns = shape if table else shape[::-1]

    def store(self, spec, held):
        """Makes the matrix of values; `held` is its shape in a table."""
        self.values = build(spec.get("values"), held if self.table else held[::-1], self.table)

    def stored(self):
        """The values as they lie in a table."""
        values = self.values.matrix(torch.float32) if isinstance(self.values, nn.Module) else self.values.float()  # type: ignore
        return values if self.table else values.T

    def decode(self, ids):
        """The rows `ids` in float32."""
        raise NotImplementedError

    def matrix(self, device):
        """W, [n, m], in float32."""
        rows = self.decode(torch.arange(self.rows, device=device))
        return rows if self.table else rows.T

    def forward(self, x):
        return x @ self.matrix(x.device).to(x.dtype)

    def attend(self, x):
        return x @ self.matrix(x.device).to(x.dtype).T

    def take(self, ids):
        return self.decode(ids) if self.table else F.embedding(ids, self.matrix(ids.device))


class Sparse(Kept):
    """One bit for every entry, and the values of the kept ones, row after row, in blocks of 64."""

    def __init__(self, spec, shape, table):
        super().__init__(shape, table)
        self.store(spec, (-(-spec["kept"] // 64), 64))
        self.register_buffer("mask", torch.zeros(self.rows, packed_width(self.columns, 1), dtype=torch.uint8))

    def decode(self, ids):
        counts = unpack(self.mask, 1, self.columns).sum(-1)
        kept = unpack(self.mask[ids], 1, self.columns).long()  # type: ignore
        places = (counts.cumsum(0) - counts)[ids][..., None] + kept.cumsum(-1) - 1
        return self.stored().reshape(-1)[places.clamp(min=0)] * kept


class SemiStructured(Kept):
    """N of every M neighbours in a row, each with its place among them."""

    def __init__(self, spec, shape, table):
        super().__init__(shape, table)
        self.n, self.m = spec["n"], spec["m"]
        self.bits, self.kept = (self.m - 1).bit_length(), self.columns // self.m * self.n
        self.store(spec, (self.rows, self.kept))
        places = torch.zeros(self.rows, packed_width(self.kept, self.bits), dtype=torch.uint8)
        self.register_buffer("places", places)

    def decode(self, ids):
        values = self.stored()[ids].unflatten(-1, (-1, self.n))
        places = unpack(self.places[ids], self.bits, self.kept).long().unflatten(-1, (-1, self.n))  # type: ignore
        return values.new_zeros(*values.shape[:-1], self.m).scatter(-1, places, values).flatten(-2)


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


KINDS = {
    "dense": dense,
    "low_rank": LowRank,
    "basis": basis,
    "adapted": Adapted,
    "quantized": Quantized,
    "nf4": NF4,
    "fp8": FP8,
    "banded": Banded,
    "bucketed": Bucketed,
    "sparse": Sparse,
    "semi_structured": SemiStructured,
    "tensor_train": TensorTrain,
    "cp": CP,
    "tucker": Tucker,
}

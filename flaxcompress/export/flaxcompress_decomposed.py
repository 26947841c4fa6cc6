"""Matrices as factors of a tensor (tensor trains, CP, Tucker) in PyTorch; part of a saved folder's code."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def stored(dtype):
    """The storage dtype of a name; None (whatever dtype the model is loaded in) for float32."""
    return None if dtype == "float32" else getattr(torch, dtype)


class Decomposed(nn.Module):
    """A matrix as factors of a tensor, rows and columns in mixed radix, rows padded up to Π n_k.

    Multiplied by through the factors where that takes fewer operations, and otherwise through the matrix, multiplied
    back.
    """

    def __init__(self, spec, shape):
        super().__init__()
        self.shape, self.sizes, self.dtype = shape, (spec["rows"], spec["columns"]), spec.get("dtype", "float32")

    def empty(self, *shape):
        """A stored array."""
        return nn.Parameter(torch.zeros(shape, dtype=stored(self.dtype)))

    def through(self, x, transposed):
        """x @ W, or x @ Wᵀ, through the factors; x with zeros for the rows that pad W."""
        raise NotImplementedError(f"{type(self).__name__}.through")

    def matrix(self):
        """W, [n, m], in float32."""
        raise NotImplementedError(f"{type(self).__name__}.matrix")

    def chain(self, transposed):
        """Operations of `through` per row of x."""
        raise NotImplementedError(f"{type(self).__name__}.chain")

    def build(self):
        """Operations of `matrix`."""
        raise NotImplementedError(f"{type(self).__name__}.build")

    def multiply(self, x, transposed):
        """x @ W, or x @ Wᵀ."""
        saved = 2 * math.prod(self.shape) - self.chain(transposed)
        if saved < 0 and x.numel() // x.shape[-1] * -saved > self.build():
            w = self.matrix().to(x.dtype)
            return x @ (w.T if transposed else w)
        short = 0 if transposed else math.prod(self.sizes[0]) - self.shape[0]
        return self.through(F.pad(x, (0, short)), transposed)[..., : self.shape[0 if transposed else 1]]

    def forward(self, x):
        return self.multiply(x, False)

    def attend(self, x):
        return self.multiply(x, True)

    def digits(self, ids):
        """The digits of row numbers, the most significant first."""
        below, found = math.prod(self.sizes[0]), []
        for size in self.sizes[0]:
            below //= size
            found.append(ids // below % size)
        return found


class TensorTrain(Decomposed):
    """W[i, j] = G_1[:, i_1, j_1, :] · … · G_d[:, i_d, j_d, :]."""

    def __init__(self, spec, shape, table):
        super().__init__(spec, shape)
        ranks, self.cores = [1, *spec["ranks"], 1], nn.Module()  # children "0", "1", …: [r_{k-1}, n_k, m_k, r_k]
        for k, (n, m) in enumerate(zip(*self.sizes, strict=True)):
            setattr(self.cores, str(k), self.empty(ranks[k], n, m, ranks[k + 1]))

    def train_of(self):
        """The cores in order."""
        return [getattr(self.cores, str(k)) for k in range(len(self.sizes[0]))]

    def chain(self, transposed):
        of, to = (2, 1) if transposed else (1, 2)
        left, done, flops = math.prod(self.sizes[of - 1]), 1, 0
        for core in self.train_of():
            left //= core.shape[of]
            flops += 2 * done * core.numel() * left
            done *= core.shape[to]
        return flops

    def build(self):
        done, flops = 1, 0
        for core in self.train_of():
            flops += 2 * done * core.numel()
            done *= core.shape[1] * core.shape[2]
        return flops

    def through(self, x, transposed):
        y, step = x.reshape(-1, 1, x.shape[-1]), "brmz,rnms->bnsz" if transposed else "brnz,rnms->bmsz"
        for core in self.train_of():
            y = y.unflatten(-1, (core.shape[2 if transposed else 1], -1))
            y = torch.einsum(step, y, core.to(x.dtype)).flatten(0, 1)
        return y.reshape(*x.shape[:-1], -1)

    def matrix(self):
        y = self.train_of()[0].new_ones(1, 1, 1, dtype=torch.float32)
        for core in self.train_of():
            y = torch.einsum("abr,rnms->anbms", y, core.float()).flatten(2, 3).flatten(0, 1)
        return y[: self.shape[0], :, 0]

    def take(self, ids):
        y = torch.ones(*ids.shape, 1, 1, device=ids.device)
        for core, digit in zip(self.train_of(), self.digits(ids), strict=True):
            y = torch.einsum("...ar,r...ms->...ams", y, core.float()[:, digit]).flatten(-3, -2)
        return y[..., 0]


class Modes(Decomposed):
    """A tensor with a factor for every mode, those of the rows first: [size, rank]."""

    def __init__(self, spec, shape, ranks):
        super().__init__(spec, shape)
        self.factors = nn.Module()  # children "0", "1", …
        for k, size in enumerate((*self.sizes[0], *self.sizes[1])):
            setattr(self.factors, str(k), self.empty(size, ranks[k]))

    def half(self, columns):
        """The factors of the columns, or of the rows."""
        start = len(self.sizes[0]) if columns else 0
        return [getattr(self.factors, str(start + k)) for k in range(len(self.sizes[columns]))]


class CP(Modes):
    """W[i, j] = Σ_r A_1[i_1, r] · … · B_1[j_1, r] · …"""

    def __init__(self, spec, shape, table):
        self.rank = spec["rank"]
        super().__init__(spec, shape, [self.rank] * (len(spec["rows"]) + len(spec["columns"])))

    def spread_flops(self, columns):
        done, flops = 1, 0
        for size in self.sizes[columns][:-1]:
            done *= size
            flops += done * self.rank
        return flops + 2 * math.prod(self.sizes[columns]) * self.rank

    def chain(self, transposed):
        left, flops = math.prod(self.sizes[transposed]), 0
        for size in self.sizes[transposed]:
            flops += 2 * left * self.rank
            left //= size
        return flops + self.spread_flops(not transposed)

    def build(self):
        return 2 * math.prod(self.shape) * self.rank

    def spread(self, y, columns):
        """[B, R] -> [B, Π b_k], the sum over R with the last factor."""
        *first, last = self.half(columns)
        y = y[:, None]
        for factor in first:
            y = (y[:, :, None] * factor.to(y.dtype)).flatten(1, 2)
        return torch.einsum("bzr,mr->bzm", y, last.to(y.dtype)).flatten(1)

    def through(self, x, transposed):
        y = x.reshape(-1, x.shape[-1], 1)
        for k, factor in enumerate(self.half(transposed)):
            y = y.reshape(len(y), len(factor), -1, y.shape[-1])
            y = torch.einsum("bazr,ar->bzr" if k else "bazo,ar->bzr", y, factor.to(x.dtype))
        return self.spread(y[:, 0], not transposed).reshape(*x.shape[:-1], -1)

    def matrix(self):
        rows = self.half(False)[0].float()
        for factor in self.half(False)[1:]:
            rows = (rows[:, None] * factor.float()).flatten(0, 1)
        return self.spread(rows[: self.shape[0]], True)

    def take(self, ids):
        y = torch.ones(*ids.shape, self.rank, device=ids.device)
        for factor, digit in zip(self.half(False), self.digits(ids), strict=True):
            y = y * factor.float()[digit]
        return self.spread(y.flatten(0, -2), True).reshape(*ids.shape, -1)


class Tucker(Modes):
    """W[i, j] = Σ G[p_1 …, q_1 …] · A_1[i_1, p_1] · … · B_1[j_1, q_1] · …"""

    def __init__(self, spec, shape, table):
        ranks = spec["ranks"]
        super().__init__(spec, shape, ranks)
        self.core, split = self.empty(*ranks), len(spec["rows"])
        self.ranks = (ranks[:split], ranks[split:])

    def flops(self, columns, shrinking):
        sizes, ranks = self.sizes[columns], self.ranks[columns]
        before, after = (sizes, ranks) if shrinking else (ranks, sizes)
        return sum(2 * math.prod(after[: k + 1]) * math.prod(before[k:]) for k in range(len(sizes)))

    def chain(self, transposed):
        return self.flops(transposed, True) + 2 * self.core.numel() + self.flops(not transposed, False)

    def build(self):
        rows = math.prod(self.ranks[1]) * self.flops(False, False)
        return rows + self.shape[0] * self.flops(True, False)

    def by_modes(self, y, columns, shrinking):
        """[B, Π a_k] -> [B, Π b_k], one mode after the other; each goes to the end."""
        for factor in self.half(columns):
            y = y.reshape(len(y), factor.shape[0 if shrinking else 1], -1)
            y = torch.einsum("baz,ap->bzp" if shrinking else "bqz,cq->bzc", y, factor.to(y.dtype)).flatten(1)
        return y

    def through(self, x, transposed):
        core = self.core.reshape(math.prod(self.ranks[0]), -1).to(x.dtype)
        y = self.by_modes(x.reshape(-1, x.shape[-1]), transposed, True) @ (core.T if transposed else core)
        return self.by_modes(y, not transposed, False).reshape(*x.shape[:-1], -1)

    def matrix(self):
        core = self.core.reshape(math.prod(self.ranks[0]), -1).float()
        left = self.by_modes(core.T, False, False).T[: self.shape[0]]
        return self.by_modes(left, True, False)

    def take(self, ids):
        at = self.digits(ids.reshape(-1))
        first, *others = (factor.float()[digit] for factor, digit in zip(self.half(False), at, strict=True))
        y = first @ self.core.float().flatten(1)
        for chosen in others:
            y = torch.einsum("bp,bpz->bz", chosen, y.reshape(*chosen.shape, -1))
        return self.by_modes(y, True, False).reshape(*ids.shape, -1)

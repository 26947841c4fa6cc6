"""Prices without data: what a layout may look like before anything is measured, for a plan."""

from __future__ import annotations

import dataclasses

import numpy as np

from flaxcompress import tree
from flaxcompress.compress.factorize_embedding import TOKEN
from flaxcompress.compress.kernel_offers import Menu, Offer, undominated, ways_of
from flaxcompress.compress.solve import Prices
from flaxcompress.compress.table_offers import TableCurve, layout_sizes, whole_bytes
from flaxcompress.compress.walk import walked_kernels
from flaxcompress.config import ModelConfig
from flaxcompress.model import abstract_flat

# Of a value in the table beside one in a kernel. So weighed, tables and kernels of sentence encoders get about the bits
# that measured vectors ask for: 4 and 2 bits, 3 and 1.5, 2 and 0.5.
_TABLE = 0.1


def guess_prices(config: ModelConfig, actions: tuple[str, ...], menu: Menu) -> Prices:
    """Losses as of values that are alike: rounding to b bits costs 4⁻ᵇ each, and low ranks most of all."""
    flat = abstract_flat(config)
    walked = walked_kernels(config)
    kernels = {}
    for address in tree.select(flat, r"layers/\d+/.*/kernel"):
        if address in walked:
            n, m = flat[address].shape
            priced = [dataclasses.replace(way, loss=n * m * _guess(way, n, m)) for way in ways_of((n, m), menu)]
            kernels[address] = undominated(priced)
    table = None
    if "table" in actions and TOKEN in flat:
        vocabulary, width = flat[TOKEN].shape
        sizes = np.asarray(layout_sizes(vocabulary, width), np.float64)
        losses = _TABLE * vocabulary * width * 0.25 ** (8 * sizes / (vocabulary * width))
        table = TableCurve(sizes, losses, (whole_bytes(vocabulary, width), losses[-1] / 4))
    return Prices(kernels, table, menu, "a guess")


def _guess(way: Offer, n: int, m: int) -> float:
    if way.rank is None:
        return 0.0 if way.bits is None else 0.25**way.bits * (1.0 + (way.group or n) / n)
    return 1.0 - way.rank * (n + m - way.rank) / (n * m) + (0.0 if way.bits is None else 0.25**way.bits)

"""Choosing bits for a size: how the bytes are split between the layers' kernels and the token table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flaxcompress.compress.factorize_embedding import TOKEN, FactorizeEmbedding
from flaxcompress.compress.quantize import Quantize
from flaxcompress.compress.step import Step
from flaxcompress.compress.trim import Trim
from flaxcompress.formats import QuantizedSpec, nbytes, to_tensors
from flaxcompress.model import Model, abstract_flat

_KERNELS = r"layers/\d+/.*/kernel"
_GROUP = 64
# (average bits of the layers' kernels, what each may get, least average bits of the table that go with them), finest
# first. The table bits are where measured sentence vectors lose about as much by the table as by the kernels.
_LADDER = (
    (8.0, (8,), 5.0),
    (4.0, (3, 4, 8), 1.9),
    (3.33, (2, 3, 4), 1.6),
    (3.0, (2, 3, 4), 1.5),
    (2.333, (2, 3, 4), 1.2),
    (2.06, (2, 3, 4), 0.5),
)


def steps_for_target(model: Model, target_bytes: int) -> list[Step]:
    """Steps whose result fits `target_bytes`: the finest kernels that leave the table its share, the rest to the table.

    Raises ValueError when the smallest layout is larger, naming its size.
    """
    trim = Trim(positions="limit", pooler="unused", dtype="float16")
    config = trim.resolve(model).plan(model.config)
    smallest = 0
    for average, choices, least in _LADDER:
        if average == 8:
            quantize = Quantize(bits=8, pattern=_KERNELS)
        else:
            quantize = Quantize(average_bits=average, choices=choices, group=_GROUP, pattern=_KERNELS)
        flat = abstract_flat(quantize.plan(config))
        table = flat[TOKEN].shape
        values = table[0] * table[1]
        rest = sum(nbytes(node) for address, node in flat.items() if address != TOKEN) + _header(flat)
        share = 8 * (target_bytes - rest) / values
        smallest = rest + int(values * least / 8)
        if share < least:
            continue
        if average == 8 and target_bytes - rest >= table[0] * QuantizedSpec(bits=8).row_bytes(table[1]):
            return [trim, Quantize(bits=8, pattern=rf"{_KERNELS}|{re.escape(TOKEN)}", rounding="mse")]
        budget = min(target_bytes - rest, int(values * 7.5 / 8))
        return [trim, FactorizeEmbedding(target_bytes=budget, weighting="fisher"), quantize]
    raise ValueError(
        f"target of {target_bytes / 1e6:.2f} MB cannot be reached; the smallest that these methods reach is "
        f"{smallest / 1e6:.2f} MB"
    )


def _header(flat: Mapping[str, Any]) -> int:
    """At most the bytes of the file's header: names, shapes and checksums, and room for the table's tiers."""
    names = [name for address, node in flat.items() for name in to_tensors(node, address)]
    return sum(2 * len(name) + 110 for name in names) + 5000

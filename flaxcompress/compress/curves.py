"""The curves of `flaxcompress sensitivity`: every matrix alone, the best choice by size, and recipes beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import numpy as np

from flaxcompress import storage, tree
from flaxcompress.compress.allocate import allocated_sizes, range_of_sizes
from flaxcompress.compress.answers import Answers
from flaxcompress.compress.calibrate import Calibration
from flaxcompress.compress.kernel_offers import Menu
from flaxcompress.compress.recipe import Recipe
from flaxcompress.compress.solve import ACTIONS, price
from flaxcompress.compress.step import Context
from flaxcompress.compress.trim import Trim
from flaxcompress.evaluate.curves import Curves
from flaxcompress.folder import tensors_of
from flaxcompress.model import Model

FRACTIONS = (0.1, 0.25, 0.5, 0.75)  # of the break-even rank
_MENU = Menu(bits=(2, 3, 4, 8), groups=(64,), ranks=FRACTIONS, factor_bits=(None, 4))
_POINTS = 12  # of the frontier


def sensitivity_curves(
    model: Model,
    calibration: Calibration,
    *,
    recipes: Sequence[str] = (),
    key: jax.Array,
    progress: bool = False,
) -> Curves:
    """Prices every matrix, solves for sizes from the smallest to the largest, and measures recipes without healing.

    Raises ValueError for a model without kernels in layers, and for recipes that do not fit it.
    """
    start = time.perf_counter()
    context = Context(original=model, calibration=calibration, progress=progress)
    trimmed = Trim(positions="limit", pooler="unused", dtype="float16")(model, context, key=key)
    prices = price(trimmed, calibration, ACTIONS, _MENU, progress=progress)
    view = tree.View(tree.abstract(model.params))
    matrices = []
    for address, offers in prices.kernels.items():
        bits = [{"bits": o.bits, "bytes": o.bytes, "loss": o.loss} for o in offers if o.kind == "bits"]
        ranks = [
            {"rank": o.rank, "bytes": o.bytes, "loss": o.loss} for o in offers if o.kind == "rank" and o.bits is None
        ]
        shape = list(view[address].shape)
        matrices.append({"address": address, "shape": shape, "fractions": FRACTIONS, "bits": bits, "ranks": ranks})
    table = [] if prices.table is None else [{"bytes": o.bytes, "loss": o.loss} for o in prices.table.offers()]
    sizes = np.geomspace(*range_of_sizes(prices, trimmed.config), _POINTS).astype(int).tolist()
    frontier = [
        {"bytes": size, "loss": solution.loss} for size, solution in allocated_sizes(prices, sizes, trimmed.config)
    ]
    measured = []
    answers = Answers(model, calibration.batches(96, size=32, pad=model.config.pad_token, seed=2)) if recipes else None
    for name in recipes:
        small = model
        for number, step in enumerate(Recipe.load(name).with_heal_steps(0).steps):
            small = step(small, context, key=jax.random.fold_in(key, number))
        assert answers is not None
        size = storage.file_size(tensors_of(small))
        measured.append({"name": name, "bytes": size, "loss": answers.loss(small)})
    return Curves(
        source=model.assets.source,
        calibration=calibration.text.name,
        unit=prices.unit,
        matrices=matrices,
        table=table,
        frontier=frontier,
        recipes=measured,
        seconds=time.perf_counter() - start,
    )

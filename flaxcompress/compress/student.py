"""A smaller student begun from its teacher's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax

from flaxcompress.compress.calibrate import Calibration
from flaxcompress.compress.drop_layers import DropLayers
from flaxcompress.compress.prune_channels import PruneChannels
from flaxcompress.compress.prune_heads import PruneHeads
from flaxcompress.compress.prune_width import PruneWidth
from flaxcompress.compress.step import Context, Step
from flaxcompress.config.names import reject_unknown
from flaxcompress.model import Model

_WIDTHS = ("model", "heads", "feed_forward")


def student_from(
    teacher: Model,
    *,
    layers: int | Sequence[int] | None = None,
    widths: Mapping[str, int] | None = None,
    calibration: Calibration | None = None,
) -> Model:
    """A student of fewer layers and smaller widths, copied and sliced from its teacher; the teacher is not changed.

    Args:
      layers: how many stay, at even distances, the first and the last among them (DistilBERT, Sanh et al. 2019); or
        which ones, counted from 0.
      widths: what becomes narrower: "model", the width D; "heads", the number H of query heads, their width unchanged;
        "feed_forward", the channels F.
      calibration: text on which what stays is chosen and the maps behind it are refitted (see `StructuredPruning`);
        without it, what stays is chosen by magnitude and only sliced.

    Raises ValueError for unknown widths, for layers that are not there, and for what cannot be made smaller so.
    """
    widths = dict(widths or {})
    reject_unknown("student_from/widths", widths, _WIDTHS)
    steps: list[Step] = []
    if layers is not None:
        steps += _layers(teacher.config.layers, layers)
    plain = calibration is None
    if "heads" in widths:
        steps.append(PruneHeads(heads=widths["heads"], by="magnitude" if plain else "error", repair=not plain))
    if "feed_forward" in widths:
        width = widths["feed_forward"]
        steps.append(PruneChannels(width=width, by="magnitude" if plain else "error", repair=not plain))
    if "model" in widths:
        steps.append(PruneWidth(width=widths["model"], by="magnitude" if plain else "activation"))
    if not steps:
        raise ValueError("student_from: give layers or widths; without either, the student would be the teacher")
    student, context = teacher, Context(original=teacher, calibration=calibration)
    for step in steps:
        student = step(student, context, key=jax.random.key(0))
    return student


def _layers(found: int, layers: int | Sequence[int]) -> list[Step]:
    if isinstance(layers, int):
        if not 1 <= layers <= found:
            raise ValueError(f"student_from: layers {layers} is not in 1 … {found}")
        return [] if layers == found else [DropLayers(count=found - layers, choice="even")]
    if unknown := [layer for layer in layers if not 0 <= layer < found]:
        raise ValueError(f"student_from: there is no layer {unknown[0]}; the teacher has layers 0 … {found - 1}")
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"student_from: layers {list(layers)} must rise: a student keeps its teacher's order")
    gone = tuple(layer for layer in range(found) if layer not in set(layers))
    return [DropLayers(layers=gone)] if gone else []

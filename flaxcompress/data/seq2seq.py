"""A batch for a model with a decoder, from the tokens of inputs and targets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flaxcompress.data.batches import IGNORED, Batch
from flaxcompress.text import pad_ids

Tokens = Sequence[int] | np.ndarray


def seq2seq_batch(
    inputs: Sequence[Tokens], targets: Sequence[Tokens], shape: tuple[int, int], *, start: int, pad: int
) -> Batch:
    """input_ids [B, T], decoder_input_ids [B, T'], labels [B, T'] and both masks.

    The decoder reads the target moved by one, after `start`; its labels are the target. Both lists have B items; an
    empty one is a row that does not count.

    Args:
      shape: (T, T').
    """
    count = len(inputs)
    ids, mask = pad_ids(inputs, shape[0], count, pad)  # pyright: ignore[reportArgumentType]
    labels, target_mask = pad_ids(targets, shape[1], count, IGNORED)  # pyright: ignore[reportArgumentType]
    moved, _ = pad_ids([[start, *row[:-1]] if len(row) else [] for row in targets], shape[1], count, pad)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": moved,
        "decoder_attention_mask": target_mask,
        "labels": labels,
    }

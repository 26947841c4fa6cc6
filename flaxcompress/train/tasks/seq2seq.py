"""What the tasks of encoders with decoders have in common."""

from __future__ import annotations

from typing import Any

import jax

from flaxcompress.train.tasks.base import integers, token_shapes


def seq2seq_shapes(rows: int, length: int) -> dict[str, Any]:
    """The shapes of a batch of texts and of what a decoder makes of them."""
    mask = jax.ShapeDtypeStruct((rows, length), bool)
    ids = integers(rows, length)
    return token_shapes(rows, length, decoder_input_ids=ids, decoder_attention_mask=mask, labels=ids)

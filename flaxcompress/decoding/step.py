"""One step of decoding: the logits after the prompts, which fill a cache, and after each token."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Bool, Integer

from flaxcompress.config import ModelConfig
from flaxcompress.nn import Cache, TransformerOutput, init_cache, run

Source = tuple[Any, Any]
LAID_OUT = 64  # up to so many layers stand one after another in the loop over tokens; compiling more takes too long


def first_logits(
    params: Any,
    source: Source | None,
    ids: Integer[Array, "B T"],
    real: Bool[Array, "B T"],
    config: ModelConfig,
    dtype: Any,
    length: int,
) -> TransformerOutput:
    """Runs prompts, padded on the left, into a cache of `length` tokens; the last token's logits are [B, 1, V].

    Args:
      source: ids and mask [B, S] for the encoder, where there is one; the prompts are then the decoder's.
    """
    if source is None:
        cache = init_cache(config, ids.shape[0], length, dtype)
        return run(params, config, dtype, ids, real, cache=cache, last_logits=True)
    cache = init_cache(config, ids.shape[0], length, dtype, memory=source[0].shape[1])
    return run(params, config, dtype, *source, decoder_ids=ids, decoder_mask=real, cache=cache, last_logits=True)


def next_logits(
    params: Any, ids: Integer[Array, "B 1"], cache: Cache, config: ModelConfig, dtype: Any
) -> TransformerOutput:
    """Runs one more token of every row."""
    if config.decoder is None:
        return run(params, config, dtype, ids, cache=cache)
    return run(params, config, dtype, None, decoder_ids=ids, cache=cache)

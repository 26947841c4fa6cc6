"""What a model may be called with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress.config import ModelConfig
from flaxcompress.nn import Cache, is_ring


def is_traced(x: Any) -> bool:
    """Whether x is inside a jit: its values are not known yet."""
    return isinstance(x, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]


def check_ids(name: str, given: Any, positions: int, vocabulary: int) -> Any:
    """Token ids [B, T] as an array; ValueError for another shape, no or too many tokens, ids outside the vocabulary."""
    ids = given if is_traced(given) else np.asarray(given)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers of shape [B, T], got {ids.dtype} {list(ids.shape)}")
    if ids.shape[1] == 0:
        raise ValueError(f"{name}: shape {list(ids.shape)} has no tokens; give each sequence one or more")
    if ids.shape[1] > positions:
        raise ValueError(f"{name}: {ids.shape[1]} tokens, but the model has {positions} positions")
    if isinstance(ids, np.ndarray) and ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(f"{name}: values {ids.min()} … {ids.max()} lie outside the vocabulary 0 … {vocabulary - 1}")
    return ids


def check_like(name: str, value: Any, ids_name: str, ids: Any) -> None:
    """Raises ValueError where a mask or segments, if given, are of another shape than the ids."""
    if value is not None and tuple(np.shape(value)) != tuple(ids.shape):
        raise ValueError(f"{name}: shape {list(np.shape(value))} differs from {ids_name}' {list(ids.shape)}")


def check_decoder_inputs(config: ModelConfig, decoder_input_ids: Any, decoder_attention_mask: Any, batch: int | None):
    """The decoder's ids and mask as arrays, None where there are none; ValueError where they do not fit.

    Args:
      batch: how many sequences the encoder has got; None where it does not run.
    """
    if config.decoder is None:
        if decoder_input_ids is not None or decoder_attention_mask is not None:
            raise ValueError(f"decoder_input_ids: a {config.family} model of this config has no decoder")
        return None, None
    if decoder_input_ids is None:
        if decoder_attention_mask is not None:
            raise ValueError("decoder_attention_mask: there are no decoder_input_ids")
        return None, None
    ids = check_ids("decoder_input_ids", decoder_input_ids, config.decoder.positions, config.vocabulary)
    if batch is not None and ids.shape[0] != batch:
        raise ValueError(f"decoder_input_ids: {ids.shape[0]} sequences, but input_ids has {batch}")
    check_like("decoder_attention_mask", decoder_attention_mask, "decoder_input_ids", ids)
    mask = None if decoder_attention_mask is None else jnp.asarray(decoder_attention_mask) != 0
    return jnp.asarray(ids, jnp.int32), mask


def check_inputs(config: ModelConfig, input_ids: Any, attention_mask: Any, segment_ids: Any, pixel_values: Any = None):
    """Arrays of the right shape and range, or ValueError with what was given and what is allowed."""
    if input_ids is None or pixel_values is not None:
        raise ValueError(f"input_ids: a {config.family} model takes token ids [B, T], and no pixel_values")
    ids = check_ids("input_ids", input_ids, config.positions, config.vocabulary)
    check_like("attention_mask", attention_mask, "input_ids", ids)
    check_like("segment_ids", segment_ids, "input_ids", ids)
    if segment_ids is not None and not is_traced(input_ids):
        values = np.asarray(segment_ids)
        if values.size and not 0 <= values.min() <= values.max() < max(1, config.segments):
            raise ValueError(
                f"segment_ids: values {values.min()} … {values.max()} lie outside 0 … {max(1, config.segments) - 1}"
            )
    mask = None if attention_mask is None else jnp.asarray(attention_mask) != 0
    segments = None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    return jnp.asarray(ids, jnp.int32), mask, segments


def check_features(config: ModelConfig, feature_ids: Any, ids: Any) -> Any:
    """Feature ids [B, T] as int32, or ValueError for a model without lexicon, another shape, and ids outside of it."""
    if feature_ids is None:
        return None
    if config.lexicon is None:
        raise ValueError("feature_ids: the model has no lexicon; with_lexicon gives it one")
    if tuple(np.shape(feature_ids)) != tuple(ids.shape):
        raise ValueError(f"feature_ids: shape {list(np.shape(feature_ids))} differs from input_ids' {list(ids.shape)}")
    if not is_traced(feature_ids):
        values = np.asarray(feature_ids)
        if values.size and not 0 <= values.min() <= values.max() <= config.lexicon.entries:
            raise ValueError(
                f"feature_ids: values {values.min()} … {values.max()} lie outside 0 … {config.lexicon.entries}"
            )
    return jnp.asarray(feature_ids, jnp.int32)


def check_cache(config: ModelConfig, cache: Cache, ids: Any, target: Any = None) -> None:
    """Raises ValueError where tokens [B, T], of the decoder where there is one, do not fit behind those in a cache."""
    batch, slots = cache.real.shape
    if config.decoder is not None:
        if target is None:
            raise ValueError("cache: it is the decoder's, but there are no decoder_input_ids")
        assert cache.memory_mask is not None
        if ids is not None and ids.shape[1] != cache.memory_mask.shape[1]:
            raise ValueError(
                f"cache: made for a source of {cache.memory_mask.shape[1]} tokens, got input_ids {list(ids.shape)}"
            )
        config, ids = config.decoder, target
    if ids.shape[0] != batch:
        raise ValueError(f"cache: made for {batch} sequences, got input_ids {list(ids.shape)}")
    if is_traced(cache.length):
        return
    total, most = int(cache.length) + ids.shape[1], config.positions if is_ring(config) else slots
    if total > most:
        raise ValueError(
            f"cache: {int(cache.length)} tokens and {ids.shape[1]} more are over its {most}; make it longer"
        )


def check_pixels(config: ModelConfig, pixel_values: Any, input_ids: Any, attention_mask: Any) -> Any:
    """Pixels as a float32 array [B, C, height, width]; raises ValueError for other inputs and sizes."""
    assert config.patches is not None
    pixels = pixel_values if pixel_values is not None else input_ids
    if pixels is None or attention_mask is not None or (pixel_values is not None and input_ids is not None):
        raise ValueError(f"pixel_values: a {config.family} model takes images [B, C, height, width] and nothing else")
    pixels = jnp.asarray(pixels)
    channels, size = config.patches.channels, config.patches.size
    fits = pixels.ndim == 4 and pixels.shape[1] == channels and min(pixels.shape[2:]) >= size
    if not fits or not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise ValueError(
            f"pixel_values: expected floats [B, {channels}, height, width], height and width {size} or more, got "
            f"{pixels.dtype} {list(pixels.shape)}"
        )
    return pixels.astype(jnp.float32)

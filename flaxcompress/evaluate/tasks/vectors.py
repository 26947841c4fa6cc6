"""Sentence vectors, as the tasks of sentence encoders need them."""

from __future__ import annotations

from typing import Any

from flaxcompress.evaluate.metrics import Vectors


def vectors_of(model: Any, texts: list[str], task: str, *, progress: bool) -> Vectors:
    """Whatever has `encode` may stand for a model. Raises ValueError for a model of images."""
    config = getattr(model, "config", None)
    if config is not None and config.patches is not None:
        raise ValueError(f"{task}: {config.family} models read images and give no sentence vectors")
    return model.encode(texts, progress=True) if progress else model.encode(texts)

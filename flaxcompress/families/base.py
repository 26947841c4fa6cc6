"""What a family file provides: a Hugging Face config and tensor names, translated both ways."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from flaxcompress.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """One Hugging Face model type.

    Attributes:
      model_type: config.json's `model_type`.
      read_config: Hugging Face config -> ModelConfig; raises ValueError for what the family does not support.
      write_config: ModelConfig -> a stock Hugging Face config.
      names: ModelConfig -> {address: (tensor name, whether the tensor is stored transposed)}.
      prefixes: spellings of a leading module name that a checkpoint may carry.
      renames: (regular expression, replacement) pairs that bring old spellings to the current one.
      ignored: tensors that carry nothing (full match): buffers.
      head_prefixes: tensors of heads that the caller may not need; left out with one line that says so.
    """

    model_type: str
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    names: Callable[[ModelConfig], dict[str, tuple[str, bool]]]
    prefixes: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    head_prefixes: tuple[str, ...] = ()

    def canonical(self, name: str) -> str:
        """A checkpoint's tensor name in the family's current spelling, without a prefix."""
        for prefix in self.prefixes:
            name = name.removeprefix(prefix)
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

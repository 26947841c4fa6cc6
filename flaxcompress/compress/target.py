"""What a model should come down to: a size, a share of the time, or what may be lost."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9}
_FORMS = "a factor such as 8x, a size such as 10MB, a speed such as 2x-faster, or a loss such as 1%"


@dataclasses.dataclass(frozen=True)
class Target:
    """A target as it was written.

    Attributes:
      kind: "bytes": at most `value` of them; "speed": `value` times fewer operations in the layers; "loss": the
        smallest model whose loss (see `Answers`) is at most `value`.
    """

    kind: Literal["bytes", "speed", "loss"]
    value: float


def parse_target(text: str, size: int) -> Target:
    """ "8x" (times smaller than `size` bytes), "10MB" (10⁶ bytes each; also KB, GB), "2x-faster", "1%".

    Raises ValueError for other spellings, and for a target that the model meets as it is.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(x-faster|x|%|[kmg]?b)\s*", text, re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise ValueError(f"target {text!r}: expected {_FORMS}")
    number, unit = float(found[1]), found[2].lower()
    if unit == "x-faster":
        if number <= 1:
            raise ValueError(f"target {text!r}: {number:g} times is not faster; give more than 1")
        return Target("speed", number)
    if unit == "%":
        if number >= 100:
            raise ValueError(f"target {text!r}: a loss of {number:g}% leaves nothing; give less than 100%")
        return Target("loss", number / 100)
    result = int(size / number) if unit == "x" else int(number * _UNITS[unit])
    if result >= size:
        raise ValueError(f"target {text!r}: {result / 1e6:.2f} MB is not smaller than the model's {size / 1e6:.2f} MB")
    return Target("bytes", result)

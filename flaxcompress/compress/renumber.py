"""Format rules of a structure whose weight sets get other numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from flaxcompress.config import ModelConfig
from flaxcompress.model import abstract_flat

_DENSE = {"kind": "dense", "dtype": "float32"}


def rules_follow(config: ModelConfig, old: ModelConfig, moved: Mapping[str, str | None]) -> ModelConfig:
    """`config`, which has the rules of `old`, with every matrix in the format that it had; rules for none are left out.

    Args:
      moved: {address: where the matrix stood in `old`}; None for a new matrix, which is dense.
    """
    for address, before in moved.items():
        rule = None if before is None else old.format_rule(before)
        if config.format_rule(address) != rule:
            config = config.with_format(address, rule or _DENSE)
    used = set()
    for address in abstract_flat(config):
        used.add(next((rule for rule in config.formats if re.fullmatch(rule.pattern, address)), None))
    return config.replace(formats=tuple(rule for rule in config.formats if rule in used))

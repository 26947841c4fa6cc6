"""Which matrices are stored in which format."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from flax.core import FrozenDict


def freeze(value: Any) -> Any:
    """Nested mappings and lists as hashable ones."""
    if isinstance(value, Mapping):
        return FrozenDict({k: freeze(v) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(freeze(v) for v in value)
    return value


def thaw(value: Any) -> Any:
    """The inverse of `freeze`, as JSON has it."""
    if isinstance(value, Mapping):
        return {k: thaw(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [thaw(v) for v in value]
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatRule:
    """`spec` (a JSON object with a "kind") for every matrix whose address fully matches `pattern`."""

    pattern: str
    spec: Mapping[str, Any]

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"formats: {self.pattern!r} is not a regular expression: {error}") from None
        if not isinstance(self.spec, Mapping) or "kind" not in self.spec:
            raise ValueError(f"formats: the rule for {self.pattern!r} needs an object with a 'kind', got {self.spec!r}")
        object.__setattr__(self, "spec", freeze(self.spec))

    def __hash__(self):
        return hash((self.pattern, self.spec))


def read_rules(rules: Any, where: str) -> tuple[FormatRule, ...]:
    """Reads a list of [pattern, format]."""
    if not isinstance(rules, (list, tuple)):
        raise ValueError(f"{where}: expected a list of [pattern, format], got {rules!r}")
    for rule in rules:
        if not isinstance(rule, (list, tuple)) or len(rule) != 2:
            raise ValueError(f"{where}: a rule is [pattern, format], got {rule!r}")
    return tuple(FormatRule(pattern=pattern, spec=spec) for pattern, spec in rules)

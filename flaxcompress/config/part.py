"""Parts of a config: frozen dataclasses that are objects in JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flaxcompress.config.names import reject_unknown


class Part:
    """Base of a config's parts: JSON holds their fields."""

    def to_json(self) -> dict[str, Any]:
        """The object that `part_reader` reads."""
        return dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]


PartType = TypeVar("PartType")


def part_reader(part: type[PartType]) -> Callable[[Any, str], PartType]:
    """A function of a JSON object and of where it stands; it raises ValueError for unknown and missing keys."""

    def read(data: Any, where: str) -> PartType:
        if not isinstance(data, Mapping):
            raise ValueError(f"{where}: expected an object, got {data!r}")
        fields = dataclasses.fields(part)  # pyright: ignore[reportArgumentType]
        reject_unknown(where, data, (f.name for f in fields))
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in data]
        if missing:
            raise ValueError(f"{where}: missing {', '.join(missing)}")
        return part(**data)

    return read

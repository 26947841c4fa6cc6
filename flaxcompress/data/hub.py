"""Data sets of the Hugging Face Hub, through the library `datasets` where it is installed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl

from flaxcompress.config import closest

PREFIX = "hf:"
_OPTIONS = ("config", "split", "column")


@dataclasses.dataclass(frozen=True)
class HubData:
    """A data set of the Hub: "hf:owner/name", or with options "hf:owner/name?config=…&split=…&column=…"."""

    name: str
    config: str | None = None
    split: str = "train"
    column: str | None = None

    @classmethod
    def parse(cls, source: str) -> HubData:
        """Raises ValueError for options that do not exist."""
        name, _, query = source.removeprefix(PREFIX).partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        for option in options:
            if option not in _OPTIONS:
                raise ValueError(f"{source}: unknown option {option!r}; {closest(option, _OPTIONS)}")
        if not name:
            raise ValueError(f"{source}: no data set is named; write hf:owner/name, or hf:owner/name?split=train")
        return cls(name, **options)

    def records(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yields (row number from 1, {column: value}), streamed.

        Raises ValueError where `datasets` is missing, where there is no such data set, or no connection.
        """
        try:
            import datasets  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError(f"hf:{self.name}: data sets of the Hub need the library: pip install datasets") from None
        try:
            rows = datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
            yield from enumerate(rows, 1)
        except (OSError, ValueError) as error:  # not found and no connection are OSErrors
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ValueError(f"hf:{self.name}: cannot be read ({reason})") from None

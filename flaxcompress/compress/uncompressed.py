"""What a step that decomposes or cuts matrices asks of them: that no step did before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flaxcompress.formats import Format, spec_of


def check_uncompressed(flat: Mapping[str, Any], addresses: Iterable[str], where: str) -> None:
    """Raises ValueError for a matrix at one of the addresses that is not stored dense.

    A second decomposition would fit what the first one left, and store it as if it were the original.
    """
    for address in addresses:
        if isinstance(flat[address], Format):
            raise ValueError(
                f"{where}: {address} is stored as {spec_of(flat[address]).kind} already; start from the original "
                "model, or leave this matrix or the step before it out"
            )

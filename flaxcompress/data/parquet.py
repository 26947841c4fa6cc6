"""Parquet files, through pyarrow (the extra `data`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_ROWS = 4096  # read at once


def read_parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields (row number from 1, {column: value}) of a parquet file, some thousand rows in memory at a time.

    Raises ValueError where pyarrow is missing, and for a damaged file.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: parquet files are read by pyarrow: pip install 'flaxcompress[data]'") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{path}, after row {number}: damaged or no parquet file ({reason})") from None

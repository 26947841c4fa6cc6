"""As many threads for PyTorch as XLA has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from flaxcompress.machine import cores


@contextlib.contextmanager
def torch_threads(use: bool) -> Iterator[int]:
    """PyTorch with one thread for each core that this process may use, as XLA has; yields their number."""
    count = cores()
    if not use:
        yield count
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)

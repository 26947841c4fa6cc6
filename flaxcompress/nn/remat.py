"""Rematerialisation: what a backward pass computes again instead of keeping it (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from flaxcompress.config import closest
from flaxcompress.nn.logical import is_cut_by_fsdp

# "full" keeps nothing but every layer's input; "dots" also the products with weights, and computes the rest again:
# norms, activations, and attention's scores, whose products run over a batch.
_POLICIES: dict[str, Any] = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
REMAT = ("none", *_POLICIES)


def check_remat(remat: str) -> None:
    """Raises ValueError for what is not in `REMAT`."""
    if remat not in REMAT:
        raise ValueError(f"remat: unknown kind {remat!r}; {closest(str(remat), REMAT)}")


def rematerialised(layer: Callable[..., Any], remat: str, *, scanned: bool) -> Callable[..., Any]:
    """`layer`, whose gradient keeps what `remat` says; the values are the same.

    Args:
      scanned: a loop's body needs no guard against the compiler's merging both computations.
    """
    check_remat(remat)
    if remat == "none":
        if scanned or not is_cut_by_fsdp():
            return layer
        # Outside of a loop the compiler would merge both times that weights are put together, and so keep all of them.
        return jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable)
    return jax.checkpoint(layer, policy=_POLICIES[remat], prevent_cse=not scanned)

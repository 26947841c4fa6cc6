"""What a metric needs to know of each kernel, taken from calibration text."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from flaxcompress.compress.calibrate import Calibration
from flaxcompress.compress.metrics import FISHER, GRADIENTS, INPUTS, Statistics
from flaxcompress.linalg import with_ridge
from flaxcompress.model import Model

log = logging.getLogger("flaxcompress")

SHRINKAGE = 1e-3  # share of the mean eigenvalue that is added to a second moment of too few tokens


def gather(
    model: Model,
    calibration: Calibration | None,
    kernels: Mapping[str, tuple[int, int]],
    needs: Collection[str],
    *,
    sentences: int,
    where: str,
    progress: bool = False,
) -> dict[str, Statistics]:
    """{address of a kernel: the statistics that `needs` names}.

    Args:
      calibration: may be absent when nothing is needed.
      kernels: {address: shape}.
      where: the step's name, for errors.

    Raises ValueError for kernels of which nothing is recorded, and for activations that are not finite.
    """
    if not needs or calibration is None:
        return dict.fromkeys(kernels, Statistics())
    found: dict[str, Mapping[str, Any]] = {}
    if INPUTS in needs:
        found[INPUTS] = calibration.input_moments(model, sentences=sentences, progress=progress)
    if GRADIENTS in needs:
        found[GRADIENTS] = calibration.gradient_moments(model, progress=progress)
    if FISHER in needs:
        found[FISHER] = calibration.fisher(model, progress=progress)
    out = {}
    tokens = count_tokens(calibration, sentences)
    for address in kernels:
        own: dict[str, Any] = {
            need: values.get(address if need == FISHER else address.removesuffix("/kernel"))
            for need, values in found.items()
        }
        without = [need for need, value in own.items() if value is None]
        if without:
            what = "activations are" if INPUTS in without else "gradients are"
            raise ValueError(f"{where}: no {what} recorded for {address}; use whitening: none for it")
        for need, value in own.items():
            check_finite(value, f"{where}: {need} of {address}")
        if INPUTS in own:
            own[INPUTS] = shrunk(own[INPUTS], tokens)
        out[address] = Statistics(**own)
    if INPUTS in needs:
        warn_of_few_tokens(tokens, max(n for n, _ in kernels.values()), where)
    return out


def count_tokens(calibration: Calibration, sentences: int) -> int:
    """Tokens of so many calibration sentences."""
    return sum(len(row) for row in calibration.sample(sentences))


def shrunk(moment: Float[np.ndarray, "n n"], tokens: int) -> Float[np.ndarray, "n n"]:
    """C, with `SHRINKAGE` of its mean eigenvalue added where fewer tokens than inputs leave directions unseen."""
    n = len(moment)
    if tokens >= n:
        return moment
    return with_ridge(moment, SHRINKAGE * np.trace(moment) / n)


def warn_of_few_tokens(tokens: int, widest: int, where: str) -> None:
    """Says so when the second moments of so many tokens cannot have full rank."""
    if tokens < widest:
        log.warning(
            "%s: %d calibration tokens leave some of %d inputs unseen; their second moments are shrunk by %g towards "
            "the identity; use more text",
            *(where, tokens, widest, SHRINKAGE),
        )


def check_finite(values: Any, what: str) -> None:
    """Raises ValueError with the number of values that are NaN or infinite."""
    if bad := int((~np.isfinite(np.asarray(values))).sum()):
        raise ValueError(f"{what}: {bad} of {np.size(values)} values are not finite; repair the checkpoint first")

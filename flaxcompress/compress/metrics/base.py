"""What a metric is: how the error of a low-rank kernel is weighed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from flaxcompress.linalg import Factors

INPUTS, GRADIENTS, FISHER = "input_moments", "gradient_moments", "fisher"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """What is known of one kernel [n, m]; a metric finds there what its `needs` name.

    Attributes:
      input_moments: C = E[xᵀx] of its input x, [n, n].
      gradient_moments: G = E[gᵀg] of the loss's gradient g with respect to its output, [m, m].
      fisher: the loss's expected squared gradients, [n, m].
    """

    input_moments: Float[np.ndarray, "n n"] | None = None
    gradient_moments: Float[np.ndarray, "m m"] | None = None
    fisher: Float[np.ndarray, "n m"] | None = None


class Metric(NamedTuple):
    """A way of weighing errors.

    Attributes:
      factorize: (weight [n, m], rank, statistics) -> factors of the metric's nearest matrix of that rank. The factors
        of a lower rank are the first columns and rows of those of a higher one.
      needs: the fields of `Statistics` that it reads.
    """

    factorize: Callable[[np.ndarray, int, Statistics], Factors]
    needs: frozenset[str] = frozenset()

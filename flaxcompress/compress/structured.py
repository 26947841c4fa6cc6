"""What structured pruning has in common: which blocks of a reader's inputs stay, and the reader repaired.

A *reader* is the matrix behind what is pruned: the output map behind the heads, the down map behind the channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float, Integer

from flaxcompress import formats, tree
from flaxcompress.compress.matrix_statistics import gather
from flaxcompress.compress.metrics import FISHER, INPUTS, Statistics
from flaxcompress.compress.selection import entries, forward_selection, largest, leverage, made_from
from flaxcompress.compress.step import Context, Step
from flaxcompress.config import ModelConfig
from flaxcompress.model import Model, abstract_flat
from flaxcompress.nn.logical import matrix_axes

By = Literal["error", "leverage", "activation", "gradient", "magnitude"]


def cut_to(model: Model, config: ModelConfig, kept: Callable[[str, str | None], np.ndarray]) -> Model:
    """The model at a config of fewer heads, channels or widths: every matrix, in any format, sliced to its new shape.

    Args:
      kept: (address, logical name of a dimension that gets shorter: see `nn.logical`) -> its entries that stay, rising.
    """
    view, cut = tree.View(model.params), {}
    for address, planned in abstract_flat(config).items():
        node = view[address]
        names = matrix_axes(address)
        if len(planned.shape) == 1:  # a bias has its matrix's columns, a norm's scale the width of what it reads
            names = (names[1] or names[0],)
        for axis, (before, after, name) in enumerate(zip(node.shape, planned.shape, names, strict=True)):
            if before != after:
                node = formats.select(node, kept(address, name), axis)
        cut[address] = node
    return Model(params=tree.unflatten(cut), config=config, assets=model.assets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredPruning(Step):
    """Blocks of a reader's inputs left out.

    Attributes:
      by: what stays. By "error", one after another what takes most off the squared error of the reader's output, made
        up for as `repair` does (orthogonal forward selection). "leverage": what the others explain least (MoDeGPT, Lin
        et al. 2024). "activation": of largest mean square (Minitron, Muralidharan et al. 2024). "gradient": of largest
        expected squared change of the model's answer, ΣF·w² over the reader's weights (Molchanov et al. 2019).
        "magnitude": of largest Σw².
      repair: the reader is refitted to what stays, by least squares on calibration text; else only sliced.
      ridge: λ of that fit, and of "error" and "leverage", as a share of the inputs' mean second moment.
      sentences: calibration sentences. By magnitude without repair, no text is needed.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_moments"})

    by: By = "error"
    repair: bool = True
    ridge: float = 1e-2
    sentences: int = 768

    def __post_init__(self):
        if not self.ridge > 0:
            raise ValueError(f"{self.name}: ridge must be positive, got {self.ridge}")
        if self.sentences < 1:
            raise ValueError(f"{self.name}: sentences must be at least 1, got {self.sentences}")

    def statistics(self, model: Model, context: Context, readers: Mapping[str, tuple[int, int]]) -> Mapping[str, Any]:
        """{address: what is known of a reader}, the shapes given."""
        needs = {FISHER} if self.by == "gradient" else set()
        if self.repair or self.by in ("error", "leverage", "activation"):
            needs.add(INPUTS)
        calibration = context.need(self) if needs else None
        settings: Any = {"sentences": self.sentences, "where": self.name, "progress": context.progress}
        return gather(model, calibration, readers, needs, **settings)

    def chosen(
        self, readers: Sequence[Float[np.ndarray, "F D"]], known: Sequence[Statistics], count: int, block: int = 1
    ) -> Integer[np.ndarray, " k"]:
        """The blocks of neighbouring inputs that stay, rising, the same ones for all of some readers."""
        if self.by == "error":
            moments = [one.input_moments for one in known]
            return forward_selection(moments, readers, count, block=block, ridge=self.ridge)  # pyright: ignore[reportArgumentType]
        scores = [self._scores(w, one).reshape(-1, block).sum(1) for w, one in zip(readers, known, strict=True)]
        shares = [score / max(score.sum(), np.finfo(np.float64).tiny) for score in scores]
        return largest(np.sum(shares, axis=0), count)

    def _scores(self, reader: np.ndarray, known: Statistics) -> Float[np.ndarray, " F"]:
        """The importance of every input; that of a block is the sum."""
        if self.by == "leverage":
            assert known.input_moments is not None
            return leverage(known.input_moments, ridge=self.ridge)
        if self.by == "activation":
            assert known.input_moments is not None
            return np.diagonal(known.input_moments).astype(np.float64)
        squares = np.square(np.asarray(reader, np.float64))
        if self.by == "gradient":
            assert known.fisher is not None
            squares = squares * known.fisher
        return squares.sum(1)

    def refitted(
        self, reader: Float[np.ndarray, "F D"], known: Statistics, kept: Integer[np.ndarray, " k"], block: int = 1
    ) -> Float[np.ndarray, "k*b D"]:
        """The reader of the blocks that stay."""
        rows = entries(kept, block)
        if not self.repair:
            return reader[rows]
        assert known.input_moments is not None
        return made_from(known.input_moments, rows, ridge=self.ridge) @ reader

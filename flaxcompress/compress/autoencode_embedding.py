"""The token table as the code and the decoder of a linear autoencoder, trained by gradient descent."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxcompress import linalg, tree
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.compress.tiers import token_weights
from flaxcompress.compress.uncompressed import check_uncompressed
from flaxcompress.config import ModelConfig
from flaxcompress.formats import LowRank, LowRankSpec, materialize, rank_for
from flaxcompress.model import Model, abstract_flat, replace_matrices
from flaxcompress.progress import progress_bar
from flaxcompress.text import first_ordinary_token

TOKEN = "embedding/token"
_STEPS_AT_ONCE = 10  # run by one program
log = logging.getLogger("flaxcompress")


class Trained(NamedTuple):
    """The factors, the loss that training began with (the row-weighted SVD's) and the one that they have."""

    node: LowRank
    before: float
    after: float


def reconstruction_loss(left, right, table, weights, cosine: float) -> jax.Array:
    """Σ_v w_v [(1 - c)·‖E_v - Ê_v‖² / Σ_u w_u‖E_u‖² + c·(1 - cos(E_v, Ê_v))], w summing to one, Ê = left @ right."""
    given = jnp.square(table).sum(1)
    found = jnp.matmul(left, right, preferred_element_type=jnp.float32)
    squared = jnp.square(table - found).sum(1) / (weights * given).sum()
    lengths = jnp.sqrt(jnp.maximum(given * jnp.square(found).sum(1), 1e-24))
    return (weights * ((1 - cosine) * squared + cosine * (1 - (table * found).sum(1) / lengths))).sum()


def compress_matrix(
    table: np.ndarray,
    rank: int,
    weights: np.ndarray,
    *,
    cosine: float = 0.5,
    steps: int = 200,
    rate: float = 3e-3,
    progress: bool = False,
) -> Trained:
    """Two factors [V, R]·[R, D] that make `reconstruction_loss` small, by Adam from the row-weighted SVD.

    For a given right factor, the projection of a row on its span is best in both terms, squared error and cosine: so
    the left factor is computed once more at the end, and all that training can find is another span. The SVD's is best
    for the squared error; training gains what the cosine's term, in which short rows count as much as long ones, has
    to give.

    Args:
      weights: [V], of the rows.
      cosine: c, the cosine's share of the loss.
      rate: Adam's at its largest, decaying to 0 like a cosine, for a table whose rows have a mean square of R.
    """
    weights = np.asarray(weights, np.float64) / np.sum(weights)
    size = float(np.sqrt((weights @ np.square(table, dtype=np.float64).sum(1)) / rank)) or 1.0
    scaled, w = jnp.asarray(table / size, jnp.float32), jnp.asarray(weights, jnp.float32)
    start = linalg.row_weighted_svd(table / size, rank, weights)
    factors = (jnp.asarray(start.left, jnp.float32), jnp.asarray(start.right, jnp.float32))
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    # The table is an argument, not a constant that the program would hold.
    def loss(factors, table, weights):
        left, right = factors
        return reconstruction_loss(left, right, table, weights, cosine)

    @functools.partial(jax.jit, static_argnums=4)
    def run(factors, state, table, weights, count):
        def step(carry, _):
            factors, state = carry
            value, gradient = jax.value_and_grad(loss)(factors, table, weights)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(factors, updates), state), value

        (factors, state), values = jax.lax.scan(step, (factors, state), None, length=count)
        return factors, state, values[0]

    state, trained = optimizer.init(factors), factors
    with progress_bar("autoencoder", steps, show=progress) as advance:
        for done in range(0, steps, _STEPS_AT_ONCE):
            count = min(_STEPS_AT_ONCE, steps - done)
            trained, state, value = run(trained, state, scaled, w, count)
            advance(count, note=f"loss {float(value):.5f}")
    basis = np.linalg.qr(np.asarray(trained[1], np.float64).T)[0].T
    trained = (jnp.asarray(np.asarray(scaled) @ basis.T, jnp.float32), jnp.asarray(basis, jnp.float32))
    before, after = (float(jax.jit(loss)(f, scaled, w)) for f in (factors, trained))
    if after > before:  # diverged
        trained, after = factors, before
    return Trained(LowRank(left=trained[0] * size, right=trained[1]), before, after)


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencodeEmbedding(Step):
    """Approximates the token table by two factors trained on its rows, squared error and cosine, from the weighted SVD.

    Attributes:
      rank: R, or
      keep: the fraction of the table's parameters that the factors may hold.
      cosine: the cosine's share of the loss, from 0 (where FactorizeEmbedding is best already) to 1.
      steps: of Adam, each on all rows.
      rate: its learning rate.
      prior: "zipf" (ids ordered by frequency, as in BERT's vocabulary) or "uniform".
      power: tempers token weights.
      allow_larger: accept a rank at which the factors are larger than the table.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})

    rank: int | None = None
    keep: float | None = None
    cosine: float = 0.5
    steps: int = 200
    rate: float = 3e-3
    prior: Literal["zipf", "uniform"] = "zipf"
    power: float = 0.5
    allow_larger: bool = False

    def __post_init__(self):
        if not 0 <= self.cosine <= 1:
            raise ValueError(f"AutoencodeEmbedding: cosine {self.cosine} must lie in [0, 1], its share of the loss")
        if self.steps < 1 or self.rate <= 0:
            raise ValueError(f"AutoencodeEmbedding: {self.steps} steps at rate {self.rate}; both must be positive")
        if not 0 < self.power <= 2:
            raise ValueError(f"AutoencodeEmbedding: power {self.power} must lie in (0, 2]")

    def _rank(self, shape: tuple[int, int]) -> int:
        return rank_for(shape, self.rank, self.keep, self.allow_larger, TOKEN)

    def plan(self, config: ModelConfig) -> ModelConfig:
        check_uncompressed(abstract_flat(config), [TOKEN], self.name)
        rank = self._rank((config.vocabulary, config.table_width))
        return config.with_format(TOKEN, LowRankSpec(rank=rank).to_json())

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        table = np.asarray(materialize(tree.View(model.params)[TOKEN]))
        start = first_ordinary_token(model.assets)
        counts = context.need(self).token_counts
        weights = token_weights(counts, start=start, prior=self.prior, power=self.power)
        rank = self._rank((table.shape[0], table.shape[1]))
        how = {"cosine": self.cosine, "steps": self.steps, "rate": self.rate}
        found = compress_matrix(table, rank, weights, **how, progress=context.progress)
        log.info("AutoencodeEmbedding: loss %.5f, of the row-weighted SVD %.5f", found.after, found.before)
        return replace_matrices(model, {TOKEN: found.node})

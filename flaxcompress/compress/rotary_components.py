"""Keys with rotary positions as components that all heads share, so that a few of them keep their positions.

Rotary positions turn the pairs (x_j, x_j+d/2) of a head; read as the complex number z_j = x_j + i·x_j+d/2, a pair is
multiplied by e^(iθ_j t), and a score is Re Σ_j q̄_j k_j. At one frequency all heads' keys turn by one angle, so any
invertible complex map over the heads may be applied to them, and its inverse to the queries, without changing a score
(RoRoPE, TransMLA, Meng et al. 2025, §4.2, which takes real orthogonal maps).

Letters: n rows of an affine map (its kernel's, then its bias), H heads of queries, K of keys, p = d/2 pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Complex, Float

Pairs = tuple[int, ...]  # the frequency of every pair that keeps its rotary positions, in order


class Components(NamedTuple):
    """A head's key at frequency j is Σ_c mixing[j, h, c]·z_jc; the components are z_jc = Σ_h unmixing[j, c, h]·k_hj.

    Attributes:
      energy: E|q|²·E|z|², summed over the heads of queries that meet the component; falling. Were queries and keys
        independent, it would be twice the squared score that the component carries.
      mixing: [p, K, K], heads by components.
      unmixing: its inverses.
    """

    energy: Float[np.ndarray, "p K"]
    mixing: Complex[np.ndarray, "p K K"]
    unmixing: Complex[np.ndarray, "p K K"]


class Split(NamedTuple):
    """Kernels (with their biases for last rows) of queries and keys with their rotary positions, and without them.

    Attributes:
      shared_key: [n, w], of all heads, turned.
      turned_query: [n, H, w], which meet it.
      own_key: [n, K, r], not turned: what the shared key leaves.
      plain_query: [n, H, r], which meet that.
    """

    shared_key: Float[np.ndarray, "n w"]
    turned_query: Float[np.ndarray, "n H w"]
    own_key: Float[np.ndarray, "n K r"]
    plain_query: Float[np.ndarray, "n H r"]


def to_complex(x: Float[np.ndarray, "*B d"]) -> Complex[np.ndarray, "*B p"]:
    """The pairs of halves as complex numbers."""
    real, imaginary = np.split(np.asarray(x, np.float64), 2, -1)
    return real + 1j * imaginary


def to_real(z: Complex[np.ndarray, "*B p"]) -> Float[np.ndarray, "*B d"]:
    """The inverse of `to_complex`."""
    return np.concatenate([z.real, z.imag], -1)


def components(
    query: Float[np.ndarray, "n H d"], key: Float[np.ndarray, "n K d"], moments: Float[np.ndarray, "n n"]
) -> Components:
    """The principal components of the keys over the heads, each head weighted by its queries' energy.

    Keeping the first r components of a frequency then is the choice of r that loses the least expected squared score.

    Args:
      moments: E[xᵀx] of the input, with a last entry of 1 for the bias.
    """
    q, k = to_complex(query), to_complex(key)
    heads = k.shape[1]
    of_queries = np.einsum("nhp,nm,mhp->hp", q.conj(), moments, q, optimize=True).real
    weights = np.sqrt(of_queries.reshape(heads, -1, q.shape[-1]).sum(1).T)  # [p, K]
    weights = np.maximum(weights, 1e-6 * weights.max() + np.finfo(np.float64).tiny)  # a head may have no queries
    gram = np.einsum("nhp,nm,mgp->phg", k, moments, k.conj(), optimize=True)
    energy, vectors = np.linalg.eigh(gram * weights[:, :, None] * weights[:, None, :])
    vectors = vectors[:, :, ::-1]
    return Components(
        energy=np.maximum(energy[:, ::-1], 0.0),
        mixing=vectors / weights[:, :, None],
        unmixing=vectors.conj().swapaxes(1, 2) * weights[:, None, :],
    )


def choose_pairs(losses: Float[np.ndarray, "p K"], count: int) -> Pairs:
    """The frequencies of the `count` components that are dearest to lose; the losses of each frequency fall."""
    order = np.argsort(-losses, axis=None, kind="stable")[:count]
    return tuple(sorted(int(place) // losses.shape[1] for place in order))


def spread_pairs(pairs: int, heads: int, count: int) -> Pairs:
    """`count` components without a look at the data: the highest frequencies' first ones, then the second ones, …"""
    return tuple(sorted(number % pairs for number in range(min(count, pairs * heads))))


def split(
    query: Float[np.ndarray, "n H d"],
    key: Float[np.ndarray, "n K d"],
    found: Components,
    pairs: Sequence[int],
    rotation: Complex[np.ndarray, "H p"],
    plain: Sequence[int],
) -> Split:
    """Queries and keys whose components at `pairs` are turned, and of which the rest is not.

    Args:
      pairs: frequencies, ascending; one that comes r times keeps its first r components.
      rotation: what the rest's queries are multiplied by in place of the rotation (see `mean_rotation`).
      plain: the frequencies that the rest has.
    """
    q, k = to_complex(query), to_complex(key)
    frequency = np.asarray(pairs, int)
    number = np.asarray([list(pairs[:i]).count(pair) for i, pair in enumerate(pairs)], int)
    shared = np.einsum("nhc,ch->nc", k[:, :, frequency], found.unmixing[frequency, number])
    group = np.repeat(np.arange(k.shape[1]), q.shape[1] // k.shape[1])
    mixing = found.mixing[frequency, :, number]  # [c, K]
    turned = q[:, :, frequency] * mixing[:, group].conj().T
    rest = k.copy()
    for c, j in enumerate(frequency):
        rest[:, :, j] -= shared[:, None, c] * mixing[c]
    kept = list(plain)
    still = q * rotation.conj()
    return Split(to_real(shared), to_real(turned), to_real(rest[:, :, kept]), to_real(still[:, :, kept]))

"""Softmax attention approximated from landmarks, on plain arrays (Nyströmformer, Xiong et al. 2021)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flaxcompress.ops.dispatch import dispatch


def segment_members(real: Bool[Array, "B T"], landmarks: int) -> Bool[Array, "B T m"]:
    """Which segment a token belongs to: the i-th of a row's n tokens to ⌊i·m/n⌋; padding belongs to none.

    Rows of fewer tokens than landmarks have empty segments.
    """
    count = jnp.maximum(real.sum(1, keepdims=True), 1)
    segment = (jnp.cumsum(real, 1) - 1) * landmarks // count
    return (segment[..., None] == jnp.arange(landmarks)) & real[..., None]


def _softmax(scores: Float[Array, "*B s"], allowed: Bool[Array, "*B s"]) -> Float[Array, "*B s"]:
    """Over the entries that are allowed; zeros where none is."""
    highest = jax.lax.stop_gradient(jnp.where(allowed, scores, -jnp.inf).max(-1, keepdims=True))
    p = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - highest, 0.0)), 0.0)
    return p / jnp.maximum(p.sum(-1, keepdims=True), jnp.finfo(p.dtype).tiny)


def pseudo_inverse(a: Float[Array, "*B m m"], iterations: int) -> Float[Array, "*B m m"]:
    """A⁺ of a matrix of softmax rows, by the iteration of Razavi et al. 2014 (Xiong et al. 2021, eq. 11).

    It starts from Aᵀ/(‖A‖₁‖A‖_∞); rows and columns of zeros stay such.
    """
    eye = jnp.eye(a.shape[-1], dtype=a.dtype)
    sums = a.sum(-2).max(-1), a.sum(-1).max(-1)
    z = a.swapaxes(-1, -2) / jnp.maximum(sums[0] * sums[1], jnp.finfo(a.dtype).tiny)[..., None, None]

    def step(z, _):
        az = jnp.matmul(a, z, preferred_element_type=jnp.float32)
        inner = 15.0 * eye - jnp.matmul(az, 7.0 * eye - az, preferred_element_type=jnp.float32)
        inner = 13.0 * eye - jnp.matmul(az, inner, preferred_element_type=jnp.float32)
        return 0.25 * jnp.matmul(z, inner, preferred_element_type=jnp.float32), None

    return jax.lax.scan(step, z, None, length=iterations)[0]


def nystrom_factors(
    query: Float[Array, "B T H r"],
    key: Float[Array, "B T K r"],
    real: Bool[Array, "B T"] | None = None,
    *,
    landmarks: int,
    iterations: int,
    scale: float | None = None,
) -> tuple[Float[Array, "B H T m"], Float[Array, "B H m T"]]:
    """Two factors, float32, whose product stands for the attention probabilities.

    The right one is what landmark queries see of all keys, softmax(Q̃Kᵀ). The left one is softmax(QK̃ᵀ)softmax(Q̃K̃ᵀ)⁺;
    in rows of no more tokens than landmarks, where every token is a landmark, it says which one: the product is exact.
    """
    real = jnp.ones(query.shape[:2], bool) if real is None else real
    member = segment_members(real, landmarks)
    sizes = member.sum(1)  # [B, m]
    means = (member / jnp.maximum(sizes, 1)[:, None]).astype(jnp.float32).swapaxes(1, 2)[:, None]
    q = query.astype(jnp.float32).swapaxes(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    k = jnp.repeat(key.astype(jnp.float32).swapaxes(1, 2), query.shape[2] // key.shape[2], 1)
    product = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32)  # noqa: E731
    q_mean = product(means, jnp.where(real[:, None, :, None], q, 0))
    filled = (sizes > 0)[:, None, None, :]
    right = _softmax(product(q_mean, k.swapaxes(-1, -2)), real[:, None, None, :] & filled.swapaxes(-1, -2))
    exact = jnp.broadcast_to(member[:, None].astype(jnp.float32), (*q.shape[:3], landmarks))
    if query.shape[1] <= landmarks:
        return exact, right
    k_mean = product(means, jnp.where(real[:, None, :, None], k, 0)).swapaxes(-1, -2)
    middle = _softmax(product(q_mean, k_mean), filled & filled.swapaxes(-1, -2))
    left = _softmax(product(q, k_mean), jnp.broadcast_to(filled, exact.shape))
    left = product(left, pseudo_inverse(middle, iterations))
    few = (real.sum(1) <= landmarks)[:, None, None, None]
    return jnp.where(few, exact, left), right


def sum_values(
    left: Float[Array, "B H T m"], right: Float[Array, "B H m T"], value: Float[Array, "B T K d"]
) -> Float[Array, "B T H d"]:
    """left (right V), in the values' dtype."""
    v = jnp.repeat(value.astype(jnp.float32).swapaxes(1, 2), left.shape[1] // value.shape[2], 1)
    y = jnp.matmul(right, v, preferred_element_type=jnp.float32)
    return jnp.matmul(left, y, preferred_element_type=jnp.float32).swapaxes(1, 2).astype(value.dtype)


def _xla(query, key, value, real, landmarks, iterations, scale):
    factors = nystrom_factors(query, key, real, landmarks=landmarks, iterations=iterations, scale=scale)
    value = value if real is None else jnp.where(real[:, :, None, None], value, 0)
    return sum_values(*factors, value)


IMPLEMENTATIONS = {"xla": _xla}


def nystrom_attention(
    query: Float[Array, "B T H r"],
    key: Float[Array, "B T K r"],
    value: Float[Array, "B T K d"],
    real: Bool[Array, "B T"] | None = None,
    *,
    landmarks: int,
    iterations: int = 6,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H d"]:
    """softmax(QK̃ᵀ)softmax(Q̃K̃ᵀ)⁺softmax(Q̃Kᵀ)V (Xiong et al. 2021, eq. 13), time and memory linear in T.

    Q̃ and K̃ are the means of m segments of a row's tokens, padding left out, so that padding changes nothing. Rows of
    no more than m tokens are exact; a row of padding alone gives zeros.

    Args:
      landmarks: m.
      iterations: of the pseudo-inverse.
      scale: of the scores; None for 1/√r.
    """
    inputs = (query, key, value, real, landmarks, iterations, scale)
    return dispatch("nystrom_attention", IMPLEMENTATIONS, implementation, *inputs)

"""A linear map whose kernel may be in any format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig
from flaxcompress.formats import materialize, matmul, spec_for
from flaxcompress.formats.base import dot, vector_init
from flaxcompress.nn.bases import is_on_basis
from flaxcompress.nn.initializer import kernel_initializer
from flaxcompress.nn.logical import model_cuts, multiplied, put_together

DELTAS = "deltas"  # the collection in which a layer's linear maps find their low-rank deltas
INPUTS = "inputs"  # the collection in which a forward pass records what each kernel is multiplied by
GRADIENT_MOMENT = "gradient_moment"  # zeros beside a kernel, whose gradient is that of `tapped`


def weight(module: nn.Module, name: str, init: Callable[..., Any], *args: Any) -> Any:
    """Linen's `param`, but a value that is there already may be in another format than `init` makes.

    `param` compares leaf shapes with the initializer's; healing and `encode` run the same structure on weights that
    are, for the time being, fake-quantized or dequantized. Loading checks every shape instead.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, *args)


@jax.custom_vjp
def tapped(y: Float[Array, "*B m"], moment: Float[Array, "m m"]) -> Float[Array, "*B m"]:
    """y itself; the gradient with respect to `moment`, zeros, is Σ gᵀg over the rows g of y's gradient.

    So one backward pass gives the second moments of all linear maps' output gradients, whatever runs in between.
    """
    del moment
    return y


def _tapped_forward(y: Any, moment: Any) -> tuple[Any, None]:
    del moment
    return y, None


def _tapped_backward(_: None, g: Any) -> tuple[Any, Any]:
    rows = g.reshape(-1, g.shape[-1]).astype(jnp.float32)
    return g, jax.lax.dot(rows.T, rows, precision=jax.lax.Precision.HIGHEST)


tapped.defvjp(_tapped_forward, _tapped_backward)


class Linear(nn.Module):
    """y = x @ kernel + bias, [*B, n] -> [*B, m]; the bias may be absent.

    Attributes:
      address: where the module stands, e.g. "layers/3/attention/query"; it decides the kernel's format.
      in_features: n.
      features: m.
      initializer: of the kernel; None: normal, of the config's range.
    """

    config: ModelConfig
    address: str
    in_features: int
    features: int
    use_bias: bool = True
    initializer: Any = None

    def setup(self):
        spec = spec_for(self.config, f"{self.address}/kernel")
        drawn = kernel_initializer(self.config, self.address, self.in_features, self.features)
        initializer = self.initializer or drawn
        shape = (self.in_features, self.features)
        self.kernel = weight(self, "kernel", lambda key: spec.init(key, shape, initializer, table=False))
        zeros = vector_init(self.config, f"{self.address}/bias", nn.initializers.zeros_init())
        self.bias = weight(self, "bias", zeros, (self.features,)) if self.use_bias else None

    def record(self, x: Float[Array, "*B n"]) -> None:
        """Keeps x in the collection "inputs" when the caller made it mutable; nothing otherwise."""
        self.sow(INPUTS, "x", x, init_fn=lambda: x, reduce_fn=lambda _, new: new)

    def __call__(self, x: Float[Array, "*B n"]) -> Float[Array, "*B m"]:
        self.record(x)
        if self.is_initializing() and is_on_basis(self.kernel):  # the basis is not drawn yet
            return jnp.zeros((*x.shape[:-1], self.features), x.dtype)
        y = multiplied(lambda x, kernel: matmul(x, self.used(kernel, x.dtype)), x, self.kernel)
        return self.finished(x, y if self.bias is None else y + self.bias.astype(x.dtype))

    def finished(self, x: Float[Array, "*B n"], y: Float[Array, "*B m"]) -> Float[Array, "*B m"]:
        """The map's output: its delta added, and tapped where the caller put zeros beside the kernel."""
        y = self.adapted(x, y)
        return tapped(y, self.get_variable("params", GRADIENT_MOMENT)) if self.is_tapped() else y

    def is_tapped(self) -> bool:
        """Whether the second moment of this map's output gradient is asked for."""
        return self.has_variable("params", GRADIENT_MOMENT)

    def used(self, kernel: Any, dtype: Any) -> Any:
        """The kernel as products in `dtype` need it (see `put_together`)."""
        return put_together(self.config, f"{self.address}/kernel", kernel, dtype)

    def matrix(self) -> Float[Array, "n m"]:
        """The dense matrix that the map multiplies by, its delta included, float32."""
        w, delta = materialize(self.kernel), self._delta(jnp.eye(self.in_features))
        return w if delta is None else w + delta

    def adapted(self, x: Float[Array, "*B n"], y: Float[Array, "*B m"]) -> Float[Array, "*B m"]:
        """y with this map's delta of x added, where the layer has one (see `nn/deltas.py`)."""
        if (delta := self._delta(x)) is None:
            return y
        if self.has_variable(DELTAS, "bias"):
            delta = delta + self.get_variable(DELTAS, "bias").astype(x.dtype)
        return y + delta

    def _delta(self, x: Float[Array, "*B n"]) -> Float[Array, "*B m"] | None:
        if self.config.deltas is None or not self.has_variable(DELTAS, "down"):
            return None
        down, up = self.get_variable(DELTAS, "down"), self.get_variable(DELTAS, "up")
        return matmul(matmul(x, down), up) * jnp.asarray(self.config.deltas.scale, x.dtype)


def project_together(x: Float[Array, "*B n"], linears: Sequence[Linear]) -> list[Float[Array, "*B m"]]:
    """Applies several linear maps to one input: in a single product when all their kernels are dense arrays.

    One token per sequence, as in decoding, is not worth putting the kernels together for. Where devices hold columns of
    each kernel, a device's columns of all of them come next to each other, so that none has to move.
    """
    dense, cuts = all(isinstance(linear.kernel, jax.Array) for linear in linears), model_cuts()
    if x.shape[-2] == 1 or not dense or any(linear.features % cuts for linear in linears):
        return [linear(x) for linear in linears]
    for linear in linears:
        linear.record(x)

    def product(x: Any, kernels: Any) -> Any:
        used = [linear.used(kernel, x.dtype) for linear, kernel in zip(linears, kernels, strict=True)]
        return dot(x, _beside(used, cuts), 0)

    y = multiplied(product, x, [linear.kernel for linear in linears])
    biases = [linear.bias for linear in linears]
    if any(bias is not None for bias in biases):
        filled = [
            jnp.zeros(linear.features) if bias is None else bias for linear, bias in zip(linears, biases, strict=True)
        ]
        y = y + _beside(filled, cuts).astype(x.dtype)
    ends, total = [], 0
    for linear in linears[:-1]:
        total += linear.features // cuts
        ends.append(total)
    parts = jnp.split(y.reshape(*y.shape[:-1], cuts, -1) if cuts > 1 else y, ends, axis=-1)
    parts = [part.reshape(*y.shape[:-1], -1) for part in parts] if cuts > 1 else parts
    return [linear.finished(x, part) for linear, part in zip(linears, parts, strict=True)]


def _beside(arrays: Sequence[Float[Array, "*B m"]], cuts: int) -> Float[Array, "*B M"]:
    """Arrays side by side, the first of `cuts` stretches of each, then the second of each, …"""
    if cuts == 1:
        return jnp.concatenate(arrays, axis=-1)
    cut = [array.reshape(*array.shape[:-1], cuts, -1) for array in arrays]
    return jnp.concatenate(cut, axis=-1).reshape(*arrays[0].shape[:-1], -1)

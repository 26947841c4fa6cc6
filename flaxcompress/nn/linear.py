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
from flaxcompress.nn.initializer import kernel_initializer
from flaxcompress.nn.logical import is_cut_by_model, named, put_together

DELTAS = "deltas"  # the collection in which a layer's linear maps find their low-rank deltas
INPUTS = "inputs"  # the collection in which a forward pass records what each kernel is multiplied by


def weight(module: nn.Module, name: str, init: Callable[..., Any], *args: Any) -> Any:
    """Linen's `param`, but a value that is there already may be in another format than `init` makes.

    `param` compares leaf shapes with the initializer's; healing and `encode` run the same structure on weights that
    are, for the time being, fake-quantized or dequantized. Loading checks every shape instead.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, *args)


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
        y = matmul(x, self.used_kernel(x.dtype))
        return self.adapted(x, y if self.bias is None else y + self.bias.astype(x.dtype))

    def used_kernel(self, dtype: Any) -> Any:
        """The kernel as products in `dtype` need it (see `put_together`)."""
        return put_together(self.config, f"{self.address}/kernel", self.kernel, dtype)

    def matrix(self) -> Float[Array, "n m"]:
        """The dense matrix that the map multiplies by, its delta included, float32."""
        w = materialize(self.kernel)
        return w + self.adapted(jnp.eye(self.in_features), jnp.zeros_like(w))

    def adapted(self, x: Float[Array, "*B n"], y: Float[Array, "*B m"]) -> Float[Array, "*B m"]:
        """y with this map's delta of x added, where the layer has one (see `nn/deltas.py`)."""
        if self.config.deltas is None or not self.has_variable(DELTAS, "down"):
            return y
        down, up = self.get_variable(DELTAS, "down"), self.get_variable(DELTAS, "up")
        return y + matmul(matmul(x, down), up) * jnp.asarray(self.config.deltas.scale, x.dtype)


def project_together(x: Float[Array, "*B n"], linears: Sequence[Linear]) -> list[Float[Array, "*B m"]]:
    """Applies several linear maps to one input: in a single product when all their kernels are dense arrays.

    One token per sequence, as in decoding, is not worth putting the kernels together for; where devices hold columns of
    each kernel, columns would have to move between them.
    """
    dense = all(isinstance(linear.kernel, jax.Array) for linear in linears)
    if x.shape[-2] == 1 or is_cut_by_model() or not dense:
        return [linear(x) for linear in linears]
    for linear in linears:
        linear.record(x)
    kernels = [linear.used_kernel(x.dtype) for linear in linears]
    y = dot(x, named(jnp.concatenate(kernels, axis=1)), 0)
    biases = [linear.bias for linear in linears]
    if any(bias is not None for bias in biases):
        filled = [
            jnp.zeros(linear.features) if bias is None else bias for linear, bias in zip(linears, biases, strict=True)
        ]
        y = y + jnp.concatenate(filled).astype(x.dtype)
    ends, total = [], 0
    for linear in linears[:-1]:
        total += linear.features
        ends.append(total)
    parts = jnp.split(y, ends, axis=-1)
    return [linear.adapted(x, part) for linear, part in zip(linears, parts, strict=True)]

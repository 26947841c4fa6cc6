"""Image patches as tokens (Dosovitskiy et al. 2021, eq. 1), and positions stretched to other image sizes."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flaxcompress.config import ModelConfig
from flaxcompress.formats import spec_for, take
from flaxcompress.formats.base import vector_init
from flaxcompress.nn.initializer import table_initializer
from flaxcompress.nn.linear import Linear, weight
from flaxcompress.nn.logical import put_together


def cubic_weights(size: int, new: int) -> Float[np.ndarray, "new size"]:
    """Bicubic interpolation along one axis as a matrix: Keys' kernel with a = -3/4, edges repeated, no smoothing.

    What PyTorch's interpolate(mode="bicubic", align_corners=False) does along each axis.
    """
    a, out = -0.75, np.zeros((new, size))
    for row in range(new):
        place = (row + 0.5) * size / new - 0.5
        first = int(np.floor(place)) - 1
        for i in range(first, first + 4):
            x = abs(place - i)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            out[row, min(max(i, 0), size - 1)] += near if x <= 1 else far
    return out


class ImageEmbedding(nn.Module):
    """[B, C, height, width] pixels -> [B, 1 + patches, D]: a class token, then the patches in rows."""

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    prefix: str = ""

    def setup(self):
        config = self.config
        patches = config.patches
        assert patches is not None
        normal, width = table_initializer(config), config.width
        self.patch = Linear(config, "embedding/patch", patches.channels * patches.size**2, width)
        first = vector_init(config, "embedding/first", normal)
        self.first = weight(self, "first", first, (width,))
        spec, rows = spec_for(config, "embedding/position"), 1 + patches.count
        self.position = weight(self, "position", lambda key: spec.init(key, (rows, width), normal, table=True))
        self.drop = nn.Dropout(config.dropout)

    def __call__(
        self, pixels: Float[Array, "B C height width"], *, deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        patches = self.config.patches
        assert patches is not None
        b, c, height, width = pixels.shape
        down, across, n = height // patches.size, width // patches.size, patches.size
        cut = pixels[:, :, : down * n, : across * n].reshape(b, c, down, n, across, n)
        x = self.patch(cut.transpose(0, 2, 4, 1, 3, 5).reshape(b, down * across, c * n * n).astype(self.dtype))
        first = jnp.broadcast_to(self.first.astype(x.dtype), (b, 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self._positions(down, across).astype(x.dtype)
        return self.drop(x, deterministic=deterministic)

    def _positions(self, down: int, across: int) -> Float[Array, "T D"]:
        patches = self.config.patches
        assert patches is not None
        table = take(put_together(self.config, "embedding/position", self.position), jnp.arange(1 + patches.count))
        if (down, across) == patches.grid:
            return table
        grid = table[1:].reshape(*patches.grid, -1)
        rows, columns = (
            jnp.asarray(cubic_weights(size, new), table.dtype)
            for size, new in zip(patches.grid, (down, across), strict=True)
        )
        grid = jnp.einsum("ij,kl,jld->ikd", rows, columns, grid, precision="highest")
        return jnp.concatenate([table[:1], grid.reshape(down * across, -1)])

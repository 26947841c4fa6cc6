"""What every layer sees beside its input."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Context(NamedTuple):
    """Shared by all layers of a forward pass; fields that a structure does not use are None.

    Attributes:
      real: which tokens are no padding, [B, T].
      mask: keys that may be seen, [B, S] or [B, T, S].
      local_mask: the same in layers with a window.
      bias: added to the scores, [H, T, S].
      rotation: (cos, sin) of the tokens' angles, [B, T, 1, d/2].
      local_rotation: the same in layers with a window.
      slots: where the layer's cache puts the tokens, [t]; None: there is no cache.
      memory: the encoder's output, [B, S, D], in a decoder; None where the cache has what it needs of it.
      memory_mask: which of its tokens are no padding, [B, S].
      sequence: a projection of the sequence's places that all layers share, [T, 1, k] (Linformer).
    """

    real: Any = None
    mask: Any = None
    local_mask: Any = None
    bias: Any = None
    rotation: Any = None
    local_rotation: Any = None
    slots: Any = None
    memory: Any = None
    memory_mask: Any = None
    sequence: Any = None

    def within(self, local: bool | jax.Array) -> Context:
        """As a layer with (`local`) or without a window sees it; `local` may be traced."""
        if self.local_mask is None:
            return self
        if isinstance(local, bool):
            chosen = (self.local_mask, self.local_rotation) if local else (self.mask, self.rotation)
        else:
            chosen = jax.tree.map(
                lambda a, b: jnp.where(local, a, b), (self.local_mask, self.local_rotation), (self.mask, self.rotation)
            )
        return self._replace(mask=chosen[0], rotation=chosen[1])

"""Adapters: a narrow network behind what each sublayer adds, which learns while all else stays (Houlsby et al. 2019).

    y = f(x) + up_project(activation(down_project(f(x))))

`up_project` begins with zeros, so that at first nothing changes. Adapters belong to the norms' weight sets: layers that
share their matrices alone have adapters of their own all the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax

from flaxcompress import tree
from flaxcompress.config import Adapters
from flaxcompress.model import Model, init_params
from flaxcompress.tuning.base import Tuning, register

TRAINABLE = r"(decoder/)?layers/\d+/norms/\w+_adapter/.*"


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck(Tuning):
    """Adapters behind sublayers; the fields are those of `with_adapters`."""

    name: ClassVar[str] = "adapters"

    width: int = 64
    activation: str = "gelu"
    after: tuple[str, ...] = ("attention", "feed_forward")

    def __post_init__(self):
        Adapters(width=self.width, activation=self.activation, after=self.after)  # its own checks

    @property
    def trainable(self):
        return TRAINABLE

    def __call__(self, model, *, key):
        return with_adapters(model, **dataclasses.asdict(self), key=key)


def with_adapters(
    model: Model,
    *,
    width: int = 64,
    activation: str = "gelu",
    after: Sequence[str] = ("attention", "feed_forward"),
    key: jax.Array,
) -> Model:
    """The model with adapters, which computes the same: `fit(…, trainable=bottleneck.TRAINABLE)` trains them alone.

    Args:
      width: of the narrow network.
      after: the sublayers: "attention", "cross_attention", "feed_forward".
      key: draws `down_project`.

    Raises ValueError for settings out of range, sublayers that the model lacks, and a model that has adapters.
    """
    config = model.config
    if config.adapters is not None:
        raise ValueError("adapters: the model has some already")
    found = Adapters(width=width, activation=activation, after=tuple(after))
    decoder = config.decoder
    if decoder is not None:
        decoder = decoder.replace(adapters=found.within(decoder.sharing.parts))
    config = config.replace(adapters=found.within(config.sharing.parts), decoder=decoder)
    there = {name for c in (config, decoder) if c is not None and c.adapters for name in c.adapters.after}
    if lost := [name for name in found.after if name not in there]:
        raise ValueError(f"adapters: the model has no {lost[0]}")
    own = tree.flatten(model.params)
    drawn = jax.jit(lambda key: {a: n for a, n in tree.flatten(init_params(config, key)).items() if a not in own})
    return model.replace(params=tree.unflatten({**own, **drawn(key)}), config=config)  # pyright: ignore[reportAttributeAccessIssue]

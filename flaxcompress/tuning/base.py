"""What is trained of a model whose weights stay: a few parameters that are put on it, or a few of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import jax

from flaxcompress.config import closest
from flaxcompress.config.typed import read_settings
from flaxcompress.model import Model

_KINDS: dict[str, type[Tuning]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Base of the kinds of parameter-efficient tuning.

    Attributes:
      name: of the kind, in settings.
    """

    name: ClassVar[str] = ""

    @property
    def trainable(self) -> str:
        """The pattern of what is trained (see `train.partition`)."""
        raise NotImplementedError(f"{type(self).__name__}.trainable")

    def __call__(self, model: Model, *, key: jax.Array) -> Model:
        """The model with what is trained put on it; it computes the same, unless the kind says otherwise.

        Raises ValueError where that cannot be.
        """
        raise NotImplementedError(f"{type(self).__name__}.__call__")

    @classmethod
    def read(cls, data: Any, where: str) -> Tuning:
        """One of the kinds from its name, or from {name: …, settings}."""
        data = {"name": data} if isinstance(data, str) else data
        if isinstance(data, Tuning):
            return data
        if not isinstance(data, Mapping) or "name" not in data:
            raise ValueError(f"{where}: expected a name, or settings with a name; got {data!r}")
        if (name := data["name"]) not in _KINDS:
            raise ValueError(f"{where}: unknown kind {name!r}; {closest(str(name), _KINDS)}")
        return read_settings(_KINDS[name], {k: v for k, v in data.items() if k != "name"}, where)


Kind = TypeVar("Kind", bound=type[Tuning])


def register(kind: Kind) -> Kind:
    """Makes a kind known by its name."""
    _KINDS[kind.name] = kind
    return kind

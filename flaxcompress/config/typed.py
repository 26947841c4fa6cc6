"""Settings as frozen dataclasses, read from YAML or JSON: the fields' types are what is checked."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from flaxcompress.config.names import closest, reject_unknown


def read_settings(cls: Any, settings: Any, where: str) -> Any:
    """A dataclass from {field: value}. Raises ValueError for unknown and missing fields, and values of another type."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where}: expected settings as key: value, got {settings!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    reject_unknown(where, settings, fields)
    hints = typing.get_type_hints(cls)
    values = {k: convert(v, hints[k], f"{where}/{k}") for k, v in settings.items()}
    missing = [
        n
        for n, f in fields.items()
        if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} must be given")
    return cls(**values)


def _is_name(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def convert(value: Any, hint: Any, where: str) -> Any:
    """Checks a YAML value against a type hint; ints become floats, lists become tuples, objects dataclasses."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in args:
            if option is type(None):
                continue
            try:
                return convert(value, option, where)
            except ValueError as error:
                errors.append(str(error))
        text = [
            e for option, e in zip([o for o in args if o is not type(None)], errors, strict=True) if _is_name(option)
        ]
        raise ValueError(text[0] if text and isinstance(value, str) else errors[0])
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        return tuple(convert(v, args[0], f"{where}/{i}") for i, v in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected settings as key: value, got {value!r}")
        return dict(value)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where}: {value!r} is not allowed; {closest(str(value), map(str, args))}")
        return value
    if dataclasses.is_dataclass(hint) and (read := getattr(hint, "read", None)) is not None:
        return read(value, where)  # one of several dataclasses, by its name
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else read_settings(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    hint_name = getattr(hint, "__name__", str(hint))
    written = f"; write it as {float(value)!r}" if hint is float and _reads_as_float(value) else ""
    raise ValueError(f"{where}: expected {hint_name}, got {value!r}{written}")


def _reads_as_float(value: Any) -> bool:
    """YAML takes 1e-3 for a string."""
    try:
        return isinstance(value, str) and bool(float(value) or True)
    except ValueError:
        return False

"""YAML files of settings, changes to them from a command line, and what differs between two."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

_VARIABLE = re.compile(r"\$\{(\w+)\}")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe one, with two surprises fewer: 1e-3 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                said = f"the key {key!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, said, key_node.start_mark)
            seen.add(str(key))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text holds. Raises ValueError for what is no YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file. Raises FileNotFoundError, and ValueError for what is no YAML or no settings."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    found = parse_yaml(text, str(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected settings as key: value, got {found!r:.80}")
    return found


def dump_yaml(settings: Mapping[str, Any]) -> str:
    """The settings as YAML, in their order."""
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=100)


def with_changes(settings: Mapping[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """The settings after changes such as "training.steps=100"; values are YAML.

    Raises ValueError for a change without "=", and for a path that leads into a value.
    """
    out = _copied(settings)
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or not all(names := path.split(".")):
            raise ValueError(f"{change!r} is no change: write key=value, such as training.steps=100")
        here = out
        for i, name in enumerate(names[:-1]):
            inner = here.setdefault(name, {})
            if inner is None:
                inner = here[name] = {}
            if not isinstance(inner, dict):
                raise ValueError(f"{change!r}: {'.'.join(names[: i + 1])} is {inner!r}, which has no keys inside")
            here = inner
        here[names[-1]] = parse_yaml(text, change)
    return out


def with_variables(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The settings with every ${NAME} in a text replaced by the environment variable of that name.

    Raises ValueError, with the path, for a variable that is not set.
    """
    return {name: _filled_in(value, f"{path}{name}") for name, value in settings.items()}


def _filled_in(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return with_variables(value, f"{path}/")
    if isinstance(value, list):
        return [_filled_in(inner, path) for inner in value]
    return _VARIABLE.sub(lambda found: _variable(found[1], path), value) if isinstance(value, str) else value


def _variable(name: str, path: str) -> str:
    if name not in os.environ:
        raise ValueError(
            f"{path}: the environment variable {name} is not set; set it, or give {path.replace('/', '.')}=…"
        )
    return os.environ[name]


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """What changed, a line each: "training/steps: 100 -> 200"; "-" stands for what is not there."""
    out = []
    for name in dict.fromkeys([*old, *new]):
        here = f"{path}{name}"
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differences(a, b, f"{here}/")
        elif a != b:
            said = ["-" if name not in side else repr(side[name]) for side in (old, new)]
            out.append(f"{here}: {said[0]} -> {said[1]}")
    return out

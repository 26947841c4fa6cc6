"""The one dispatch loop: an explicit implementation never falls back, None takes the first that accepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flaxcompress.config import closest


def dispatch(
    op: str, implementations: Mapping[str, Callable], implementation: str | None, *args: Any, **kw: Any
) -> Any:
    """Calls an implementation of `op`; a candidate refuses with NotImplementedError("reason").

    Raises ValueError for an unknown name, the candidate's own NotImplementedError when it was named explicitly,
    and an ExceptionGroup of all refusals when none of the defaults accepts.
    """
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(f"{op}: no implementation {implementation!r}; {closest(implementation, implementations)}")
        return implementations[implementation](*args, **kw)
    refusals = []
    for name, function in implementations.items():
        try:
            return function(*args, **kw)
        except NotImplementedError as error:
            refusals.append(NotImplementedError(f"{op}/{name}: {error}"))
    raise ExceptionGroup(f"{op}: no implementation accepts these arguments", refusals)

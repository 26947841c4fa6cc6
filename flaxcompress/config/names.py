"""Names: those of activations, and errors about others: what exists, and what is closest to what was given."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "tanh")


def closest(name: str, known: Iterable[str]) -> str:
    """A sentence that lists what exists and the closest name to `name`."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"known: {', '.join(known) or 'nothing'}{hint}"


def reject_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError naming the first key of `given` that is not in `known`."""
    known = set(known)
    for key in given:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; {closest(str(key), known)}")

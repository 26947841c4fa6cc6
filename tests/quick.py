"""Which cases of a table the quick suite runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest


def quick(cases: Iterable, among: Collection) -> list:
    """All cases as parameters, those not among the given ones marked slow; a tuple is a case of several parameters.

    Name the cases with most in them: compiling takes the time, and the whole suite runs the others.
    """
    cases = list(cases)
    unknown = [case for case in among if case not in cases]
    assert not unknown, f"the quick suite names cases that do not exist: {unknown}"
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in among else pytest.mark.slow)
        for case in cases
    ]

"""Which cases of a matrix run when: `pytest -m fast` some, `pytest` those kept, `pytest -m full` the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet


def layered(
    cases: Iterable[tuple[Any, ...]], kept: Callable[..., bool], fast: Callable[..., bool] = lambda *case: False
) -> list[ParameterSet]:
    """The cases for `parametrize`, marked; both functions are called with a case's values."""
    return [pytest.param(*case, marks=_mark(kept(*case), fast(*case))) for case in cases]


def _mark(kept: bool, fast: bool) -> Any:
    if not kept:
        return pytest.mark.full
    return pytest.mark.fast if fast else ()

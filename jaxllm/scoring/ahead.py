"""Steps queued on the devices ahead of those whose results are fetched."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

import jax

from sharding.mesh import to_host

AHEAD = 2  # steps queued before the results of the first are fetched

T = TypeVar("T")


def fetched(steps: Iterable[tuple[T, Any]]) -> Generator[tuple[T, Any]]:
    """(what a step was for, its results on the host), in order; taking a pair of `steps` gives one to the devices.

    Where it is left early, the devices have ended what they were given.
    """
    queued: deque[tuple[T, Any]] = deque()
    try:
        for step in steps:
            queued.append(step)
            if len(queued) > AHEAD:
                given, results = queued.popleft()
                yield given, to_host(results)
        while queued:
            given, results = queued.popleft()
            yield given, to_host(results)
    finally:
        jax.block_until_ready([results for _, results in queued])

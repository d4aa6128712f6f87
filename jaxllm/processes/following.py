"""What the processes of a group do together: agree on a run, and then the same steps in the same order."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax

from jaxllm.execution.runner import Tell
from jaxllm.processes.group import Group
from jaxllm.processes.messages import decoded, encoded
from sharding.mesh import device_memory

DONE = {  # what may be done in another process's name, by whom
    "engine": {"prefill", "decode", "decode_on", "expect_decode", "forget", "whole"},
    "scorer": {"step"},
    "embedder": {"step"},
}


def least_memory(group: Group) -> int | None:
    """Bytes of the device that has least; None where one does not tell. The processes of a host share its memory."""
    own = device_memory(jax.local_devices()[0])
    shared = group.on_this_host if jax.default_backend() == "cpu" else 1
    found = group.gather(own)
    least = None if None in found else min(found, default=0) // shared
    shared_by_all: int | None = group.share(least)
    return shared_by_all


def teller(group: Group, owner: str) -> Tell:
    """Tells the other processes what this one's `owner` does."""

    def tell(method: str, *given: Any) -> AbstractContextManager[None]:
        return group.telling(owner, method, encoded(given))

    return tell


def follow(group: Group, owners: Mapping[str, Callable[[], Any]]) -> None:
    """Do what process 0 does, until it ends."""
    for owner, method, given in group.told():
        if method not in DONE.get(owner, ()):
            raise ValueError(f"process 0 asks for {owner}.{method}, which is none of a step's calls")
        getattr(owners[owner](), method)(*decoded(given))


class WholeArrays(Sequence[jax.Array]):
    """Parameters that no process has the whole of, each gathered when it is asked for; the last one is kept.

    Args:
      gather: a parameter's index -> the parameter.
    """

    def __init__(self, count: int, gather: Callable[[int], jax.Array]):
        self._count, self._gather, self._lock = count, gather, threading.Lock()
        self._last: tuple[int, jax.Array] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        with self._lock:
            if self._last is None or self._last[0] != i:
                self._last = i, self._gather(i)
            return self._last[1]


def digest(*parts: Any) -> str:
    """Of what their representations say."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

"""A lock that threads take in turn."""

from __future__ import annotations

import threading
from types import TracebackType


class FairLock:
    """A lock that goes to who waits for it, before the thread that has just let it go takes it again.

    A plain one mostly goes back to that thread: in a loop it would keep all others out. A thread may take it while it has it,
    so that one that was interrupted between taking and letting go, by Ctrl-C, does not wait for itself for ever.
    """

    def __init__(self) -> None:
        self._next = threading.RLock()  # held by the one thread that waits for the lock itself
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        with self._next:
            self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()

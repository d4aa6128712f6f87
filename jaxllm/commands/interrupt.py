"""Ctrl-C ends the process within a moment and with one line, wherever it is.

Python runs its handler of a signal between two instructions of the main thread, which may be in a compilation of many seconds,
and a KeyboardInterrupt that is raised within a callback or a destructor is printed and lost. So a thread watches too, woken by
the signal itself: the main thread has `GRACE` seconds to unwind, so that files are whole and temporary ones removed, and then the
process ends whatever it is doing. Within an import, where an extension may print what is raised, lose it or crash, it ends at
once. Only light modules are imported here: a command imports this first of all.
"""

from __future__ import annotations

import _thread
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType
    from typing import NoReturn

GRACE = 1.0  # seconds
LOOK = 0.05  # seconds between two looks at how the main thread unwinds
CODE = 130  # of a process that Ctrl-C ended, to a shell


class Interrupts:
    """The handling of Ctrl-C in this process. Until it is installed, Python's own: a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.stopping = False  # the main thread has been told to unwind
        self._installed = False
        self._deferring = False
        self._pressed = 0  # as the watcher counts
        self._deferred = 0  # of these, put off by the handler
        self._lost = False  # a KeyboardInterrupt was raised where nothing could catch it
        self._ending = _thread.allocate_lock()

    def install(self) -> None:
        """Take over Ctrl-C; called once, in the main thread. A background process, which ignores SIGINT, goes on ignoring it."""
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            return
        self._installed = True
        self._main = _thread.get_ident()
        try:
            self._stderr = os.dup(2)  # the plugin's loader turns the process's own aside for a moment
        except OSError:  # it is closed
            self._stderr = 2
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._on_signal)
        sys.unraisablehook, sys.excepthook = self._on_unraisable, self._on_printed
        _thread.start_new_thread(self._watch, (reader,))

    def deferred(self) -> Deferral:
        """A `with` block in which the first Ctrl-C only sets `pressed`, and the second is as ever."""
        return Deferral(self)

    def finish(self) -> None:
        """The work is done: a Ctrl-C that was lost ends the process after all, and a later one finds nothing to stop."""
        if self._installed:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.stopping:
            self.end()

    def end(self) -> NoReturn:
        """End the process, without waiting for its threads."""
        if not self._ending.acquire(blocking=False):
            while True:  # the other thread is at it
                time.sleep(GRACE)
        try:
            os.write(self._stderr, b"\nstopped\n" if os.isatty(self._stderr) else b"stopped\n")
        finally:
            os._exit(CODE)

    # In the main thread

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._deferring and not self._deferred:
            self._deferred += 1
        elif not self.stopping:
            self.stopping = True
            if "logging" in sys.modules:  # whoever catches what is raised here, as jax does around its plugins, logs it
                sys.modules["logging"].disable()
            if _is_importing(frame):
                self.end()
            raise KeyboardInterrupt

    def _on_unraisable(self, found: sys.UnraisableHookArgs) -> None:
        if isinstance(found.exc_value, KeyboardInterrupt):
            self._lost = True
        elif not self.stopping:
            sys.__unraisablehook__(found)

    def _on_printed(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Called by C code that prints an error on its way, too: an extension does if its import of numpy fails."""
        if not self.stopping:
            sys.__excepthook__(kind, error, trace)

    # In the watcher's

    def _watch(self, reader: int) -> None:
        while True:
            while os.read(reader, 1)[0] != signal.SIGINT:
                pass
            self._pressed += 1
            if not (self._deferring and self._pressed == 1) and self._must_end(reader):
                self.end()

    def _must_end(self, reader: int) -> bool:
        """Give the main thread its time, or until Ctrl-C is pressed again; not if the handler has put it off."""
        until = time.monotonic() + GRACE
        while time.monotonic() < until:
            if select.select([reader], [], [], LOOK)[0]:
                return True
            if self._deferred >= self._pressed:
                return False
            if self._lost:
                self._lost = self.stopping = False
            if not self.stopping:
                self._signal_again(reader)
        return True

    def _signal_again(self, reader: int) -> None:
        """A signal that came just before the main thread fell asleep, or to another thread, has not woken it."""
        signal.pthread_kill(self._main, signal.SIGINT)
        os.read(reader, 1)  # this one is nobody's


def _is_importing(frame: FrameType | None) -> bool:
    """Is a module being imported? There is nothing to unwind, and extensions print what is raised there, lose it or crash."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


class Deferral:
    """A `with` block in which Ctrl-C only stops what is being done there, if that looks at `pressed`."""

    def __init__(self, interrupts: Interrupts):
        self._interrupts = interrupts

    def __enter__(self) -> Callable[[], bool]:
        """Begin to defer; returns a function that says whether Ctrl-C was pressed since."""
        one = self._interrupts
        one._pressed = one._deferred = 0
        one._deferring = True
        return lambda: one._deferred > 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._interrupts._deferring = False

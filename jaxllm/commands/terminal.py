"""A command's terminal: its output whole, and for slow work one line that is gone before anything else comes."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

EVERY = 0.1  # seconds between two looks of a bar
WIDTH = 80  # of a terminal that does not say it


class Terminal:
    """Standard error, if a person is watching it.

    Progress is shown within `watching` alone: text that is streamed to standard output is not cut by it, since both are mostly
    one terminal.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._on = False
        self._shown = 0  # characters of the line
        self._last = 0.0
        self._lock = threading.RLock()

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._on = self._stream.isatty()
        try:
            yield
        finally:
            with self._lock:
                self._on = False
                self._clear()

    def say(self, line: str) -> None:
        """Show a line for work that is slow and begins now."""
        self._show(f"{line} ...")

    def loaded(self, done: int, total: int) -> None:
        """Show how many of the weights' numbers are there, at most every EVERY seconds."""
        now = time.monotonic()
        if now - self._last >= EVERY:
            self._last = now
            self._show(f"loading: {100 * done // total} % of {total / 1e6:.0f} million parameters")

    def until_first(self, pieces: Iterator[str]) -> Iterator[str]:
        """The pieces of a streamed text, `watching` until the first of them is there."""
        with self.watching():
            first = next(pieces, "")
        yield first
        yield from pieces

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Print the library's warnings as lines of the command."""
        logger, handler = logging.getLogger("jaxllm"), _Lines(self)
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)

    def write_line(self, line: str) -> None:
        """Write a line that stays."""
        with self._lock:
            self._clear()
            print(line, file=self._stream, flush=True)

    def _show(self, line: str) -> None:
        with self._lock:
            if self._on:
                self._clear()
                line = line[: self._width() - 1]
                self._shown = len(line)
                self._stream.write(line)
                self._stream.flush()

    def _clear(self) -> None:
        if self._shown:
            self._stream.write(f"\r{' ' * self._shown}\r")
            self._stream.flush()
            self._shown = 0

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or WIDTH
        except OSError:
            return WIDTH


class _Lines(logging.Handler):
    def __init__(self, terminal: Terminal):
        super().__init__()
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self._terminal.write_line(f"jaxllm: {record.getMessage()}")


def show_all_characters() -> None:
    """Write characters that a terminal's encoding lacks as escapes: no answer is lost for one character."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def abandon_output() -> None:
    """Send further output nowhere, that at the end of Python too: nobody reads it any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)

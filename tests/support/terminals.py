"""A process in a terminal of its own, as a person has it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

from processes import environment_in

LIMIT = 120.0  # seconds until what a test waits for is missing
# Whoever runs the tests in the background has SIGINT ignored, and a child inherits that.
UNIGNORED = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"


class Person:
    """Who sits before `jaxllm`, started with these arguments, and sees all that it writes."""

    def __init__(self, xdg: Path, *arguments: str):
        here, there = pty.openpty()
        termios.tcsetwinsize(there, (24, 100))
        self._here = here
        self.raw = b""
        command = [sys.executable, "-m", "jaxllm", *arguments]
        self._process = subprocess.Popen(
            [sys.executable, "-c", UNIGNORED, *command],
            env=environment_in(xdg) | {"TERM": "dumb"},
            stdin=there,
            stdout=there,
            stderr=there,
            start_new_session=True,
        )
        os.close(there)

    @property
    def seen(self) -> str:
        """The screen's lines: what a carriage return or a backspace has overwritten is gone."""
        return "\n".join(shown(line) for line in self.raw.decode(errors="replace").replace("\r\n", "\n").split("\n"))

    def sees(self, pattern: str, begin: int = 0) -> None:
        """Wait for it."""
        until = time.monotonic() + LIMIT
        while not re.search(pattern, self.raw[begin:].decode(errors="replace")):
            assert time.monotonic() < until, self.seen
            assert self._read(), self.seen

    def types(self, text: str) -> None:
        os.write(self._here, text.encode())

    def presses_ctrl_c(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def waits(self) -> int:
        """For the end of it; the exit code."""
        with contextlib.suppress(OSError):  # Linux's way to say that the other side is closed
            while self._read():
                pass
        os.close(self._here)
        return self._process.wait(LIMIT)

    def _read(self) -> bool:
        if select.select([self._here], [], [], LIMIT)[0]:
            self.raw += os.read(self._here, 1 << 16)
            return True
        return False


def shown(line: str) -> str:
    """The characters that stay of a line that was written over."""
    cells: list[str] = []
    at = 0
    for letter in line:
        if letter == "\r":
            at = 0
        elif letter == "\b":
            at = max(at - 1, 0)
        else:
            cells[at : at + 1] = [letter]
            at += 1
    return "".join(cells).rstrip()

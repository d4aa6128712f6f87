"""A server's life: it listens, loads, answers, and drains when it is told to end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn

from jaxllm.llm import LLM
from jaxllm.serving.app import make_app
from jaxllm.serving.server import Server, Settings

ENDS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def listen(host: str, port: int, uds: str | None) -> Iterator[socket.socket]:
    """A socket that listens. Raises OSError with a sentence where another server has the place."""
    try:
        found = _unix(Path(uds)) if uds else _tcp(host, port)
    except OSError as error:
        where = uds or f"{host}:{port}"
        raise OSError(f"cannot listen on {where} ({error.strerror or error}): is another server there? Choose another") from error
    with found:
        yield found
    if uds:
        Path(uds).unlink(missing_ok=True)


def _tcp(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def _unix(path: Path) -> socket.socket:
    """What a server that was killed has left is removed, and nothing else."""
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.stat().st_mode) and not _answers(path):
            path.unlink()
    found = socket.socket(socket.AF_UNIX)
    try:
        found.bind(str(path))
    except OSError:
        found.close()
        raise
    os.chmod(path, 0o600)
    found.listen(2048)
    return found


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def serve(sock: socket.socket, settings: Settings, make: Callable[[], LLM], shutdown_timeout: int) -> int:
    """Serve until SIGTERM or Ctrl-C, and then until what was admitted is answered, or for so many seconds; a second one ends it.

    Returns the exit code.
    """
    server = Server(settings, make)
    config = uvicorn.Config(
        make_app(server),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=shutdown_timeout,
        lifespan="off",
    )
    http = _Http(config)

    def loaded() -> None:
        if server.failure is not None:
            http.should_exit = True
        else:
            print(f"ready: {', '.join(settings.names)}", flush=True)

    server.load_beside(loaded)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(http.serve(sockets=[sock]))
    if server.failure is not None:
        raise server.failure
    return 0


class _Http(uvicorn.Server):
    """uvicorn, which would end the process by the signal once more after it has drained."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in ENDS:
            loop.add_signal_handler(number, self._end)
        try:
            yield
        finally:
            for number in ENDS:
                loop.remove_signal_handler(number)

    def _end(self) -> None:
        if self.should_exit:
            print("ended before all was answered", file=sys.stderr, flush=True)
            os._exit(1)
        self.should_exit = True

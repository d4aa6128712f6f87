"""A server of the API on loopback, in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn

from jaxllm.serving.app import make_app
from jaxllm.serving.run import listen
from jaxllm.serving.server import Server


@contextmanager
def serving(server: Server) -> Iterator[httpx.Client]:
    """What asks it, until it has ended."""
    http = uvicorn.Server(uvicorn.Config(make_app(server), log_config=None, access_log=False, lifespan="off"))
    with listen("127.0.0.1", 0, None) as socket:
        thread = threading.Thread(target=http.run, kwargs={"sockets": [socket]})
        thread.start()
        url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
                while not http.started:
                    time.sleep(0.01)
                yield client
        finally:
            http.should_exit = True
            thread.join()

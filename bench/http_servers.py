"""Servers of the OpenAI API as processes of their own, and one client for all of them."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from bench.machine import status_bytes
from bench.peers import VLLM
from bench.workload import Request, Served, Times

START_SECONDS = 600
USAGE = re.compile(rb'"completion_tokens": ?(\d+)')


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


class HttpServer:
    """A server that is started by `command`, and up once this is made.

    Args:
      model: what requests call the model.
      clients: requests on their way at once; None: all that have arrived.
    """

    def __init__(
        self, command: Sequence[str], port: int, model: str, env: dict[str, str] | None = None, clients: int | None = None
    ):
        self.model, self.clients = model, clients
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | (env or {}))
        self._wait_until_ready()
        self.version = httpx.get(f"{self.url}/version", trust_env=False).json()["version"]

    def _wait_until_ready(self) -> None:
        limit = time.monotonic() + START_SECONDS
        while time.monotonic() < limit and self.process.poll() is None:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return
            time.sleep(0.2)
        raise SystemExit(f"{self.process.args!r} has not become ready")

    def serve(self, requests: list[Request]) -> Served:
        """Every request when it arrives, streamed."""
        before, start = self._seconds_of_main_thread(), time.perf_counter()
        times = asyncio.run(self._ask_all(requests, start))
        return Served(times, {"main_thread_seconds": self._seconds_of_main_thread() - before})

    async def _ask_all(self, requests: list[Request], start: float) -> list[Times]:
        places = asyncio.Semaphore(self.clients or len(requests))
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, limits=limits, timeout=None, trust_env=False) as client:
            return await asyncio.gather(*(self._ask(client, places, request, start) for request in requests))

    async def _ask(self, client: httpx.AsyncClient, places: asyncio.Semaphore, request: Request, start: float) -> Times:
        await asyncio.sleep(max(request.arrival - (time.perf_counter() - start), 0))
        body = {
            "model": self.model,
            "prompt": request.prompt,
            "max_tokens": request.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        first, last, end = 0.0, 0.0, b""
        async with places, client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise SystemExit(f"{answer.status_code}: {(await answer.aread()).decode()}")
            async for piece in answer.aiter_raw():
                last = time.perf_counter() - start
                first, end = first or last, (end + piece)[-4096:]
        found = USAGE.findall(end)
        assert found and int(found[-1]) == request.new_tokens, f"an answer has ended early: {end[-300:]!r}"
        return Times(first, last)

    def rss_bytes(self) -> int:
        """What the process has in memory now; Linux alone."""
        return status_bytes("VmRSS", self.process.pid)

    def _seconds_of_main_thread(self) -> float:
        """CPU time of the thread that answers, which is not the engine's; Linux alone."""
        pid = self.process.pid
        fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def metric(self, name: str) -> float:
        """A number of /metrics."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(f"{self.url}/metrics", trust_env=False).text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def close(self) -> None:
        """End it, and wait for that."""
        self.process.terminate()
        self.process.wait()


def ours(model: str, options: dict[str, Any], clients: int | None = None) -> HttpServer:
    """`jaxllm serve`; `options` are its own, without those that are None."""
    port = free_port()
    command = [sys.executable, "-m", "jaxllm", "serve", model, "--served-model-name", "it", "--port", str(port)]
    return HttpServer([*command, *_given(options)], port, "it", clients=clients)


def vllm(python: Path, folder: Path, dtype: str, max_model_len: int, max_num_seqs: int, kv_bytes_per_token: int) -> HttpServer:
    """`vllm serve` of a folder of safetensors, with a cache as large as that of `bench.peers.VLLM`."""
    port = free_port()
    cache = VLLM.cache_bytes(max_model_len, max_num_seqs, kv_bytes_per_token)
    options = {"dtype": dtype, "max-model-len": max_model_len, "max-num-seqs": max_num_seqs, "kv-cache-memory-bytes": cache}
    command = [str(python), "-I", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "it"]
    return HttpServer([*command, "--port", str(port), *_given(options)], port, "it", VLLM.environment(python))


def _given(options: dict[str, Any]) -> list[str]:
    """Options of a command line, those that are None left out."""
    return [item for name, value in options.items() if value is not None for item in (f"--{name}", str(value))]

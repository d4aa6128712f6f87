"""OpenAI's batch files: a request a line in, an answer a line out, each as the server would give it.

What is written is whole lines, and an interrupted run goes on: a line's id is made of its request, so that it is known again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from jaxllm.requests import checks
from jaxllm.requests.outputs import RequestError
from jaxllm.requests.text_lines import lines_of

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/score", "/tokenize")
FIELDS = {"custom_id", "method", "url", "body"}
AGAIN = 500  # answers from this status on are no answers: they are asked for again


@dataclass(frozen=True)
class Line:
    """A request of a batch file (https://platform.openai.com/docs/api-reference/batch)."""

    custom_id: str
    url: str
    body: dict[str, Any]

    @property
    def id(self) -> str:
        """Of the answer: the same for the same request."""
        said = json.dumps([self.custom_id, self.url, self.body], sort_keys=True)
        return f"batch_req_{hashlib.sha256(said.encode()).hexdigest()[:24]}"


def read_batch(path: Path) -> list[Line]:
    """The requests of a file. Raises RequestError, which names the line."""
    found: dict[str, Line] = {}
    for where, text in lines_of(path.read_bytes(), str(path)):
        line = _line(where, text)
        if line.custom_id in found:
            raise RequestError(f"{where}: custom_id {line.custom_id!r} is that of another line too: give each its own")
        found[line.custom_id] = line
    if not found:
        raise RequestError(f"{path} holds no requests: give one a line")
    return list(found.values())


def _line(where: str, text: str) -> Line:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{where} is not JSON ({error})") from error
    if not isinstance(value, dict) or not value.keys() >= {"custom_id", "url", "body"}:
        raise RequestError(f'{where}: give {{"custom_id": ..., "method": "POST", "url": ..., "body": {{...}}}}')
    if other := value.keys() - FIELDS:
        raise RequestError(f"{where} has the key {checks.shown(min(other))}: there are {', '.join(sorted(FIELDS))}")
    if value.get("method", "POST") != "POST" or value["url"] not in ENDPOINTS:
        raise RequestError(f"{where}: there are POST requests to {', '.join(ENDPOINTS)}")
    if not isinstance(value["body"], dict) or value["body"].get("stream"):
        raise RequestError(f"{where}: body is an object, and no stream is asked for in a file")
    return Line(checks.text(f"custom_id of {where}", value["custom_id"]), value["url"], value["body"])


class Answers:
    """The file of answers. What it holds of an earlier run of these requests is kept.

    Raises RequestError where it holds anything else.
    """

    def __init__(self, path: Path, lines: Sequence[Line]):
        self.done: set[str] = set()
        kept = []
        wanted = {line.id for line in lines}
        for answer in _answers(path):
            if answer["id"] not in wanted:
                raise RequestError(f"{path} has an answer to another request than these ({answer['id']}): choose another file")
            if answer["response"]["status_code"] < AGAIN:
                self.done.add(answer["id"])
                kept.append(answer)
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.write_text("".join(map(_as_line, kept)))
        new.replace(path)
        self._file = path.open("a")

    def add(self, line: Line, status: int, body: Any) -> None:
        """Write an answer, whole."""
        said = {"status_code": status, "request_id": line.id, "body": body}
        self._file.write(_as_line({"id": line.id, "custom_id": line.custom_id, "response": said, "error": None}))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _answers(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an earlier run."""
    if not path.exists():
        return []
    found = []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    for where, text in lines_of(whole, str(path)):
        try:
            answer = json.loads(text)
            found.append({"id": answer["id"], **answer, "response": answer["response"] | {}})
        except (ValueError, TypeError, KeyError) as error:
            raise RequestError(f"{where} is no answer of an earlier run: choose another file") from error
    return found


def _as_line(answer: dict[str, Any]) -> str:
    return json.dumps(answer) + "\n"


async def run_batch(app: FastAPI, lines: Sequence[Line], at_once: int, answered: Callable[[Line, int, Any], None]) -> None:
    """Ask for each, so many at once; `answered` is called with each line, its answer's status and its body."""
    left = iter(lines)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    async def work(client: httpx.AsyncClient) -> None:
        for line in left:
            response = await client.post(line.url, json=line.body)
            answered(line, response.status_code, response.json())

    client = httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None)
    async with client, asyncio.TaskGroup() as tasks:
        for _ in range(at_once):
            tasks.create_task(work(client))

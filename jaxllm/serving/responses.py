"""Answers of `/v1/responses`: items that were thought, said and called, whole or as the events that build them up.

The forms are OpenAI's (https://platform.openai.com/docs/api-reference/responses). Nothing is stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxllm.generation.request import Request
from jaxllm.serving.answers import Form, named_event, new_id, token_logprobs
from jaxllm.serving.errors import ApiError
from jaxllm.serving.generation import Delta
from jaxllm.serving.messages import MessageReader, Part
from jaxllm.serving.response_request import ResponsesRequest

Event = dict[str, Any]


class Items:
    """The items of an answer. Each method yields the events that tell of a change, to be written out before it goes on."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._kind = ""  # of the text that is being written
        self._blank = ""  # what may begin a message: between calls it is nothing

    def add(self, part: Part, logprobs: list[Any]) -> Iterator[Event]:
        """What was thought, said or called next."""
        if part.kind == "call":
            yield from self.close()
            yield from self._call(part)
            return
        text = part.text
        if part.kind != self._kind:
            yield from self.close()
            text, self._blank = self._blank + text, ""
            if self.items and not text.strip():
                self._blank = text
                return
            yield from self._begin(part.kind)
        content = self.items[-1]["content"][0]
        content["text"] += text
        said = {"type": f"response.{content['type']}.delta", **self._place(), "delta": text}
        if part.kind == "content":
            content["logprobs"] += logprobs
            said["logprobs"] = logprobs
        yield said

    def close(self, status: str = "completed") -> Iterator[Event]:
        """End the text that is being written."""
        if not self._kind:
            return
        self._kind = ""
        item = self.items[-1]
        [content] = item["content"]
        yield {"type": f"response.{content['type']}.done", **self._place(), **_without(content, "type", "annotations")}
        yield {"type": "response.content_part.done", **self._place(), "part": content}
        yield self._done(status)

    def _begin(self, kind: str) -> Iterator[Event]:
        self._kind = kind
        if kind == "thought":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            item: dict[str, Any] = {"type": "reasoning", "id": _new("rs"), "summary": []}
        else:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"type": "message", "id": _new("msg"), "role": "assistant"}
        self.items.append(item | {"status": "in_progress", "content": []})
        yield self._added()
        self.items[-1]["content"] = [part]
        yield {"type": "response.content_part.added", **self._place(), "part": part}

    def _call(self, part: Part) -> Iterator[Event]:
        self._blank = ""
        names = {"type": "function_call", "id": _new("fc"), "call_id": _new("call"), "name": part.name}
        self.items.append(names | {"arguments": "", "status": "in_progress"})
        yield self._added()
        place = _without(self._place(), "content_index")
        self.items[-1]["arguments"] = part.text
        yield {"type": "response.function_call_arguments.delta", **place, "delta": part.text}
        yield {"type": "response.function_call_arguments.done", **place, "name": part.name, "arguments": part.text}
        yield self._done("completed")

    def _added(self) -> Event:
        return {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": self.items[-1]}

    def _done(self, status: str) -> Event:
        self.items[-1]["status"] = status
        return {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": self.items[-1]}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}


class Responses(Form):
    """The answers of `/v1/responses`.

    Args:
      body: what was asked for, which the answer repeats.
      readers: of the one sample's text, where it is more than what is said.
    """

    prefix, kind = "resp_", "response"

    def __init__(
        self, model: str, requests: list[Request], top: int | None, body: ResponsesRequest, readers: Sequence[MessageReader]
    ):
        super().__init__(model, requests, top)
        self._body, self._items, self._readers = body, Items(), readers
        self._numbers = itertools.count()
        self._logprobs: list[Any] = []  # of tokens whose text is not settled
        self._ended_by: str | None = None

    def first(self) -> Iterator[bytes]:
        yield self._event({"type": "response.created", "response": self._response("in_progress")})
        yield self._event({"type": "response.in_progress", "response": self._response("in_progress")})

    def chunk(self, deltas: Iterable[Delta]) -> Iterator[bytes]:
        for delta in deltas:
            yield from map(self._event, self._read(delta))

    def end(self, wants_usage: bool) -> Iterator[bytes]:
        answer = self._response(self._status)
        yield self._event({"type": f"response.{answer['status']}", "response": answer})

    def broken(self, error: ApiError) -> Iterator[bytes]:
        said = {"code": error.code or "server_error", "message": error.detail}
        yield self._event({"type": "response.failed", "response": self._response("failed") | {"error": said}})

    def whole(self) -> dict[str, Any]:
        for delta in self.everything():
            for _ in self._read(delta):
                pass
        return self._response(self._status)

    @property
    def _status(self) -> str:
        return "incomplete" if self._ended_by == "length" else "completed"

    def _event(self, said: Event) -> bytes:
        return named_event(said["type"], said | {"sequence_number": next(self._numbers)})

    def _read(self, delta: Delta) -> Iterator[Event]:
        self.generated += len(delta.token_ids)
        if delta.logprobs is not None:
            self._logprobs += token_logprobs(delta.token_ids, delta.logprobs, self.top or 0)
        ended = delta.finish_reason is not None
        parts = self._readers[0].read(delta.text, ended) if self._readers else [Part("content", delta.text)] * bool(delta.text)
        for part in parts:
            logprobs, self._logprobs = self._logprobs, []
            yield from self._items.add(part, logprobs)
        if ended:
            self._ended_by = delta.finish_reason
            yield from self._items.close(self._status)

    def _response(self, status: str) -> dict[str, Any]:
        ended = status not in ("in_progress", "failed")
        answer = {"id": self.id, "object": "response", "created_at": self.created, "status": status, "error": None}
        answer["incomplete_details"] = {"reason": "max_output_tokens"} if status == "incomplete" else None
        answer |= {"model": self.model, "output": self._items.items, "usage": self._usage() if ended else None}
        return answer | self._body.repeated()

    def _usage(self) -> dict[str, Any]:
        usage, tokenizer = self.usage(), self.requests[0].samples[0].tokenizer
        thoughts = [item["content"][0]["text"] for item in self._items.items if item["type"] == "reasoning"]
        thought = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in thoughts)
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": usage["total_tokens"],
        }


def _new(prefix: str) -> str:
    return f"{prefix}_{new_id()}"


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}

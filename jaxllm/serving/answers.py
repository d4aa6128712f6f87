"""Answers in the form of OpenAI's API, whole and in pieces. Plain dicts, from what samples have gained."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from pydantic_core import to_json

from jaxllm.generation.request import Request
from jaxllm.requests.outputs import Logprob
from jaxllm.serving.errors import ApiError
from jaxllm.serving.generation import Delta, now
from jaxllm.serving.messages import MessageReader, Part

LOWEST = -9999.0  # what OpenAI gives in place of minus infinity, which JSON does not have
DONE = b"data: [DONE]\n\n"
_IDS = random.Random()


def new_id() -> str:
    """32 digits that no other answer has; the system's own random numbers may take a millisecond."""
    return f"{_IDS.getrandbits(128):032x}"


def event(value: Any) -> bytes:
    """A server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html) that holds JSON."""
    return b"data: " + to_json(value) + b"\n\n"


def named_event(name: str, value: Any) -> bytes:
    """The same, of a kind that clients may listen to."""
    return b"event: " + name.encode() + b"\n" + event(value)


def _number(logprob: float) -> float:
    return max(logprob, LOWEST)


def _choice(one: Logprob) -> dict[str, Any]:
    return asdict(one) | {"logprob": _number(one.logprob)}


def _chosen_first(token: int, choices: dict[int, Logprob], top: int) -> tuple[Logprob, list[Logprob]]:
    """The token that was generated, and the `top` likeliest in its place, in order."""
    likeliest = sorted((choice for choice in choices.values() if choice.rank <= top), key=lambda choice: choice.rank)
    return choices[token], likeliest


class Form:
    """One endpoint's answers to one HTTP request.

    Args:
      model: what the answer calls the model.
      requests: of the engine.
      top: likeliest tokens to report; None: no log-probabilities.

    Attributes:
      prefix: of the answer's id.
      kind: what OpenAI calls the object.
    """

    prefix, kind, chunk_kind = "", "", ""

    def __init__(self, model: str, requests: list[Request], top: int | None):
        self.model, self.requests, self.top = model, requests, top
        self.return_token_ids = self.return_prompt_logprobs = self.running_usage = False
        self.id = self.prefix + new_id()
        self.created = now()
        self.samples = len(requests[0].samples)
        self.generated = 0

    def kept(self, delta: Delta) -> Delta:
        """What the client is told of it."""
        return delta

    def place(self, delta: Delta) -> int:
        """The index of a sample among all choices."""
        return delta.request * self.samples + delta.index

    def frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def usage(self) -> dict[str, Any]:
        """Tokens of all prompts, of which some were there already, and of the answers."""
        prompt = sum(len(request.ids) for request in self.requests)
        cached = sum(request.samples[0].sequence.num_shared for request in self.requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.generated,
            "total_tokens": prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def piece(self, delta: Delta) -> dict[str, Any]:
        """What a choice of a chunk has beside its index and its end."""
        raise NotImplementedError

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        usage = {"usage": self.usage()} if self.running_usage else {}
        return event(self.frame(self.chunk_kind) | {"choices": [choice]} | usage)

    def reason(self, delta: Delta) -> str | None:
        """Why a sample has ended; asked after its piece was made."""
        return delta.finish_reason

    def first(self) -> Iterator[bytes]:
        """Events before the first text."""
        return iter(())

    def chunk(self, deltas: Iterable[Delta]) -> Iterator[bytes]:
        """An event for each sample that gained something."""
        for delta in map(self.kept, deltas):
            self.generated += len(delta.token_ids)
            choice = {"index": self.place(delta), **self.piece(delta), "finish_reason": self.reason(delta)}
            if delta.finish_reason is not None:
                choice["stop_reason"] = delta.stop_reason
            if self.return_token_ids:
                choice["token_ids"] = delta.token_ids
            yield self._chunk(choice)

    def end(self, wants_usage: bool) -> Iterator[bytes]:
        """Events after all text."""
        if wants_usage:
            yield event(self.frame(self.chunk_kind) | {"choices": [], "usage": self.usage()})
        yield DONE

    def broken(self, error: ApiError) -> Iterator[bytes]:
        """Events in place of the rest."""
        yield event(error.body)
        yield DONE

    def whole(self) -> dict[str, Any]:
        """The answer at once, after all have ended."""
        choices = []
        for delta in map(self.kept, self.everything()):
            self.generated += len(delta.token_ids)
            choice = {"index": self.place(delta), **self.all(delta), "finish_reason": self.reason(delta)}
            choice["stop_reason"] = delta.stop_reason
            if self.return_token_ids:
                choice |= {"token_ids": delta.token_ids, "prompt_token_ids": self.requests[delta.request].ids}
            choices.append(choice)
        return self.frame(self.kind) | {"choices": choices, "usage": self.usage()}

    def everything(self) -> Iterator[Delta]:
        """All that each sample has gained, after all have ended."""
        for r, request in enumerate(self.requests):
            for one in request.output().outputs:
                yield Delta(r, one.index, one.text, one.token_ids, one.logprobs, one.finish_reason, one.stop_reason)

    def all(self, delta: Delta) -> dict[str, Any]:
        """What a choice of the whole answer has."""
        raise NotImplementedError

    def of_prompt(self, request: int) -> dict[str, Any]:
        """The log-probabilities of a prompt's tokens by their ids, as vLLM reports them, where they were asked for."""
        if not self.return_prompt_logprobs:
            return {}
        found = self.requests[request].samples[0].of_prompt() or []
        return {"prompt_logprobs": [one and {str(token): _choice(choice) for token, choice in one.items()} for one in found]}


class Completion(Form):
    """Of `/v1/completions`. With `echo` the prompt precedes what follows it, its log-probabilities too, or stands `alone`."""

    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, *args: Any, echo: bool = False, alone: bool = False, **options: Any):
        super().__init__(*args, **options)
        self.echo, self.alone = echo, alone
        self._offsets: dict[int, int] = {}
        self._begun: set[int] = set()

    def kept(self, delta: Delta) -> Delta:
        if not self.alone:
            return delta
        none: Any = None if delta.logprobs is None else []
        return replace(delta, text="", token_ids=[], logprobs=none, finish_reason="length", stop_reason=None)

    def all(self, delta: Delta) -> dict[str, Any]:
        return self.piece(delta) | self.of_prompt(delta.request)

    def piece(self, delta: Delta) -> dict[str, Any]:
        place, request = self.place(delta), self.requests[delta.request]
        sample = request.samples[delta.index]
        text, ids, choices = delta.text, delta.token_ids, delta.logprobs
        listed: list[tuple[int, dict[int, Logprob] | None]] = list(zip(ids, choices or [], strict=False))
        if self.echo and place not in self._begun:
            self._begun.add(place)
            prompt = request.prompt if request.prompt is not None else sample.tokenizer.decode(request.ids)
            text = prompt + text
            if choices is not None:
                before = request.samples[0].of_prompt() or [None] * len(request.ids)
                listed = [*zip(request.ids, before, strict=True), *listed]
        if choices is None:
            return {"text": text, "logprobs": None}
        return {"text": text, "logprobs": self._logprobs(place, sample, listed)}

    def _logprobs(self, place: int, sample: Any, listed: list[tuple[int, dict[int, Logprob] | None]]) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        offset = self._offsets.get(place, 0)
        for token, choices in listed:
            name = sample.name(token)
            found["text_offset"].append(offset)
            found["tokens"].append(name)
            offset += len(name)
            if choices is None:  # the first token of a prompt
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
                continue
            chosen, likeliest = _chosen_first(token, choices, self.top or 0)
            found["token_logprobs"].append(_number(chosen.logprob))
            found["top_logprobs"].append({one.decoded_token: _number(one.logprob) for one in likeliest})
        self._offsets[place] = offset
        return found


class Chat(Form):
    """Of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def first(self) -> Iterator[bytes]:
        for place in range(len(self.requests) * self.samples):
            choice = {"index": place, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            yield self._chunk(choice)

    def __init__(self, *args: Any, readers: Sequence[MessageReader] = (), **options: Any):
        """`readers`: of each sample, where its text is more than what is said."""
        super().__init__(*args, **options)
        self._readers = readers

    def piece(self, delta: Delta) -> dict[str, Any]:
        return {"delta": self._message(delta), "logprobs": self._logprobs(delta)}

    def whole(self) -> dict[str, Any]:
        return super().whole() | self.of_prompt(0)

    def all(self, delta: Delta) -> dict[str, Any]:
        message = self._message(delta)
        for call in message.get("tool_calls", []):
            del call["index"]
        content = message.get("content")
        if content is None and "tool_calls" not in message:
            content = ""
        message = {"role": "assistant", "content": content, "refusal": None} | {
            k: v for k, v in message.items() if k != "content"
        }
        return {"message": message, "logprobs": self._logprobs(delta)}

    def reason(self, delta: Delta) -> str | None:
        """A stop after calls is OpenAI's "tool_calls"."""
        called = bool(self._readers) and self._readers[self.place(delta)].calls > 0
        return "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason

    def _message(self, delta: Delta) -> dict[str, Any]:
        """What was said, thought and called, of what was said nothing where that is nothing."""
        if not self._readers:
            return {"content": delta.text} if delta.text else {}
        reader = self._readers[self.place(delta)]
        before = reader.calls
        parts = reader.read(delta.text, delta.finish_reason is not None)
        found: dict[str, Any] = {}
        for name, kind in (("content", "content"), ("reasoning_content", "thought")):
            if text := "".join(part.text for part in parts if part.kind == kind):
                found[name] = text
        if calls := [part for part in parts if part.kind == "call"]:
            found["tool_calls"] = [_call(before + i, part) for i, part in enumerate(calls)]
        return found

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if delta.logprobs is None:
            return None
        return {"content": token_logprobs(delta.token_ids, delta.logprobs, self.top or 0), "refusal": None}


def _call(index: int, part: Part) -> dict[str, Any]:
    function = {"name": part.name, "arguments": part.text}
    return {"index": index, "id": f"call_{new_id()[:24]}", "type": "function", "function": function}


def token_logprobs(ids: list[int], logprobs: list[dict[int, Logprob]], top: int) -> list[dict[str, Any]]:
    """Tokens and the likeliest in their places, as chat completions and responses report them."""
    found = []
    for token, choices in zip(ids, logprobs, strict=True):
        chosen, likeliest = _chosen_first(token, choices, top)
        found.append(_token(chosen) | {"top_logprobs": [_token(one) for one in likeliest]})
    return found


def _token(one: Logprob) -> dict[str, Any]:
    """A token and its log-probability; `bytes` is None of one that is only a part of a character."""
    text = one.decoded_token or ""
    whole = "\N{REPLACEMENT CHARACTER}" not in text
    return {"token": text, "logprob": _number(one.logprob), "bytes": list(text.encode()) if whole else None}

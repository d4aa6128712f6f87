"""What `generate`, `chat` and `score` are given, checked and in one form. Plain Python; raises RequestError.

A dict means what it means in vLLM: `{"prompt": text}`, or `{"prompt_token_ids": ids}` with the text beside it or not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

from jaxllm.requests import checks
from jaxllm.requests.outputs import RequestError


class TextPrompt(TypedDict):
    """A prompt as text. Only prompts of the same `cache_salt` find each other's keys in the cache."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids; a text beside them is reported with the answer, and not read."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt
Message = Mapping[str, Any]
Messages = Sequence[Message]
ScoreRequest = tuple[str, Sequence[str]] | tuple[Sequence[int], Sequence[Sequence[int]]]
"""A context and its continuations."""

_TEXT, _IDS, _SALT = "prompt", "prompt_token_ids", "cache_salt"
_PROMPT = f"a text, a list of token ids, or a dict of `{_TEXT}` or `{_IDS}`"
_PROMPTS = f"{_PROMPT}; or a list of these"


class ParsedPrompt(NamedTuple):
    """A prompt's text, its token ids, or both; who may share its keys, and how long it may wait behind others."""

    text: str | None
    ids: list[int] | None
    cache_salt: str = ""
    priority: int = 0


def parse_prompts(prompts: Any) -> list[ParsedPrompt]:
    """One prompt or several, as `generate` takes them."""
    if isinstance(prompts, (str, Mapping)):
        return [parse_prompt(prompts)]
    many = checks.items("prompts", prompts, _PROMPTS)
    if many and not isinstance(many[0], (str, Mapping)) and not _is_nested(many[0]):
        return [parse_prompt(many)]
    return [parse_prompt(prompt, f"prompts[{i}]") for i, prompt in enumerate(many)]


def with_priorities(prompts: list[ParsedPrompt], priority: Any) -> list[ParsedPrompt]:
    """The prompts, each with its number of `priority`; None: all are alike."""
    if priority is None:
        return prompts
    numbers = checks.items("priority", priority, "a list of whole numbers")
    if len(numbers) != len(prompts):
        raise RequestError(f"{len(numbers)} of priority for {len(prompts)} prompts: give one for each")
    return [
        prompt._replace(priority=checks.whole(f"priority[{i}]", number))
        for i, (prompt, number) in enumerate(zip(prompts, numbers, strict=True))
    ]


def _is_nested(value: Any) -> bool:
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0


def parse_prompt(prompt: Any, name: str = "prompt") -> ParsedPrompt:
    """One prompt; `name` is what messages call it."""
    if isinstance(prompt, str):
        return ParsedPrompt(prompt, None)
    if not isinstance(prompt, Mapping):
        return ParsedPrompt(
            None, checks.token_ids(name, prompt, f"a text, a list of token ids, or a dict of `{_TEXT}` or `{_IDS}`")
        )
    if other := [key for key in prompt if key not in (_TEXT, _IDS, _SALT)]:
        raise RequestError(
            f"{name} has the key {checks.shown(other[0])}: a dict holds `{_TEXT}` or `{_IDS}` and, if need be, `{_SALT}`"
        )
    text, ids = prompt.get(_TEXT), prompt.get(_IDS)
    if text is None and ids is None:
        raise RequestError(f"{name} is a dict with neither `{_TEXT}` nor `{_IDS}`: give one of them")
    return ParsedPrompt(
        None if text is None else checks.text(f"{name}[{_TEXT!r}]", text),
        None if ids is None else checks.token_ids(f"{name}[{_IDS!r}]", ids),
        checks.text(f"{name}[{_SALT!r}]", prompt.get(_SALT) or ""),
    )


def parse_conversations(messages: Any) -> list[list[dict[str, Any]]]:
    """One conversation or several, as `chat` takes them."""
    wanted = 'a list of messages, each {"role": ..., "content": ...}, or a list of such lists'
    many = checks.items("messages", messages, wanted)
    if not many or isinstance(many[0], Mapping):
        return [parse_conversation(many)]
    return [parse_conversation(one, f"messages[{i}]") for i, one in enumerate(many)]


def parse_conversation(messages: Any, name: str = "messages") -> list[dict[str, Any]]:
    """Messages of one conversation with texts as their contents, as chat templates expect them."""
    found = checks.items(name, messages, 'a list of messages, each {"role": ..., "content": ...}')
    if not found:
        raise RequestError(f"{name} is empty: give at least one message")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(found)]


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f'{name}={checks.shown(message)}: a message is a dict, {{"role": ..., "content": ...}}')
    if "role" not in message:
        raise RequestError(f'{name} has no "role": say who speaks, such as "user"')
    parsed = dict(message) | {"role": checks.text(f"{name}['role']", message["role"])}
    content = message.get("content")
    if content is None and "content" not in message and "tool_calls" not in message:
        raise RequestError(f'{name} has no "content": give its text')
    if content is not None:
        parsed["content"] = _content(content, f"{name}['content']")
    if message.get("tool_calls") is not None:
        parsed["content"] = parsed.get("content") or ""  # templates that know no calls add to it
        calls = checks.items(f"{name}['tool_calls']", message["tool_calls"], "a list of calls")
        parsed["tool_calls"] = [_tool_call(call, f"{name}['tool_calls'][{i}]") for i, call in enumerate(calls)]
    return parsed


def _content(content: Any, name: str) -> str:
    """A text; text parts, as in OpenAI's API, are joined by new lines, as vLLM joins them."""
    if isinstance(content, str):
        return content
    parts = checks.items(name, content, "a text, or a list of parts of type text")
    return "\n".join(_part(part, f"{name}[{i}]") for i, part in enumerate(parts))


def _part(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise RequestError(f'{name} is {checks.shown(kind)}, and only text is understood: give {{"type": "text", "text": ...}}')
    return checks.text(f"{name}['text']", part.get("text"))


def _tool_call(call: Any, name: str) -> Any:
    """A call whose arguments are a dict: templates write it out themselves, and OpenAI's API has it as JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError as error:
        raise RequestError(f"{name}: its arguments are not JSON ({error}): correct them") from error
    return dict(call) | {"function": dict(function) | {"arguments": arguments}}


def parse_score_requests(requests: Any) -> list[ScoreRequest]:
    """(context, continuations) pairs, all texts or all token ids in each."""
    wanted = "a list of (context, continuations)"
    return [_score_request(one, f"requests[{i}]") for i, one in enumerate(checks.items("requests", requests, wanted))]


def _score_request(request: Any, name: str) -> ScoreRequest:
    pair = checks.items(name, request, "a pair (context, continuations)")
    if len(pair) != 2:
        raise RequestError(f"{name} has {len(pair)} items: give a pair (context, continuations)")
    context, continuations = pair[0], checks.items(f"the continuations of {name}", pair[1], "a list of continuations")
    if isinstance(context, str):
        return context, [checks.text(f"continuation {i} of {name}", one) for i, one in enumerate(continuations)]
    ids = checks.token_ids(f"the context of {name}", context)
    return ids, [checks.token_ids(f"continuation {i} of {name}", one) for i, one in enumerate(continuations)]

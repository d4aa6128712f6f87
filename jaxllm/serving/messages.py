"""The text of an answer -> a message: what was thought, what was said, which tools were called. Read as it comes.

How a model writes that, its tokenizer says in a response template of transformers; where it says nothing, the chat template shows
whether it is the common form, JSON between `<tool_call>` and `</tool_call>`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_parsing import ResponseParser

from jaxllm.serving.errors import ApiError

THOUGHTS = ("thinking", "reasoning", "reasoning_content")  # what templates call them
_THINKING = {"open": "<think>", "close": "</think>"}
OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CALLS = {"open": OPEN, "close": CLOSE, "repeats": True}  # read as text: one that is no JSON is what was said


@dataclass(frozen=True)
class Part:
    """A piece of a message: text that was said or thought, or a whole call of a tool, whose arguments are JSON."""

    kind: str  # "content", "thought" or "call"
    text: str
    name: str = ""


def response_template(tokenizer: Any) -> dict[str, Any] | None:
    """How the model's answers are written; None where they are text and nothing else."""
    own = getattr(tokenizer, "response_template", None)
    if own is not None:
        return dict(own)
    said = tokenizer.chat_template
    if isinstance(said, Mapping):
        said = said.get("tool_use") or said.get("default")
    found: dict[str, Any] = {}
    if "</think>" in (said or ""):
        found["thinking"] = _THINKING
    if "</tool_call>" in (said or "") and "<function=" not in said:
        found["tool_calls"] = _CALLS
    if not found:
        return None
    return {"defaults": {}, "start_anchor_pattern": r"(?:assistant)[^a-zA-Z<]*(?!.*assistant)", "fields": {"content": {}} | found}


def is_common_form(template: dict[str, Any] | None) -> bool:
    """Are calls written as JSON between `<tool_call>` and `</tool_call>`?"""
    return template is not None and template["fields"].get("tool_calls") is _CALLS


class MessageReader:
    """Reads the text of one answer.

    Args:
      template: see `response_template`.
      prompt: the text that the answer follows, where a thought may have been begun.
      tools: as the request has them; arguments are of the types that these say.
    """

    def __init__(self, template: dict[str, Any], prompt: str, tools: Sequence[Any]):
        self._parser: ResponseParser | None = ResponseParser(template, prefix=prompt, tools=list(tools))
        self._raw = ""  # of a call that has not ended
        self.calls = 0

    def read(self, text: str, ended: bool) -> list[Part]:
        """The parts that are settled by some more text."""
        if self._parser is None:
            return [Part("content", text)] if text else []
        try:
            events = self._parser.feed(text)
            if ended:
                events += self._parser.finalize()[1]
        except ValueError:  # the template cannot read it: from here on all of it is what was said
            self._parser = None
            return [Part("content", self._raw + text)]
        return [part for one in events for part in self._parts(one)]

    def _parts(self, one: dict[str, Any]) -> list[Part]:
        kind, field = one["type"], one["field"]
        if field == "tool_calls":
            if kind != "region_close":
                self._raw = "" if kind == "region_open" else self._raw + one["text"]
                return []
            calls = one["value"] if isinstance(one["value"], list) else [one["value"]]
            return [self._call(call) for call in calls]
        if kind != "region_chunk":
            return []
        return [Part("thought" if field in THOUGHTS else "content", one["text"])]

    def _call(self, call: Any) -> Part:
        if isinstance(call, str):
            try:
                call = json.loads(call)
            except ValueError:
                return Part("content", f"{OPEN}{call}{CLOSE}")
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return Part("content", json.dumps(call))
        self.calls += 1
        arguments = function.get("arguments", function.get("parameters", {}))
        return Part("call", arguments if isinstance(arguments, str) else json.dumps(arguments), function["name"])


def forced_call(tools: Sequence[Mapping[str, Any]], name: str | None, several: bool) -> str:
    """A grammar of calls of one of the tools, or of the one that is named; for models that write them in the common form."""
    functions = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
    if not functions:
        raise ApiError(400, f"tool_choice names {name!r}, which is none of tools", param="tool_choice")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": one["name"]}, "arguments": one.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for one in functions
    ]
    more = ' ("\\n" call)*' if several else ""
    return f'start: call{more}\ncall: "{OPEN}\\n" made "\\n{CLOSE}"\nmade: %json {json.dumps({"anyOf": calls})}\n'

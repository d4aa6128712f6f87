"""`POST /v1/responses`: its body, and the chat that it stands for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxllm.requests import checks
from jaxllm.serving.errors import ApiError
from jaxllm.serving.protocol import ChatRequest, Function, Object, Sampled

TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
LOGPROBS = "message.output_text.logprobs"


class TextFormat(Object):
    """The form that the answer is to have."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextConfig(Object):
    """How the text of an answer is to be."""

    format: TextFormat | None = None


class FunctionTool(Function):
    """A function that the model may call."""

    type: Literal["function"]


class FunctionChoice(Object):
    """The function that is to be called."""

    type: Literal["function"]
    name: str


class Reasoning(Object):
    """How much is to be thought first."""

    effort: str | None = None


class ResponsesRequest(Sampled):
    """`POST /v1/responses`."""

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = None
    metadata: dict[str, str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def as_chat(self) -> ChatRequest:
        """The same as a chat. Raises ApiError for what cannot be one."""
        if self.n not in (None, 1):
            raise ApiError(400, f"n={self.n}: a response is one answer: leave n out, or use /v1/chat/completions", param="n")
        same = {name: value for name in Sampled.model_fields if (value := getattr(self, name)) is not None}
        logprobs = self.top_logprobs is not None or LOGPROBS in (self.include or ())
        chat: dict[str, Any] = {
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": logprobs,
            "top_logprobs": (self.top_logprobs or 0) if logprobs else None,
            "parallel_tool_calls": self.parallel_tool_calls,
            "chat_template_kwargs": self.chat_template_kwargs,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
        }
        if self.text is not None and self.text.format is not None:
            chat["response_format"] = self._response_format(self.text.format)
        if self.tools is not None:
            chat["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_unset=True)} for tool in self.tools
            ]
        choice = self.tool_choice
        chat["tool_choice"] = (
            {"type": "function", "function": {"name": choice.name}} if isinstance(choice, FunctionChoice) else choice
        )
        return ChatRequest.model_validate(same | chat)

    @staticmethod
    def _response_format(form: TextFormat) -> dict[str, Any]:
        if form.type == "json_schema":
            if form.schema_ is None:
                raise ApiError(400, "text: the format is json_schema and its schema is missing: give one", param="text")
            return {"type": form.type, "json_schema": {"name": form.name or "answer", "schema": form.schema_}}
        return {"type": form.type}

    def _messages(self) -> list[dict[str, Any]]:
        instructions = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*instructions, {"role": "user", "content": self.input}]
        parts = [_message(item, f"input[{i}]") for i, item in enumerate(self.input)]
        # What an assistant has thought, said and called in a row is one message.
        messages = []
        for of_assistant, run in itertools.groupby(parts, lambda one: one["role"] == "assistant"):
            said = list(run)
            messages += [_joined(said)] if of_assistant else said
        return [*instructions, *messages]

    def repeated(self) -> dict[str, Any]:
        """What an answer repeats of its request."""
        form = self.text.format if self.text else None
        choice = self.tool_choice
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": self.reasoning.effort if self.reasoning else None, "summary": None},
            "store": False,
            "temperature": self.temperature,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
            "tool_choice": choice.model_dump() if isinstance(choice, FunctionChoice) else choice or "auto",
            "tools": [tool.model_dump(exclude_unset=True) for tool in self.tools or []],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": self.top_p,
            "truncation": "disabled",
        }


def _message(item: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One item of the input as a message of its own."""
    kind = item.get("type", "message")
    if kind == "message":
        role = _string(item, "role", name)
        return {"role": "system" if role == "developer" else role, "content": _text(item.get("content"), name)}
    if kind == "reasoning":
        return {"role": "assistant", "reasoning_content": _text(item.get("content") or item.get("summary") or "", name)}
    if kind == "function_call":
        function = {"name": _string(item, "name", name), "arguments": _string(item, "arguments", name)}
        return {"role": "assistant", "tool_calls": [{"type": "function", "id": item.get("call_id"), "function": function}]}
    if kind == "function_call_output":
        call = _string(item, "call_id", name)
        return {"role": "tool", "tool_call_id": call, "content": _text(item.get("output"), name)}
    known = "message, reasoning, function_call and function_call_output"
    raise ApiError(400, f"{name} is of the type {checks.shown(kind)}, and there are {known}", param="input")


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    said = [part["content"] for part in parts if "content" in part]
    calls = [call for part in parts for call in part.get("tool_calls", ())]
    message: dict[str, Any] = {"role": "assistant", "content": "".join(said)}
    if thought := "".join(part.get("reasoning_content", "") for part in parts):
        message["reasoning_content"] = thought
    return message | ({"tool_calls": calls} if calls else {})


def _string(item: Mapping[str, Any], key: str, name: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise ApiError(400, f"{name} has no {key}: give a text", param="input")
    return value


def _text(content: Any, name: str) -> str:
    """A text, or its parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) and part.get("type") in TEXTS for part in content):
        raise ApiError(400, f"{name}: its content is a text, or a list of parts of type input_text or output_text", param="input")
    return "\n".join(_string(part, "text", name) for part in content)

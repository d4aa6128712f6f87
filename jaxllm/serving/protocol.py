"""Bodies of requests, with the fields of OpenAI's API and those that vLLM added; what becomes of them in SamplingParams."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from jaxllm.requests.prompts import ParsedPrompt
from jaxllm.requests.sampling_params import SamplingParams
from jaxllm.serving.errors import ApiError

TokenIds = Annotated[list[int], Field(min_length=1)]
Prompt = str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1)]

# Accepted, and of no consequence to one model on one machine.
IGNORED = frozenset(
    {
        "include",
        "max_tool_calls",
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
# What would change the answer and is not done, and what takes its place.
REFUSED = {
    "audio": "the answer is text: leave it out",
    "background": "answers are not kept: leave it out, or stream",
    "best_of": "use n, and choose among the answers",
    "conversation": "conversations are not kept: send all of it",
    "function_call": "it is OpenAI's old name of tool_choice: use that",
    "functions": "it is OpenAI's old name of tools: use that",
    "prediction": "it is not understood: leave it out",
    "previous_response_id": "answers are not kept: send the whole conversation as input",
    "prompt": "prompts are not kept: send their text",
    "suffix": "the model continues a text and fills no gap: leave it out",
    "tool_choice": "tools are for /v1/chat/completions",
    "tools": "tools are for /v1/chat/completions",
    "use_beam_search": "beam search is not done: leave it out",
    "web_search_options": "the server searches nothing: leave it out",
}
# Fields of SamplingParams that requests have under the same name.
SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "allowed_token_ids",
    "bad_words",
    "skip_special_tokens",
    "truncate_prompt_tokens",
    "prompt_logprobs",
    "structured_outputs",
)


class Object(BaseModel):
    """An object of a request: of the types that it says, with whatever else clients send."""

    model_config = ConfigDict(extra="allow", strict=True)


class Body(Object):
    """The body of a request. What it does not know is kept, to be named in the answer's headers."""

    @property
    def unknown(self) -> list[str]:
        """Fields that nothing is known of. Raises ApiError for those that would change the answer and are not done."""
        extra = self.model_extra or {}
        for name in extra:
            if name in REFUSED and extra[name] not in (None, False, [], "none"):
                raise ApiError(400, f"{name}: {REFUSED[name]}", param=name, code="unsupported_parameter")
        return sorted(name for name in extra if name not in IGNORED and name not in REFUSED)


class StreamOptions(BaseModel):
    """What a stream holds beside text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: with every piece
    include_obfuscation: bool = False


class JsonSchema(Object):
    """A schema and its name."""

    name: str
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Object):
    """The form that an answer is to have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def wanted(self) -> dict[str, Any] | None:
        """What SamplingParams call it; None for a text."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise ApiError(400, "response_format: json_schema is missing: give a name and a schema", param="response_format")
            return {"json": self.json_schema.schema_}
        return {"json_object": True} if self.type == "json_object" else None


class Sampled(Body):
    """What requests for text have in common; None of a field stands for its default."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None

    def params(self, defaults: Mapping[str, Any], max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Sampling as this request and, where it is silent, `defaults` say. Raises RequestError or ApiError."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options are of a stream: set stream", param="stream_options")
        given = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        if self.response_format is not None and (form := self.response_format.wanted()) is not None:
            if self.structured_outputs is not None:
                raise ApiError(
                    400, "response_format and structured_outputs both say a form: leave one out", param="response_format"
                )
            given["structured_outputs"] = form
        if self.logit_bias:
            given["logit_bias"] = {_token(name): bias for name, bias in self.logit_bias.items()}
        return SamplingParams(**{**defaults, "max_tokens": max_tokens, **given, "logprobs": logprobs})

    def queued(self, prompt: ParsedPrompt) -> ParsedPrompt:
        """The prompt, with its place among those that wait, and who may share its keys."""
        return prompt._replace(priority=self.priority or 0, cache_salt=self.cache_salt or "")

    @property
    def wants_running_usage(self) -> bool:
        return self.stream_options is not None and self.wants_usage and self.stream_options.continuous_usage_stats

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def _token(name: str) -> int:
    if not name.isdecimal():
        raise ApiError(400, f"logit_bias: {name!r} is no token id", param="logit_bias")
    return int(name)


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    prompt: Prompt
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool = False


class Function(Object):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Object):
    """A tool of a request."""

    type: Literal["function"]
    function: Function


class NamedFunction(Object):
    """The name of a function."""

    name: str


class NamedTool(Object):
    """The tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    @cached_property
    def tools_offered(self) -> list[dict[str, Any]]:
        """The tools that the model may call, as chat templates take them."""
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice asks for a call, and there are no tools", param="tool_choice")
        return [] if self.tool_choice == "none" else [tool.model_dump(exclude_unset=True) for tool in self.tools or []]

    @property
    def tool_wanted(self) -> bool:
        """Must the model call one?"""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)


class TokenizeRequest(Body):
    """`POST /tokenize`: a text, or messages under the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]


class Scored(BaseModel):
    """A context and its continuations: texts, or token ids."""

    model_config = ConfigDict(extra="forbid", strict=True)

    context: str | list[int]
    continuations: Annotated[list[str | list[int]], Field(min_length=1)]


class ScoreBody(Body):
    """`POST /score`."""

    model: str | None = None
    requests: Annotated[list[Scored], Field(min_length=1)]
    truncate: bool = False

"""A conversation that is to be answered -> a request of the engine, and what reads its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxllm.generation.request import Request
from jaxllm.requests.prompts import ParsedPrompt
from jaxllm.requests.sampling_params import SamplingParams
from jaxllm.requests.structured_outputs import StructuredOutputsParams
from jaxllm.serving.answering import check_room
from jaxllm.serving.errors import ApiError
from jaxllm.serving.generation import in_thread
from jaxllm.serving.messages import MessageReader, forced_call, is_common_form
from jaxllm.serving.protocol import ChatRequest, NamedTool
from jaxllm.serving.server import Server


@dataclass(frozen=True)
class Conversation:
    """What answers a conversation.

    Attributes:
      requests: the one that goes on with it.
      top: likeliest tokens to report; None: no log-probabilities.
      readers: of each sample, where its text is more than what is said.
    """

    requests: list[Request]
    top: int | None
    readers: list[MessageReader]


async def take_up(server: Server, body: ChatRequest) -> Conversation:
    """Raises ApiError or RequestError for what cannot be answered."""
    server.check_model(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs are of log-probabilities: set logprobs", param="top_logprobs")
    top = (body.top_logprobs or 0) if body.logprobs else None
    length = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    defaults, template = server.llm.generation_defaults, server.response_template
    params = body.params(defaults, defaults.get("max_tokens") if length is None else length, top)
    if template is not None and body.skip_special_tokens is None:
        params.skip_special_tokens = False  # some templates know calls and thoughts by them
    if body.tool_wanted:
        _force_a_call(body, params, template)
    requests = await in_thread(lambda: _requests(server, body, params))
    check_room(server, requests, length)
    readers = [] if template is None else await in_thread(lambda: _readers(server, body, template, requests[0]))
    return Conversation(requests, top, readers)


def _force_a_call(body: ChatRequest, params: SamplingParams, template: dict[str, Any] | None) -> None:
    """Hold the answer to calls of tools. Raises ApiError where it is not known how this model writes them."""
    if params.structured_outputs is not None:
        raise ApiError(
            400, "tool_choice asks for a call, and response_format for another form: leave one out", param="tool_choice"
        )
    if not is_common_form(template):
        raise ApiError(
            400, "tool_choice: this model's calls cannot be forced; leave it to the model with auto", param="tool_choice"
        )
    name = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    several = name is None and body.parallel_tool_calls is not False
    params.structured_outputs = StructuredOutputsParams(grammar=forced_call(body.tools_offered, name, several))


def _readers(server: Server, body: ChatRequest, template: dict[str, Any], request: Request) -> list[MessageReader]:
    prompt = server.llm.get_tokenizer().decode(request.ids)
    return [MessageReader(template, prompt, body.tools_offered) for _ in request.samples]


def _requests(server: Server, body: ChatRequest, params: SamplingParams) -> list[Request]:
    values = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        values.setdefault("reasoning_effort", body.reasoning_effort)
    if not server.settings.trust_request_templates and (body.chat_template is not None or "chat_template" in values):
        raise ApiError(
            400, "chat_template: requests may not bring one to this server (--trust-request-chat-template)", param="chat_template"
        )
    ids = server.llm.chat_prompt(
        body.messages,
        chat_template=body.chat_template,
        chat_template_kwargs=values,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        tools=body.tools_offered or None,
    )
    return server.llm.make_requests([body.queued(ParsedPrompt(None, ids))], [params])

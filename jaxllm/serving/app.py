"""The endpoints: what each takes, and what it gives back."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from jaxllm import __version__
from jaxllm.execution.steps import MAX_STEPS
from jaxllm.generation.grammar import GrammarError
from jaxllm.generation.loop import STREAM_STEPS
from jaxllm.generation.request import Request as Generated
from jaxllm.requests.encoding import check_ids
from jaxllm.requests.outputs import RequestError
from jaxllm.requests.prompts import ParsedPrompt, parse_prompts
from jaxllm.requests.sampling_params import SamplingParams
from jaxllm.requests.structured_outputs import StructuredOutputsParams
from jaxllm.serving.access import Access
from jaxllm.serving.answers import DONE, Chat, Completion, Form, event
from jaxllm.serving.errors import ApiError, failed, misshapen, refused
from jaxllm.serving.generation import Delta, deltas, in_thread, now, unless_gone
from jaxllm.serving.messages import MessageReader, forced_call, is_common_form, response_template
from jaxllm.serving.protocol import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    NamedTool,
    Sampled,
    ScoreBody,
    TokenizeRequest,
)
from jaxllm.serving.server import Server

IGNORED_HEADER = "X-Ignored-Fields"
_LOG = logging.getLogger("jaxllm")
router = APIRouter()


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


Served = Annotated[Server, Depends(_server)]


def make_app(server: Server) -> FastAPI:
    """The ASGI application of a server."""
    app = FastAPI(title="jaxllm", version=__version__, docs_url=None, redoc_url=None, strict_content_type=False)
    app.state.server = server
    app.include_router(router)
    app.add_middleware(Access, api_keys=server.settings.api_keys, max_body_bytes=server.settings.max_body_bytes)
    app.add_exception_handler(ApiError, lambda _, error: _answer(error))
    app.add_exception_handler(RequestError, lambda _, error: _answer(refused(error)))
    app.add_exception_handler(RequestValidationError, lambda _, error: _answer(misshapen(error.errors())))
    app.add_exception_handler(HTTPException, lambda _, error: _answer(ApiError(error.status_code, error.detail)))
    app.add_exception_handler(GrammarError, lambda _, error: _answer(failed(error)))
    app.add_exception_handler(Exception, lambda _, error: _answer(failed(error)))
    return app


def _answer(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status_code, error.headers)


# About the server


@router.get("/health")
async def health(server: Served) -> JSONResponse:
    """200 when the model is loaded and its steps end; 503 with what it is doing otherwise."""
    status, said = server.health()
    return JSONResponse(said, status)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/metrics")
async def metrics(server: Served) -> Response:
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/models")
async def models(server: Served) -> dict[str, Any]:
    return {"object": "list", "data": [_card(server, name) for name in server.settings.names]}


@router.get("/v1/models/{name:path}")
async def model(server: Served, name: str) -> dict[str, Any]:
    server.check_model(name)
    return _card(server, name)


def _card(server: Server, name: str) -> dict[str, Any]:
    llm, root = server.llm, server.settings.names[0]
    card = {"id": name, "object": "model", "created": server.started, "owned_by": "jaxllm", "root": root}
    return card | {"parent": None, "max_model_len": llm.plan.max_model_len}


# Text


@router.post("/v1/completions", response_model=None)
async def completions(server: Served, body: CompletionRequest, request: Request) -> Response:
    """Go on with a text, or with each of several."""
    server.check_model(body.model)
    prompts = parse_prompts(body.prompt)
    params = body.params(server.llm.generation_defaults, body.max_tokens, body.logprobs)
    if body.echo and body.logprobs is not None and params.prompt_logprobs is None:
        params.prompt_logprobs = body.logprobs
    requests = await in_thread(lambda: server.llm.make_requests(prompts, [params] * len(prompts)))
    _check_room(server, requests, body.max_tokens if "max_tokens" in body.model_fields_set else None)
    return await _run(server, body, request, Completion(server.name_of(body), requests, body.logprobs, echo=body.echo))


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(server: Served, body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    server.check_model(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs are of log-probabilities: set logprobs", param="top_logprobs")
    top = (body.top_logprobs or 0) if body.logprobs else None
    length = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    defaults = server.llm.generation_defaults
    params = body.params(defaults, defaults.get("max_tokens") if length is None else length, top)
    template = response_template(server.llm.get_tokenizer())
    if template is not None and body.skip_special_tokens is None:
        params.skip_special_tokens = False  # some templates know calls and thoughts by them
    if body.tool_wanted:
        _force_a_call(body, params, template)
    requests = await in_thread(lambda: _chat_requests(server, body, params))
    _check_room(server, requests, length)
    readers = [] if template is None else await in_thread(lambda: _readers(server, body, template, requests[0]))
    return await _run(server, body, request, Chat(server.name_of(body), requests, top, readers=readers))


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


def _readers(server: Server, body: ChatRequest, template: dict[str, Any], request: Generated) -> list[MessageReader]:
    prompt = server.llm.get_tokenizer().decode(request.ids)
    return [MessageReader(template, prompt, body.tools_offered) for _ in request.samples]


def _chat_requests(server: Server, body: ChatRequest, params: SamplingParams) -> list[Generated]:
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
    return server.llm.make_requests([ParsedPrompt(None, ids)], [params])


async def _run(server: Server, body: Sampled, request: Request, form: Form) -> Response:
    """Answer at once, or in a stream."""
    headers = _ignored(body)
    form.return_token_ids = bool(body.return_token_ids)
    if body.request_id is not None:
        form.id = f"{form.prefix}-{body.request_id}"
    admission = ExitStack()
    admission.enter_context(server.admit(len(form.requests) * form.samples))
    if body.stream:
        return EventStream(_events(server, form, body.wants_usage), admission, headers)
    with admission:
        ended = await unless_gone(request.receive, _until_ended(server, form.requests))
    return JSONResponse(form.whole() if ended else None, headers=headers)


def _check_room(server: Server, requests: list[Generated], asked: int | None) -> None:
    """Raises ApiError where an answer of so many tokens may not find room: it would be cut without a word."""
    limit, longest = server.llm.plan.max_model_len, max(len(one.ids) for one in requests)
    if asked is not None and longest + asked > limit:
        raise ApiError(
            400,
            f"max_tokens={asked}: the prompt has {longest} tokens and the context holds {limit} with the answer: ask "
            f"for {limit - longest} at most",
            param="max_tokens",
            code="context_length_exceeded",
        )


async def _news(server: Server, requests: list[Generated], steps: int) -> AsyncGenerator[list[Delta]]:
    """What requests gain, as the metrics see it too."""
    watch = server.metrics.watch(requests)
    async with aclosing(deltas(server.llm, requests, steps)) as news:
        async for found in news:
            watch.see(found)
            yield found


async def _until_ended(server: Server, requests: list[Generated]) -> bool:
    async with aclosing(_news(server, requests, MAX_STEPS)) as news:
        async for _ in news:
            pass
    return True


async def _events(server: Server, form: Form, wants_usage: bool) -> AsyncGenerator[bytes]:
    try:
        for one in form.first():
            yield one
        async with aclosing(_news(server, form.requests, STREAM_STEPS)) as news:
            async for found in news:
                yield b"".join(form.chunk(found))
        if wants_usage:
            yield form.last()
    except Exception as error:  # the status is sent already
        _LOG.exception("an answer ended with an error")
        yield event(failed(error).body)
    yield DONE


def _ignored(body: Body) -> dict[str, str]:
    """A header that names the fields that nothing is known of."""
    unknown = body.unknown
    if unknown:
        _LOG.warning("fields of a request that are not understood: %s", ", ".join(unknown))
    return {IGNORED_HEADER: ", ".join(name for name in unknown if name.isascii() and name.isprintable())} if unknown else {}


class EventStream(Response):
    """Server-sent events as they come; when the client goes away, they end, and what they were admitted to with them."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], admission: ExitStack, headers: dict[str, str]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | headers)
        del self.headers["content-length"]
        self._events, self._admission = events, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._admission:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events):
            async for one in self._events:
                await send({"type": "http.response.body", "body": one, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


# Tokens


@router.post("/tokenize")
async def tokenize(server: Served, body: TokenizeRequest) -> dict[str, Any]:
    """The token ids of a text, or of messages under the chat template."""
    server.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give a prompt or messages, one of them", param="prompt")
    tokenizer = server.llm.get_tokenizer()

    def encode() -> list[int]:
        if body.prompt is not None:
            return list(tokenizer(body.prompt, add_special_tokens=body.add_special_tokens)["input_ids"])
        return server.llm.chat_prompt(
            body.messages or [],
            chat_template_kwargs=body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
        )

    ids = await in_thread(encode)
    names = tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": server.llm.plan.max_model_len, "tokens": ids, "token_strs": names}


@router.post("/detokenize")
async def detokenize(server: Served, body: DetokenizeRequest) -> dict[str, str]:
    """The text of token ids."""
    server.check_model(body.model)
    check_ids("tokens", body.tokens, server.llm.config.vocab_size)
    return {"prompt": await in_thread(lambda: server.llm.get_tokenizer().decode(body.tokens))}


@router.get("/tokenizer_info")
async def tokenizer_info(server: Served) -> dict[str, Any]:
    """What clients that tokenize themselves need to know."""
    tokenizer = server.llm.get_tokenizer()
    info = {"tokenizer_class": type(tokenizer).__name__, "vocab_size": len(tokenizer), "chat_template": tokenizer.chat_template}
    return info | {f"{name}_token": getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "pad", "unk")}


# Scores


@router.post("/score", response_model=None)
async def score(server: Served, body: ScoreBody, request: Request) -> Response:
    """Log-probabilities of continuations; what contexts have in common runs once."""
    server.check_model(body.model)
    headers = _ignored(body)
    asked: Any = [(one.context, one.continuations) for one in body.requests]
    with server.admit(1):
        found = await unless_gone(request.receive, in_thread(lambda: server.llm.score(asked, truncate=body.truncate)))
    scores = [[_score(one) for one in scores] for scores in found or []]
    return JSONResponse({"object": "score", "created": now(), "scores": scores}, headers=headers)


def _score(one: Any) -> dict[str, Any]:
    return {"logprob": one.logprob, "token_logprobs": list(one.token_logprobs), "is_greedy": one.is_greedy}

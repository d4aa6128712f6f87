"""The endpoints: what each takes, and what it gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from jaxllm import __version__
from jaxllm.generation.grammar import GrammarError
from jaxllm.requests.encoding import check_ids
from jaxllm.requests.outputs import RequestError
from jaxllm.requests.prompts import parse_prompts
from jaxllm.serving.access import Access
from jaxllm.serving.answering import answer, check_room, ignored
from jaxllm.serving.answers import Chat, Completion
from jaxllm.serving.conversations import take_up
from jaxllm.serving.errors import ApiError, failed, misshapen, refused
from jaxllm.serving.generation import in_thread, now, unless_gone
from jaxllm.serving.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, ScoreBody, TokenizeRequest
from jaxllm.serving.response_request import ResponsesRequest
from jaxllm.serving.responses import Responses
from jaxllm.serving.server import Server

PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'"
)
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


@router.get("/")
async def page() -> Response:
    """A chat in the browser, which loads nothing from elsewhere."""
    return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": PAGE_POLICY})


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


@router.post("/start_profile")
async def start_profile(server: Served) -> dict[str, str]:
    """Write down what the devices do from now on."""
    await in_thread(server.start_profile)
    return {"status": "a profile is being written"}


@router.post("/stop_profile")
async def stop_profile(server: Served) -> dict[str, str]:
    """End the profile, for XProf or Perfetto."""
    return {"status": "written", "folder": await in_thread(server.stop_profile)}


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
    prompts = [body.queued(prompt) for prompt in parse_prompts(body.prompt)]
    alone = body.echo and body.max_tokens == 0  # the prompt, with nothing after it
    params = body.params(server.llm.generation_defaults, 1 if alone else body.max_tokens, body.logprobs)
    if body.echo and body.logprobs is not None and params.prompt_logprobs is None:
        params.prompt_logprobs = body.logprobs
    requests = await in_thread(lambda: server.llm.make_requests(prompts, [params] * len(prompts)))
    check_room(server, requests, body.max_tokens if "max_tokens" in body.model_fields_set else None)
    form = Completion(server.name_of(body), requests, body.logprobs, echo=body.echo, alone=alone)
    return await answer(server, body, request, form)


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(server: Served, body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    found = await take_up(server, body)
    form = Chat(server.name_of(body), found.requests, found.top, readers=found.readers)
    return await answer(server, body, request, form)


@router.post("/v1/responses", response_model=None)
async def responses(server: Served, body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation with items."""
    found = await take_up(server, body.as_chat())
    return await answer(server, body, request, Responses(server.name_of(body), found.requests, found.top, body, found.readers))


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
    headers = ignored(body)
    asked: Any = [(one.context, one.continuations) for one in body.requests]
    with server.admit(1):
        found = await unless_gone(request.receive, in_thread(lambda: server.llm.score(asked, truncate=body.truncate)))
    scores = [[_score(one) for one in scores] for scores in found or []]
    return JSONResponse({"object": "score", "created": now(), "scores": scores}, headers=headers)


def _score(one: Any) -> dict[str, Any]:
    return {"logprob": one.logprob, "token_logprobs": list(one.token_logprobs), "is_greedy": one.is_greedy}

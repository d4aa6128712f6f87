"""From the engine to the client: an answer whole or as a stream of events, which ends where the client goes away."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from jaxllm.execution.steps import MAX_STEPS
from jaxllm.generation.loop import STREAM_STEPS
from jaxllm.generation.request import Request as Generated
from jaxllm.serving.answers import Form
from jaxllm.serving.errors import ApiError, failed
from jaxllm.serving.generation import Delta, deltas, unless_gone
from jaxllm.serving.prompt_scores import is_for_scorer
from jaxllm.serving.protocol import Body, Sampled
from jaxllm.serving.server import Server

IGNORED_HEADER = "X-Ignored-Fields"
_LOG = logging.getLogger("jaxllm")


async def answer(server: Server, body: Sampled, request: Request, form: Form) -> Response:
    """Answer at once, or in a stream."""
    headers = ignored(body)
    form.return_token_ids, form.return_prompt_logprobs = bool(body.return_token_ids), body.prompt_logprobs is not None
    form.running_usage = body.wants_running_usage
    if body.stream and form.return_prompt_logprobs:
        raise ApiError(400, "prompt_logprobs do not come in a stream: leave one out", param="prompt_logprobs")
    if body.request_id is not None:
        form.id = form.prefix + body.request_id
    admission = ExitStack()
    admission.enter_context(server.admit(len(form.requests) * form.samples))
    if body.stream:
        return EventStream(_events(server, form, body.wants_usage), admission, headers)
    with admission:
        ended = await unless_gone(request.receive, _until_ended(server, form))
    return JSONResponse(form.whole() if ended else None, headers=headers)


def check_room(server: Server, requests: list[Generated], asked: int | None) -> None:
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


async def _until_ended(server: Server, form: Form) -> bool:
    if not form.return_prompt_logprobs and is_for_scorer(server.llm, form.requests):  # who asks for them is told their ranks
        watch = server.metrics.watch(form.requests)
        await server.prompt_scores.answer(form.requests)
        watch.see(list(form.everything()))
        return True
    async with aclosing(_news(server, form.requests, MAX_STEPS)) as news:
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
        for one in form.end(wants_usage):
            yield one
    except Exception as error:  # the status is sent already
        _LOG.exception("an answer ended with an error")
        for one in form.broken(failed(error)):
            yield one


def ignored(body: Body) -> dict[str, str]:
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

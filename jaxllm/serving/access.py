"""Who may come in, and with how much: keys and the size of bodies, before anything is read."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxllm.serving.errors import ApiError

OPEN = ("/", "/health", "/version", "/metrics")  # a page without a word of the model; what load balancers and Prometheus ask


class Access:
    """ASGI middleware that refuses requests without one of the keys, and bodies that are too large."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], max_body_bytes: int):
        self.app, self.keys, self.max_body_bytes = app, [key.encode() for key in api_keys], max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_key(scope["path"], headers)
            self._check_size(headers.get("content-length"))
        except ApiError as error:
            await JSONResponse(error.body, error.status_code, error.headers)(scope, receive, send)
            return
        await self.app(scope, self._bounded(receive), send)

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self.keys or path in OPEN:
            return
        given = headers.get("authorization", "").partition("Bearer ")[2].encode()
        matches = [hmac.compare_digest(given, key) for key in self.keys]  # all, in a time that says nothing of them
        if not any(matches):
            raise ApiError(
                401,
                "the key is missing or wrong: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_size(self, length: str | None) -> None:
        if length is not None and length.isdecimal() and int(length) > self.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_body_bytes:,} bytes: send less at once")

    def _bounded(self, receive: Receive) -> Receive:
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message: Any = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body_bytes:
                raise self._too_large()
            return message

        return bounded

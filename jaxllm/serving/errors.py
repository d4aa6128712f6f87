"""Errors as OpenAI's clients read them: `{"error": {message, type, param, code}}` and a status."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from starlette.exceptions import HTTPException

from jaxllm.generation.grammar import GrammarError
from jaxllm.requests.outputs import RequestError
from jaxllm.requests.sampling_params import SamplingParams

# What OpenAI calls errors of a status; its clients raise by the status alone.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


FIELDS = {"messages", "prompt", "tokens", *(field.name for field in fields(SamplingParams))}


class ApiError(HTTPException):
    """An answer that is an error. `param` is the field that it is about, `code` a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """What the client is sent."""
        kind = TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


def refused(error: RequestError) -> ApiError:
    """A request that the engine refuses, whose sentence begins with the field that it is about, if it is about one."""
    said = str(error)
    first = re.match(r"\w+", said)
    return ApiError(400, said, param=first[0] if first and first[0] in FIELDS else None)


def failed(error: Exception) -> ApiError:
    """What has ended an answer on its way: a form that cannot be followed is the request's, anything else is ours to mend."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, GrammarError):
        return ApiError(400, str(error), param="structured_outputs")
    return ApiError(500, "the server made a mistake; its log says more")


def misshapen(problems: Sequence[Any]) -> ApiError:
    """A body that is not what its model says, after pydantic's account of it: all of what is wrong with the first wrong field."""
    first = problems[0]
    if len(first["loc"]) < 2 or first["type"] == "json_invalid":  # about no field
        return ApiError(400, "the body is no JSON object: send one, as application/json", code="json_invalid")
    field = str(first["loc"][1])
    said = dict.fromkeys(one["msg"].removeprefix("Input ") for one in problems if str(one["loc"][1]) == field)
    return ApiError(422, f"{field}: it {', or '.join(said)}", param=field, code=str(first["type"]))

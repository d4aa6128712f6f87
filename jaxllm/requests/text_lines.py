"""Bytes of UTF-8 -> lines of text, each with where it stands, for sentences about it."""

from __future__ import annotations

from collections.abc import Iterator

from jaxllm.requests.outputs import RequestError


def lines_of(data: bytes, name: str) -> Iterator[tuple[str, str]]:
    """(where, line) of all lines that are not blank. Raises RequestError for one that is not UTF-8."""
    for number, line in enumerate(data.splitlines(), start=1):
        where = f"{name}, line {number}"
        text = decoded(line, where)
        if text.strip():
            yield where, text


def decoded(data: bytes, where: str) -> str:
    """The text, without a byte-order mark. Raises RequestError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{where} is not UTF-8 ({error.reason}, byte {error.start + 1}, {data[error.start]:#04x}): save it as UTF-8"
        ) from error

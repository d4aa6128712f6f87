"""Prompts of a command line: its arguments, standard input, a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxllm.requests.outputs import RequestError
from jaxllm.requests.text_lines import decoded, lines_of

STDIN = "-"
JSON_LINES = ".jsonl"


def prompts_of(arguments: Sequence[str], file: str | None) -> list[str]:
    """The prompts given as arguments, of which `-` is standard input, then those of the file. Raises RequestError.

    Without any, standard input is the prompt, unless it is a terminal.
    """
    if not arguments and file is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise RequestError("no prompt: give it as an argument, pipe it in, or name a file of prompts with --prompts")
        arguments = [STDIN]
    prompts = [_whole_input() if argument == STDIN else argument for argument in arguments]
    return prompts if file is None else [*prompts, *_lines_of(file)]


def _whole_input() -> str:
    text = decoded(sys.stdin.buffer.read(), "standard input")
    return text.removesuffix("\n").removesuffix("\r")


def _lines_of(file: str) -> Iterator[str]:
    """A prompt a line, blank ones left out; in a file of JSON lines each is the `prompt` of an object."""
    data = sys.stdin.buffer.read() if file == STDIN else Path(file).read_bytes()
    lines = list(lines_of(data, file))
    if not lines:
        raise RequestError(f"{file} has no prompt: write one a line")
    for where, line in lines:
        yield _prompt_in(line, where) if file.endswith(JSON_LINES) else line


def _prompt_in(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError):
        prompt = None
    if not isinstance(prompt, str):
        raise RequestError(f'{where} is no JSON object with a "prompt" that is a text')
    return prompt

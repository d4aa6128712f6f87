"""Answers to multiple-choice questions in a file of JSON lines: an interrupted run goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from jaxllm.requests.outputs import RequestError


@dataclass(frozen=True)
class Answer:
    """Log-probabilities of a question's choices, and how many tokens its longest choice has with the query."""

    index: int
    logprobs: list[float]
    tokens: int


class Kept(NamedTuple):
    """An answer as a file keeps it, for readers with the right choice and the characters of all."""

    answer: Answer
    gold: int
    lengths: list[int]

    def line(self) -> str:
        return json.dumps(vars(self.answer) | {"gold": self.gold, "lengths": self.lengths}) + "\n"


class Results:
    """Answers in a file of JSON lines, the first of which identifies the run; each is on the disk before the next is written.

    Raises RequestError for a file that holds another run, or anything else.
    """

    def __init__(self, path: Path | None, run: dict[str, Any]):
        self.path = path
        self.answers: list[Answer] = []
        self._file: TextIO | None = None
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            self._resume(path, run)
        else:
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115  (closed by close)
            self._write(json.dumps(run) + "\n")

    def _resume(self, path: Path, run: dict[str, Any]) -> None:
        first, kept, whole = read_results(path)
        self.answers = [one.answer for one in kept]
        if first != run:
            differing = sorted(key for key in run | first if key not in first or key not in run or first[key] != run[key])
            raise RequestError(f"{path} holds another run (other {', '.join(differing)}): name another file, or remove it")
        self._file = open(path, "r+", encoding="utf-8")  # noqa: SIM115
        self._file.truncate(whole)
        self._file.seek(whole)

    def add(self, kept: Kept) -> None:
        if self._file is not None:
            self._write(kept.line())
        self.answers.append(kept.answer)

    def _write(self, line: str) -> None:
        assert self._file is not None
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            self.close()
            raise RequestError(
                f"{self.path} cannot be written ({error.strerror}): free space and run again; "
                f"{len(self.answers)} answers are kept"
            ) from error

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # `_write` tells of a full disk
                self._file.close()
            self._file = None


def read_results(path: Path) -> tuple[dict[str, Any], list[Kept], int]:
    """What a file of results says of its run, its answers, and the bytes of its whole lines. Raises RequestError."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]  # a last line without its end was being written when the run stopped
    try:
        first, *lines = [json.loads(line) for line in whole.splitlines()]
        return dict(first), [_kept(line) for line in lines], len(whole)
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{path} does not hold results: name another file, or remove it") from error


def _kept(line: dict[str, Any]) -> Kept:
    answer = Answer(line["index"], line["logprobs"], line["tokens"])
    return Kept(answer, line["gold"], line.get("lengths", []))

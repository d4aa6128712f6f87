"""Lines of a batch file over a crew: those whose texts begin alike go to one worker, whose cache has what they share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from jaxllm.integrations.ray.crew import Crew, Failed
from jaxllm.scoring.partition import groups_for
from jaxllm.serving.batch_file import AGAIN, Line

ANSWER = 256  # bytes of an answer, beside those of the request, where work is divided


def answer_lines(crew: Crew, lines: Sequence[Line]) -> Iterator[tuple[Line, int, Any]]:
    """(line, status, body) as tasks end. A line that workers died over is answered with a status that is asked for again."""
    groups = groups_for([said(line.body) for line in lines], crew.size, extra=ANSWER)
    tasks = [[lines[i] for i in group.members] for group in groups]
    for task, result in crew.run(tasks):
        if isinstance(result, Failed):
            error = {"message": result.reason, "type": "server_error", "param": None, "code": None}
            result = [(line, AGAIN, {"error": error}) for line in tasks[task]]
        yield from result


def said(body: dict[str, Any]) -> list[int]:
    """What the model reads, in its order: requests share as many of its bytes as of their tokens, about."""
    text = next((body[name] for name in ("prompt", "text") if isinstance(body.get(name), str)), None)
    if text is None:
        names = ("tools", "instructions", "messages", "input", "prompt", "requests")
        text = json.dumps([body[name] for name in names if name in body])
    return [*text.encode()]

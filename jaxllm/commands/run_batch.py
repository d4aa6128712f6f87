"""`jaxllm run-batch MODEL -i requests.jsonl -o answers.jsonl`: a file of requests to OpenAI's API, without a server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.commands.model_options import add_model, add_place, add_tokenizer, let_the_first_go_on, load
from jaxllm.commands.ray_options import add_ray, check_ray, crew_on_ray, model_of
from jaxllm.commands.serve import needs_serving

if TYPE_CHECKING:
    from jaxllm.serving.batch_file import Line

    Answered = Callable[[Line, int, Any], None]


def add(commands: Any) -> None:
    """Add the command to the command line's subparsers."""
    batch = commands.add_parser(
        "run-batch",
        help="answer a file of requests to OpenAI's API",
        description="Answer a file of requests to OpenAI's API, one a line, as its Batch API does. An interrupted run goes on.",
    )
    add_model(batch)
    batch.add_argument("-i", "--input-file", type=Path, required=True, metavar="FILE", help="a request a line")
    batch.add_argument("-o", "--output-file", type=Path, required=True, metavar="FILE", help="an answer a line, as they come")
    add_tokenizer(batch)
    add_place(batch)
    batch.add_argument("--max-num-seqs", type=int, help="most sequences at once")
    batch.add_argument("--served-model-name", action="append", help="what requests call the model (default: any name will do)")
    add_ray(batch)
    batch.set_defaults(run=run_run_batch)


@needs_serving
def run_run_batch(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from jaxllm.serving.batch_file import Answers, read_batch

    if args.ray is not None:
        check_ray()
    let_the_first_go_on(args)
    lines = read_batch(args.input_file)
    answers = Answers(args.output_file, lines)
    names = args.served_model_name or list(dict.fromkeys([args.model, *(str(line.body.get("model")) for line in lines)]))
    left = [line for line in lines if line.id not in answers.done]
    refused = 0
    with (
        closing(answers),
        tqdm(total=len(lines), initial=len(answers.done), unit="request", disable=not sys.stderr.isatty()) as bar,
    ):

        def answered(line: Line, status: int, body: Any) -> None:
            nonlocal refused
            answers.add(line, status, body)
            refused += status >= 400
            bar.update()

        if left:
            (answer_here if args.ray is None else answer_on_ray)(args, names, left, answered)
    print(f"{len(lines)} requests, {len(answers.done)} of them answered before, {refused} refused: {args.output_file}")
    return 0


def answer_here(args: argparse.Namespace, names: list[str], lines: list[Line], answered: Answered) -> None:
    """Answer lines by a model of this process."""
    import asyncio

    from jaxllm.serving.app import make_app
    from jaxllm.serving.batch_file import run_batch
    from jaxllm.serving.server import Server, Settings

    server = Server(Settings(names, max_waiting=1 << 30), lambda: load(args))
    server.load()
    if server.failure is not None:
        raise server.failure
    asyncio.run(run_batch(make_app(server), lines, 2 * server.llm.plan.max_num_seqs, answered))


def answer_on_ray(args: argparse.Namespace, names: list[str], lines: list[Line], answered: Answered) -> None:
    """Answer lines by models on a cluster."""
    from jaxllm.integrations.ray.batch_lines import answer_lines
    from jaxllm.integrations.ray.workers import BatchWorker

    with crew_on_ray(args, BatchWorker, model_of(args), names) as crew:
        for answer in answer_lines(crew, lines):
            answered(*answer)

"""`jaxllm run-batch MODEL -i requests.jsonl -o answers.jsonl`: a file of requests to OpenAI's API, without a server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from jaxllm.commands.model_options import add_model, add_place, add_tokenizer, load
from jaxllm.commands.serve import needs_serving


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
    batch.set_defaults(run=run_run_batch)


@needs_serving
def run_run_batch(args: argparse.Namespace) -> int:
    import asyncio

    from tqdm import tqdm

    from jaxllm.serving.app import make_app
    from jaxllm.serving.batch_file import Answers, read_batch, run_batch
    from jaxllm.serving.server import Server, Settings

    lines = read_batch(args.input_file)
    answers = Answers(args.output_file, lines)
    names = args.served_model_name or list(dict.fromkeys([args.model, *(str(line.body.get("model")) for line in lines)]))
    server = Server(Settings(names, max_waiting=1 << 30), lambda: load(args))
    refused = 0
    try:
        if len(answers.done) < len(lines):
            server.load()
            if server.failure is not None:
                raise server.failure
            at_once = 2 * server.llm.plan.max_num_seqs
            with tqdm(total=len(lines), initial=len(answers.done), unit="request", disable=not sys.stderr.isatty()) as bar:

                def answered(status: int) -> None:
                    nonlocal refused
                    refused += status >= 400
                    bar.update()

                asyncio.run(run_batch(make_app(server), lines, answers, at_once, answered))
    finally:
        answers.close()
    print(f"{len(lines)} requests, {len(answers.done)} of them answered before, {refused} refused: {args.output_file}")
    return 0

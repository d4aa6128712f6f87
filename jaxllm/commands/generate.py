"""`jaxllm generate MODEL PROMPT`: complete prompts."""

from __future__ import annotations

import argparse
import json
from typing import Any

from jaxllm.commands.model_options import add_model, add_place, add_sampling, add_tokenizer, load, sampling_params
from jaxllm.commands.prompt_sources import prompts_of
from jaxllm.requests.outputs import CompletionOutput, RequestOutput


def add(commands: Any) -> None:
    """Add the command to the command line's subparsers."""
    generate = commands.add_parser("generate", help="complete prompts", description="Complete prompts.")
    add_model(generate)
    generate.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="`-`, or none where standard input is no terminal: all of standard input"
    )
    generate.add_argument(
        "--prompts",
        dest="file",
        metavar="FILE",
        help='a prompt a line, blank lines left out; of a .jsonl file the "prompt" of each line; `-`: of standard input',
    )
    generate.add_argument("--json", action="store_true", help="print a line of JSON for each answer")
    add_tokenizer(generate)
    add_place(generate)
    add_sampling(generate, max_tokens=128)
    generate.add_argument("-n", type=int, default=1, help="answers to each prompt; more than one need a --temperature")
    generate.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    params = sampling_params(args, args.n)
    prompts = prompts_of(args.prompts, args.file)
    llm = load(args)
    with args.terminal.watching():
        results = llm.generate(prompts, params, use_tqdm=False)
    for result in results:
        for sample in result.outputs:
            print(as_json(result, sample) if args.json else f"{result.prompt}{sample.text}")
    return 0


def as_json(result: RequestOutput, sample: CompletionOutput) -> str:
    """One answer as a line, in ASCII: it is whole in every encoding."""
    found = {"prompt": result.prompt, "index": sample.index, "text": sample.text, "token_ids": sample.token_ids}
    return json.dumps(found | {"finish_reason": sample.finish_reason, "stop_reason": sample.stop_reason})

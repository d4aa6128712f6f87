"""`jaxllm score MODEL FILE`: accuracy on a file of multiple-choice questions; `jaxllm merge` of one that ran in shards."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jaxllm.commands.model_options import add_model, add_place, add_tokenizer
from jaxllm.commands.ray_options import add_ray, check_ray


def add(commands: Any) -> None:
    """Add the command to the command line's subparsers."""
    score = commands.add_parser("score", help="accuracy on multiple choice", description="Accuracy on multiple-choice questions.")
    add_model(score)
    score.add_argument(
        "file", help='JSON lines of "query", "choices" and "gold", or "hellaswag" for its validation set from the hub'
    )
    score.add_argument(
        "--delimiter",
        metavar="TEXT",
        help="put before every choice, as lm-eval's target_delimiter; taken as it is, so a new line is $'\\n' (default: a space, "
        "but none where the query is empty or ends in white space or the choice begins with it; for hellaswag a space)",
    )
    score.add_argument("--output", type=Path, help="keep answers in this file of JSON lines; an interrupted run goes on from it")
    score.add_argument(
        "--truncate", action="store_true", help="cut what exceeds the model's context from the left, as lm-eval does"
    )
    score.add_argument("--plot", type=Path, metavar="PNG", help="draw the phases and the accuracy by length")
    score.add_argument(
        "--shard", metavar="I/N", help="answer a share of the questions alone, I from 0 to N - 1; `jaxllm merge` joins the files"
    )
    add_tokenizer(score)
    add_place(score)
    add_ray(score)
    score.set_defaults(run=run_score)
    merge = commands.add_parser(
        "merge", help="join the files of a sharded score", description="Join the files of `jaxllm score --shard` into one run's."
    )
    merge.add_argument("files", type=Path, nargs="+", metavar="FILE", help="of each shard")
    merge.add_argument("--output", type=Path, required=True, help="the file of results, as one run would have written it")
    merge.set_defaults(run=run_merge)


def run_score(args: argparse.Namespace) -> int:
    if args.ray is None:
        from jaxllm.commands.score_run import run
    else:
        check_ray()
        from jaxllm.commands.score_ray import run
    run(args)
    return 0


def run_merge(args: argparse.Namespace) -> int:
    from jaxllm.evaluation.shards import merge

    print(merge(args.files, args.output))
    return 0

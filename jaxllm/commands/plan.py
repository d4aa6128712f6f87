"""`jaxllm plan MODEL --on 4xH100`: a model's costs on devices that need not be there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jaxllm.commands.model_options import MODEL_HELP, add_config
from jaxllm.planning.presets import PRESETS


def add(commands: Any) -> None:
    """Add the command to the command line's subparsers."""
    plan = commands.add_parser(
        "plan",
        help="what a model would cost on some devices",
        description="What each layout of a model would cost on some devices, from its config alone. They need not be there.",
    )
    plan.add_argument("model", help=f"{MODEL_HELP}, or a shape: {', '.join(sorted(PRESETS))}")
    add_config(plan)
    plan.add_argument(
        "--on",
        default="here",
        metavar="4xH100",
        help="a count and a device, hosts of so many (2x8xH100), or `here` (default): those there are, measured once",
    )
    plan.add_argument("--virtual-devices", type=int, metavar="N", help="with --on here: split the CPU into N devices")
    plan.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, else the checkpoint's"
    )
    plan.add_argument("--json", action="store_true", help="print one JSON document")
    plan.add_argument("--plot", type=Path, metavar="PNG", help="draw memory and seconds a token by layout")
    plan.add_argument("--compile", action="store_true", help="compile the steps for these devices too, and read the programs")
    plan.add_argument("--layout", action="append", help="with --compile: of this layout (default: what auto takes)")
    plan.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> int:
    from jaxllm.commands.plan_report import run

    return run(args)

"""`jaxllm warmup MODEL`: compile ahead the programs that generating will need."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from jaxllm.commands.model_options import add_model, add_place, read_config_of


def add(commands: Any) -> None:
    """Add the command to the command line's subparsers."""
    warmup = commands.add_parser(
        "warmup",
        help="compile ahead what generating will need",
        description="Compile every program that generating may need, several at a time, and keep them on the disk. Of the model "
        "only the config is read. The programs depend on the options below: give those of the runs to come.",
    )
    add_model(warmup)
    add_place(warmup)
    warmup.add_argument("--max-num-seqs", type=int, help="most sequences at once")
    warmup.add_argument("--batch-invariant", action="store_true", help="for LLM(batch_invariant=True)")
    warmup.add_argument("--greedy", action="store_true", help="leave out the programs that sample")
    warmup.set_defaults(run=run_warmup)


def run_warmup(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from checkpoints.hub import compiled_dir
    from jaxllm.execution.compile_cache import folder_in_use, use_compilation_cache
    from jaxllm.execution.compile_counter import COUNTER
    from jaxllm.execution.step_shapes import StepShapes
    from jaxllm.execution.steps import Steps
    from jaxllm.execution.warmup import compile_all, wanted
    from jaxllm.planning.plan import Run, default_dtype
    from jaxllm.planning.remedies import plan_or_refuse
    from sharding.mesh import pick_devices, virtual_cpu_devices

    if args.virtual_devices is not None:
        virtual_cpu_devices(args.virtual_devices)
    use_compilation_cache(compiled_dir())
    config, devices = read_config_of(args), pick_devices(args.devices)
    dtype = args.dtype or default_dtype(config, devices)
    plan = plan_or_refuse(Run(config, devices, dtype, args.layout, args.max_model_len, args.max_num_seqs))
    steps = Steps(config, plan.layout, plan.dtype)
    started = time.perf_counter()
    rows, how = -(-plan.max_num_seqs // plan.layout.data), {"attention": steps.attention, "batch_invariant": args.batch_invariant}
    shapes = StepShapes.of(plan.layout.platform, plan.max_model_len, rows, **how)
    programs = wanted(steps, plan.pool, shapes, random=not args.greedy)
    with tqdm(total=len(programs), unit="program", disable=not sys.stderr.isatty(), leave=False) as bar:

        def done(program: Any) -> None:
            bar.set_description(program.name)
            bar.update()

        compile_all(programs, done)
    print(
        f"{len(programs)} programs for layout {plan.layout.name}, up to {plan.max_num_seqs} sequences of {plan.max_model_len} "
        f"tokens: {COUNTER.misses} compiled in {time.perf_counter() - started:.1f} s, the rest were there; in "
        f"{folder_in_use(compiled_dir())}"
    )
    return 0

"""`jaxllm demo`: a small model on four devices, with its times."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from jaxllm.commands.model_options import add_place, add_sampling, load, sampling_params

if TYPE_CHECKING:
    from jaxllm.llm import LLM

MODEL = "smollm2-135m"
DEVICES = 4
PROMPT = "Why is the sky blue? Answer in three sentences."
MAX_TOKENS = 256  # the answer has 112


def add(commands: Any) -> None:
    """Add the command to the command line's subparsers."""
    demo = commands.add_parser("demo", help="SmolLM2-135M on four devices", description="SmolLM2-135M on four devices.")
    add_place(demo)
    add_sampling(demo, MAX_TOKENS)
    demo.set_defaults(run=run_demo, model=MODEL)


def run_demo(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    # Virtual devices are the CPU's: where there are GPUs, jax takes those all the same.
    args.virtual_devices = args.virtual_devices or DEVICES
    params = sampling_params(args)
    llm = load(args)
    prompt = llm.chat_prompt([{"role": "user", "content": PROMPT}])
    print(f"> {PROMPT}", flush=True)
    first = 0.0
    for piece in args.terminal.until_first(llm.stream(prompt, params)):
        first = first or time.perf_counter() - started
        print(piece, end="", flush=True)
    print("\n")
    compiling = llm.compile_seconds
    with args.terminal.watching():
        args.terminal.say("once more with everything compiled, for the speed")
        again = time.perf_counter()
        tokens = len(llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids)
        rate = tokens / (time.perf_counter() - again)
    print(describe(llm))
    print(f"load {llm.load_seconds:.1f} s, compile {compiling:.1f} s ({llm.compiled} programs compiled, the rest were cached)")
    print(f"first token {first:.1f} s after the start, then {rate:.0f} tokens/s")
    return 0


def describe(llm: LLM) -> str:
    plan = llm.plan
    mesh, mib = plan.layout.mesh, 1 << 20
    kind = mesh.devices.flat[0].device_kind
    return (
        f"layout {plan.layout.name}: {plan.layout.data} x {plan.layout.model} (data x model) over {mesh.size} {kind} devices, "
        f"{plan.dtype}\n{plan.weight_bytes / mib:.0f} MiB of weights a device, "
        f"context {plan.max_model_len} tokens, up to {plan.max_num_seqs} sequences"
    )

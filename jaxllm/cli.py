"""`jaxllm generate | chat | score | convert | inspect | verify | plan | cache | demo`: the library from a shell."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from jaxllm import cache_command, checkpoint_commands, families_command, plan_command, score_command, warmup_command
from jaxllm.llm import LLM, Progress
from jaxllm.sampling_params import SamplingParams
from sharding.layout import NAMES
from sharding.mesh import virtual_cpu_devices

DEMO_MODEL = "smollm2-135m"
DEMO_DEVICES = 4
MEMORY_REMEDY = "try a smaller --max-model-len, --dtype bfloat16 or more devices"
DEMO_PROMPT = "Why is the sky blue? Answer in three sentences."


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for an error (one line on stderr), 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    # transformers would tell everybody that torch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:  # every error of ours is a ValueError with a sentence for the user
        print(f"jaxllm: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"jaxllm: a device ran out of memory ({str(error).splitlines()[0]}): {MEMORY_REMEDY}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxllm", description="Sharded LLM inference in JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="complete prompts", description="Complete prompts.")
    generate.add_argument("model", help="folder, .gguf file, hub id, or smollm2-135m")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    chat = commands.add_parser("chat", help="talk with a model", description="Talk with a model; an empty line ends.")
    chat.add_argument("model", help="folder, .gguf file, hub id, or smollm2-135m")
    demo = commands.add_parser("demo", help="SmolLM2-135M on four devices", description="SmolLM2-135M on four devices.")
    for command, run, tokens in ((generate, _generate, 128), (chat, _chat, 512), (demo, _demo, 96)):
        _add_place(command)
        _add_sampling(command, tokens)
        command.set_defaults(run=run)
    demo.set_defaults(model=DEMO_MODEL)
    score = commands.add_parser("score", help="accuracy on multiple choice", description="Accuracy on multiple-choice questions.")
    score.add_argument("model", help="folder, .gguf file, hub id, or smollm2-135m")
    score_command.add_options(score)
    _add_place(score)
    score.set_defaults(run=lambda args: score_command.run(args, _load))
    checkpoint_commands.add(commands)
    plan_command.add(commands)
    cache_command.add(commands)
    warmup_command.add(commands, _add_place)
    families_command.add(commands)
    return parser


def _add_place(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where it runs")
    where.add_argument("--layout", default="auto", help=f"auto, {NAMES}")
    where.add_argument("--devices", type=int, help="how many devices (default: all)")
    where.add_argument("--virtual-devices", type=int, metavar="N", help="split the CPU into N devices")
    where.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, else the checkpoint's)")
    where.add_argument("--max-model-len", type=int, help="longest prompt and answer together, in tokens")


def _add_sampling(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    how = parser.add_argument_group("how tokens are chosen")
    how.add_argument("--max-tokens", type=int, default=max_tokens)
    how.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    how.add_argument("--top-p", type=float, default=1.0)
    how.add_argument("--top-k", type=int, default=0)
    how.add_argument("--seed", type=int)
    how.add_argument("--stop", action="append", default=[], help="a string that ends the answer; may be given again")


def _load(args: argparse.Namespace, **options: Any) -> LLM:
    if args.virtual_devices is not None:
        virtual_cpu_devices(args.virtual_devices)
    with _progress() as progress:
        return LLM(
            args.model,
            layout=args.layout,
            devices=args.devices,
            dtype=args.dtype,
            max_model_len=args.max_model_len,
            progress=progress,
            **options,
        )


def _params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        stop=tuple(args.stop),
    )


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """A line for what is slow and a bar for loading; nothing when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield Progress()
        return
    bar = tqdm(desc="loading", unit="param", unit_scale=True, file=sys.stderr, leave=False, disable=None)

    def loaded(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    def say(line: str) -> None:
        tqdm.write(f"{line} ...", file=sys.stderr)

    try:
        yield Progress(say, loaded)
    finally:
        bar.close()


def _generate(args: argparse.Namespace) -> int:
    params = _params(args)
    for result in _load(args).generate(args.prompts, params):
        print(result.prompt, result.outputs[0].text, sep="")
    return 0


def _chat(args: argparse.Namespace) -> int:
    params = _params(args)
    llm = _load(args)
    messages: list[dict[str, Any]] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if not line.strip():
            return 0
        messages.append({"role": "user", "content": line})
        answer = ""
        for piece in llm.stream(llm.chat_prompt(messages), params):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})


def _demo(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    # Virtual devices are the CPU's: where there are GPUs, jax takes those all the same.
    args.virtual_devices = args.virtual_devices or DEMO_DEVICES
    params = _params(args)
    llm = _load(args)
    prompt = llm.chat_prompt([{"role": "user", "content": DEMO_PROMPT}])
    print(f"> {DEMO_PROMPT}")
    ready = time.perf_counter()
    for piece in llm.stream(prompt, params):
        if ready > 0:
            first, ready = time.perf_counter() - started, 0.0
        print(piece, end="", flush=True)
    compiling = llm.compile_seconds
    # Once more, everything compiled, for the speed.
    again = time.perf_counter()
    tokens = len(llm.generate([prompt], params)[0].outputs[0].token_ids)
    rate = tokens / (time.perf_counter() - again)
    print(f"\n\n{_describe(llm)}")
    print(f"load {llm.load_seconds:.1f} s, compile {compiling:.1f} s ({llm.compiled} programs compiled, the rest were cached)")
    print(f"first token {first:.1f} s after the start, then {rate:.0f} tokens/s")
    return 0


def _describe(llm: LLM) -> str:
    plan = llm.plan
    mesh, mib = plan.layout.mesh, 1 << 20
    kind = mesh.devices.flat[0].device_kind
    return (
        f"layout {plan.layout.name}: {plan.layout.data} x {plan.layout.model} (data x model) over {mesh.size} {kind} devices, "
        f"{plan.dtype}\n{plan.weight_bytes / mib:.0f} MiB of weights a device, "
        f"context {plan.max_model_len} tokens, up to {plan.max_num_seqs} sequences"
    )


if __name__ == "__main__":
    sys.exit(main())

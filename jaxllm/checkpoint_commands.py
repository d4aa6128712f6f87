"""`jaxllm inspect` and `jaxllm verify`: what a checkpoint holds, and whether two hold the same."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from tqdm import tqdm

from checkpoints.checkpoint import Checkpoint, open_checkpoint
from checkpoints.hub import resolve
from checkpoints.inspect import padding, summary
from checkpoints.verify import Compared, compare, differing_config

SHOWN = 20  # differing parameters in a table; --json has all
GIB = 1 << 30


def add(commands: Any) -> None:
    """Add the commands to the command line's subparsers."""
    inspect = commands.add_parser("inspect", help="what a checkpoint holds", description="What a checkpoint holds.")
    inspect.add_argument("source", metavar="SRC", help="folder, .gguf file, hub id, or smollm2-135m")
    inspect.add_argument("--devices", type=int, default=4, help="say what would be padded for so many (default 4)")
    inspect.set_defaults(run=run_inspect)
    verify = commands.add_parser("verify", help="compare two checkpoints", description="Compare two checkpoints of any formats.")
    verify.add_argument("a", metavar="A", help="folder, .gguf file, hub id, or smollm2-135m")
    verify.add_argument("b", metavar="B")
    verify.set_defaults(run=run_verify)
    for command in (inspect, verify):
        command.add_argument("--json", action="store_true", help="print one JSON document")


def run_inspect(args: argparse.Namespace) -> int:
    if args.devices < 1:
        raise ValueError(f"--devices {args.devices}: ask for at least 1")
    checkpoint = _open(args.source)
    found = summary(checkpoint)
    padded = padding(checkpoint, args.devices)
    if args.json:
        print(json.dumps({**found, "devices": args.devices, "padded": padded}))
        return 0
    c = checkpoint.config
    print(f"{found['where']}: {found['parameters']:,} parameters in {found['tensors']} tensors, {found['bytes'] / GIB:.2f} GiB")
    print(
        f"  {c.num_layers} layers, hidden {c.hidden_size}, {c.num_heads} query and {c.num_kv_heads} KV heads of {c.head_dim}, "
        f"ffn {c.intermediate_size} ({c.activation}), vocabulary {c.vocab_size}{', tied head' if c.tied_head else ''}, "
        f"{c.max_position} positions, rope {c.rope.kind}"
    )
    print("  numbers: " + ", ".join(f"{count:,} {dtype}" for dtype, count in found["numbers_by_dtype"].items()))
    changes = ", ".join(f"{name} {size} -> {more}" for name, (size, more) in padded.items())
    print(f"  over {args.devices} devices: {f'padded {changes}' if changes else 'nothing is padded'}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    a, b = _open(args.a), _open(args.b)
    architecture = differing_config(a, b)
    with tqdm(compare(a, b), unit="parameter", disable=not sys.stderr.isatty(), leave=False) as bar:
        compared = list(bar)
    same = not architecture and all(one.equal for one in compared)
    if args.json:
        print(json.dumps({"same": same, "architecture": architecture, "parameters": [one.as_json() for one in compared]}))
    else:
        for line in architecture:
            print(f"architecture: {line}")
        print(table(compared))
    return 0 if same else 1


def table(compared: list[Compared]) -> str:
    """Those that differ, and how many do not."""
    differing = [one for one in compared if not one.equal]
    lines = [f"  {one.parameter:<40} {'/'.join(d or '-' for d in one.dtypes):<12} {one.verdict}" for one in differing[:SHOWN]]
    if len(differing) > SHOWN:
        lines.append(f"  and {len(differing) - SHOWN} more: --json has all")
    equal = [one for one in compared if one.equal]
    bits = sum(one.dtypes[0] == one.dtypes[1] for one in equal)
    said = f"{bits} of {len(compared)} parameters are equal bit for bit"
    if len(equal) > bits:
        said += f", {len(equal) - bits} are the same numbers in another dtype"
    return "\n".join([*lines, said])


def _open(source: str) -> Checkpoint:
    return open_checkpoint(resolve(source))

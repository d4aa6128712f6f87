"""`jaxllm convert`, `inspect` and `verify`: a checkpoint in another form, the contents of one, the differences of two."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checkpoints.checkpoint import Checkpoint
    from checkpoints.verify import Compared
    from jaxllm.config import ModelConfig

FORMATS = ("safetensors", "orbax")
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
    conversion = commands.add_parser(
        "convert",
        help="a checkpoint to a folder of safetensors or Orbax",
        description="Write a checkpoint as a folder that transformers loads, or as one of Orbax that any mesh restores.",
    )
    conversion.add_argument("source", metavar="SRC", help="folder, .gguf file, hub id, or smollm2-135m")
    conversion.add_argument("target", metavar="DST", type=Path)
    conversion.add_argument("--to", choices=FORMATS, default=FORMATS[0], help="format of DST (default: safetensors)")
    conversion.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="round to it (default: as stored)")
    conversion.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="of a file, such as 5GB (default)"
    )
    conversion.add_argument("--force", action="store_true", help="overwrite DST")
    conversion.add_argument("--no-verify", action="store_true", help="do not compare what was written with the source")
    conversion.add_argument("--dry-run", action="store_true", help="say what would be read and written")
    conversion.set_defaults(run=run_convert)
    for command in (inspect, verify):
        command.add_argument("--json", action="store_true", help="print one JSON document")


def run_inspect(args: argparse.Namespace) -> int:
    from checkpoints.inspect import padding, summary
    from jaxllm.decoder.mechanisms import mechanisms

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
        f"ffn {c.intermediate_size} ({c.activation}), vocabulary {c.vocab_size}{_head(c)}, "
        f"{c.max_position} positions"
    )
    print(f"  {checkpoint.family}: {', '.join(mechanisms(c))}")
    print("  numbers: " + ", ".join(f"{count:,} {dtype}" for dtype, count in found["numbers_by_dtype"].items()))
    changes = ", ".join(f"{name} {size} -> {more}" for name, (size, more) in padded.items())
    print(f"  over {args.devices} devices: {f'padded {changes}' if changes else 'nothing is padded'}")
    return 0


def run_convert(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from checkpoints.convert import PEAK_BYTES, convert, prepare

    source = _open(args.source)
    job = prepare(source, args.target, to=args.to, dtype=args.dtype, max_shard_bytes=args.max_shard_size)
    read = sum(info.nbytes for info in source.source.tensors.values())
    tensors = sum(map(len, job.groups.values()))
    count = len(job.groups)
    where = f"{count} {'file' if count == 1 else 'files'}" if args.to == "safetensors" else "an Orbax checkpoint"
    print(f"{source.path} -> {job.target}: {read:,} bytes -> {job.nbytes:,} bytes, {tensors} tensors in {where}")
    if args.dry_run:
        print(f"peak memory: under {PEAK_BYTES >> 20} MiB beside Python's own; nothing was written")
        return 0
    with tqdm(total=job.nbytes, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.update(done - bar.n)

        convert(job, force=args.force, check=not args.no_verify, progress=advance)
    rounded = f", rounded to {args.dtype}" if args.dtype else ""
    print("written" if args.no_verify else f"written, and equal to the source bit for bit{rounded}")
    return 0


def _head(config: ModelConfig) -> str:
    if config.labels is not None:
        return f", a classifier of {config.labels} labels" if config.labels else ", no head"
    return ", tied head" if config.tied_head else ""


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([kMGT]?)B?", text)
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: say 5GB, 500MB or a number of bytes")
    return int(match[1]) * 1000 ** " kMGT".index(match[2] or " ")


def run_verify(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from checkpoints.verify import compare, differing_config

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
    """A line for each parameter that differs, and the number of those that do not."""
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
    import jax

    from checkpoints.checkpoint import open_checkpoint
    from checkpoints.hub import resolve

    # Orbax starts jax, which would take most of a GPU's memory, from whoever is using it, for nothing.
    jax.config.update("jax_platforms", "cpu")
    return open_checkpoint(resolve(source))

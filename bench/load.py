"""Seconds to convert and load checkpoints, beside `cp` of the same bytes and transformers' from_pretrained.

    python -m bench.load --config llama-7b --layers 6 --work /some/disk
    python -m bench.load --model FOLDER --repeats 3

Each measurement is a process of its own, alternating, with the source in the page cache, and right after another has used and
freed twice the memory that it will need. (Of a virtual machine the host may take freed memory back, and finding it again
can take longer than all else: `--pause 4` lets that happen before each.) Targets of `cp` and of conversions are new files;
flushing them to the disk is timed apart. "call" is the work alone, "start" all since the process was started,
imports included. Prints a table of medians; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bench.machine import describe, peak_bytes, process_seconds, report
from bench.peers import from_pretrained, torch_and_transformers
from checkpoints.checkpoint import CONFIG, open_checkpoint
from checkpoints.convert import convert, prepare
from checkpoints.families import llama
from checkpoints.load import load, names_of_parameters
from checkpoints.names import axis_sizes
from checkpoints.safetensors_writer import SafetensorsFiles
from checkpoints.target import Entry, Piece
from jaxllm.config import ModelConfig
from jaxllm.planning.presets import PRESETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder of safetensors")
    parser.add_argument(
        "--config",
        choices=[name for name in PRESETS if "llama" in name or name == "smollm2-135m"],
        default="llama-7b",
        help="else: random weights of this shape",
    )
    parser.add_argument("--layers", type=int, help="so many layers of it")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="to load in")
    parser.add_argument("--work", type=Path, default=Path("bench-load"), help="a folder for copies, removed at the end")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each measurement")
    parser.add_argument("--only", nargs="+", choices=sorted(ROLES), default=list(ROLES))
    parser.add_argument("--save", type=Path, help="keep the result in this JSON file")
    parser.add_argument("--role", choices=sorted(ROLES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        print(json.dumps(ROLES[args.role](args)))
        return
    args.work.mkdir(parents=True)  # it is removed at the end, so it must be new
    try:
        result = measure(args)
    finally:
        shutil.rmtree(args.work)
    print_table(result)
    report(result, args.save)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    source = args.model or write_random(args.work / "source", args.config, args.layers)
    orbax = args.work / "orbax"
    if "load orbax" in args.only:
        convert(prepare(open_checkpoint(source), orbax, to="orbax"))
    runs: dict[str, list[dict[str, float]]] = {role: [] for role in args.only}
    for _ in range(args.repeats):
        for role in args.only:
            at = orbax if role == "load orbax" else source
            runs[role].append(run(role, at, args))
            print(role, runs[role][-1], file=sys.stderr)
    rows = {role: {key: statistics.median(r[key] for r in of) for key in of[0]} for role, of in runs.items()}
    return {"bench": "load", "model": str(args.model or args.config), "layers": args.layers, "dtype": args.dtype,
            "bytes": nbytes(source), "machine": describe(), "repeats": args.repeats, "pause": args.pause, "rows": rows,
            "runs": runs}  # fmt: skip


def run(role: str, source: Path, args: argparse.Namespace) -> dict[str, float]:
    """One measurement in a new process."""
    target = args.work / "target"
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    for file in source.rglob("*"):
        if file.is_file():
            with open(file, "rb", buffering=0) as opened:
                while opened.read(1 << 24):
                    pass
    command = [sys.executable, "-m", "bench.load", "--role", role, "--model", source, "--work", args.work, "--dtype", args.dtype]
    command += ["--pause", args.pause]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    start = time.perf_counter()
    os.sync()
    return result | ({"flush": time.perf_counter() - start} if target.exists() else {})


def nbytes(source: Path) -> int:
    """Bytes of a checkpoint's files, whatever their format."""
    return sum(file.stat().st_size for file in source.rglob("*") if file.is_file())


def use_memory(size: int) -> None:
    """Use memory, no more than is there, in a process of its own, which frees it as it ends."""
    size = min(size, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4)
    subprocess.run([sys.executable, "-c", f"import numpy; numpy.ones({size}, numpy.uint8)"], check=True)


def timed(args: argparse.Namespace, work: Callable[[], Any]) -> dict[str, float]:
    """The report of one process: seconds of the call and from the process's start, and its peak memory."""
    before = process_seconds()
    use_memory(2 * nbytes(args.model) * (2 if args.dtype == "float32" else 1))
    time.sleep(args.pause)
    idle, before = peak_bytes(), process_seconds() - before
    start = time.perf_counter()
    kept = work()
    seconds = {"call": time.perf_counter() - start, "start": process_seconds() - before}
    del kept
    return seconds | {"peak_bytes": peak_bytes(), "peak_bytes_beyond_start": max(peak_bytes() - idle, 0)}


def copy(args: argparse.Namespace) -> dict[str, float]:
    return timed(args, lambda: subprocess.run(["cp", "-r", args.model, args.work / "target"], check=True))


def conversion(to: str) -> Callable[[argparse.Namespace], dict[str, float]]:
    def work(args: argparse.Namespace) -> dict[str, float]:
        job = prepare(open_checkpoint(args.model), args.work / "target", to=to)
        return timed(args, lambda: convert(job, check=False, flush=False))

    return work


def loading(args: argparse.Namespace) -> dict[str, float]:
    import jax

    from sharding.layout import make_layout

    jax.devices()

    def work() -> Any:
        checkpoint = open_checkpoint(args.model)
        layout = make_layout("tensor", jax.devices()[:1], checkpoint.config.hidden_size)
        return jax.block_until_ready(load(checkpoint.source, checkpoint.rules, checkpoint.config, layout, args.dtype))

    return timed(args, work)


def transformers(args: argparse.Namespace) -> dict[str, float]:
    """transformers' from_pretrained. It may map the file and read nothing: a number of each page is read, to load them all."""
    torch_and_transformers()

    def work() -> Any:
        model = from_pretrained(args.model, args.dtype)
        for parameter in model.parameters():
            flat = parameter.data.view(-1)
            flat[:: 4096 // flat.element_size()].sum()
        return model

    return timed(args, work)


ROLES: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "cp": copy,
    "convert orbax": conversion("orbax"),
    "convert safetensors": conversion("safetensors"),
    "load safetensors": loading,
    "load orbax": loading,
    "transformers": transformers,
}


def write_random(folder: Path, name: str, layers: int | None) -> Path:
    """A checkpoint of a published shape in bfloat16, in files as transformers writes them."""
    preset = PRESETS[name]
    config: ModelConfig = replace(preset, num_layers=layers or preset.num_layers, dtype="bfloat16")
    sizes, mappings = axis_sizes(config), llama.RULES.by_parameter(config)
    declared = set(names_of_parameters(config))
    dtype = np.dtype(ml_dtypes.bfloat16)
    entries = [
        Entry(tensor, mapping.pattern.tensor_shape(sizes), dtype)
        for path, mapping in mappings.items()
        if path in declared
        for tensor in mapping.tensors
    ]
    noise = (0.02 * np.random.default_rng(0).standard_normal(1 << 24, np.float32)).astype(dtype)

    def pieces(of: list[Entry]) -> Iterator[Piece]:
        for entry in of:
            left = entry.nbytes // dtype.itemsize
            while left:
                yield Piece((), noise[:left])
                left -= min(left, len(noise))

    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(llama.write_config(config)))
    target = SafetensorsFiles(entries, 5 * 10**9)
    for file, group in target.groups.items():
        target.write(folder, file, pieces(group))
    target.end(folder)
    return folder


def print_table(result: dict[str, Any]) -> None:
    size, rows = result["bytes"], result["rows"]
    print(f"{result['model']}, {size / 1e9:.2f} GB, loaded in {result['dtype']}; medians of {result['repeats']}")
    print(
        f"  {'':<20} {'call':>8} {'GB/s':>6} {'to cp':>6} {'with flush':>11} {'to cp':>6} {'start':>8} {'peak beyond start':>18}"
    )
    cp = rows.get("cp")
    for role, row in rows.items():
        line = f"  {role:<20} {row['call']:6.2f} s {size / row['call'] / 1e9:6.2f}"
        line += f" {cp['call'] / row['call']:6.2f}" if cp else " " * 7
        if "flush" in row:
            whole = row["call"] + row["flush"]
            line += f" {whole:9.2f} s" + (f" {(cp['call'] + cp['flush']) / whole:6.2f}" if cp else " " * 7)
        else:
            line += " " * 18
        print(f"{line} {row['start']:6.2f} s {row['peak_bytes_beyond_start'] / 2**20:12,.0f} MiB")


if __name__ == "__main__":
    main()

"""Seconds of a start by phase: cold, with nothing compiled yet, and warm.

    python -m bench.start
    python -m bench.start --virtual-devices 4 --layout tensor --prompt 512

Each is a process of its own, from its start to its first token; a cold one has an empty compilation cache, the warm one after it
that one's. Prints medians; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.machine import describe, process_seconds, report

PHASES = ("import", "open and load", "compile", "run")
PROGRAM = "import sys; from bench.start import child; child(*sys.argv[1:])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layout", default="tensor")
    parser.add_argument("--virtual-devices", type=int, default=1, metavar="N")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", type=Path, help="keep the result in this JSON file")
    args = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for name, starts in found.items():
                starts.append(start(args, Path(folder)))
                assert name == "cold" or starts[-1]["programs"] == 0, "a warm start compiles nothing"
    print(f"{args.model}, layout {args.layout} on {args.virtual_devices} device(s): seconds")
    print(f"  {'':<6}" + "".join(f"{phase:>15}" for phase in PHASES) + f"{'first token at':>16}{'compiled':>10}")
    for name, starts in found.items():
        row = rows[name] = {key: statistics.median(one[key] for one in starts) for key in starts[0]}
        print(f"  {name:<6}" + "".join(f"{row[p]:15.2f}" for p in PHASES) + f"{row['total']:16.2f}{row['programs']:10.0f}")
    report({"bench": "start", "model": args.model, "layout": args.layout, "devices": args.virtual_devices, "prompt": args.prompt,
            "machine": describe(), "repeats": args.repeats, "rows": rows}, args.save)  # fmt: skip


def start(args: argparse.Namespace, cache: Path) -> dict[str, float]:
    """A process of its own, with its compiled programs in `cache`."""
    command = [sys.executable, "-c", PROGRAM, args.model, args.layout, str(args.virtual_devices), str(args.prompt)]
    done = subprocess.run(
        command, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}, stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def child(model: str, layout: str, devices: str, prompt: str) -> None:
    """Start, generate a token, and print the phases as one JSON line."""
    from jaxllm import LLM, SamplingParams, virtual_cpu_devices

    imported = process_seconds()
    virtual_cpu_devices(int(devices))
    llm = LLM(model, layout=layout)
    loaded, compiling = process_seconds(), llm.compile_seconds
    llm.generate([[5] * int(prompt)], SamplingParams(temperature=0, max_tokens=1))
    total, compiled = process_seconds(), llm.compile_seconds - compiling
    seconds = (imported, loaded - imported, compiled, total - loaded - compiled)
    phases: dict[str, Any] = dict(zip(PHASES, seconds, strict=True))
    print(json.dumps(phases | {"total": total, "programs": llm.compiled}))


if __name__ == "__main__":
    main()

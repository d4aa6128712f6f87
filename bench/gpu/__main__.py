"""Run the parts one after another, each a process of its own under its own time limit, and keep what they find as it comes.

    python -m bench.gpu --out DIR
    python -m bench.gpu --out DIR --only ceilings llama-7b --minutes 4
    JAX_PLATFORMS=cpu python -m bench.gpu --out DIR --rehearse

Each part appends JSON lines to DIR/gpu.jsonl and its output to DIR/gpu.log; one that is done there is not run again.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.gpu.parts import PARTS, Part
from bench.gpu.results import Results, table

LEAST = 15  # seconds for which a part is begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the results")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts, in their order")
    parser.add_argument("--minutes", type=float, default=8, help="for all of them")
    parser.add_argument("--rehearse", action="store_true", help="with tiny models, on whatever device there is")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results, until = Results(args.out / "gpu.jsonl"), time.monotonic() + 60 * args.minutes
    for part in PARTS:
        left = until - time.monotonic()
        if (args.only and part.name not in args.only) or part.name in results.done():
            continue
        if left < LEAST:
            print(f"{part.name}: no time left")
            continue
        print(f"{part.name}: ", end="", flush=True)
        print(run(part, results, args.out, min(part.seconds, left), rehearse=args.rehearse), flush=True)
    print(table(results.rows()))


def run(part: Part, results: Results, out: Path, seconds: float, *, rehearse: bool) -> str:
    """How the part ended, in a few words."""
    start = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1", **part.environment}
    with open(out / "gpu.log", "a") as log:
        log.write(f"\n=== {part.name}\n")
        log.flush()
        child = subprocess.Popen(
            [sys.executable, *part.command(results.path, rehearse=rehearse)], env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return f"stopped after {seconds:.0f} s"
    taken = time.monotonic() - start
    if status:
        return f"failed with status {status} after {taken:.0f} s, see gpu.log"
    results.add(part.name, {"done": True, "seconds": taken})
    return f"{taken:.0f} s"


if __name__ == "__main__":
    main()

"""`jaxllm cache`: where compiled programs are kept, and how much of them."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

MB = 1e6


def add(commands: Any) -> None:
    """Add the command to the command line's subparsers."""
    cache = commands.add_parser("cache", help="compiled programs on the disk", description="Compiled programs on the disk.")
    cache.add_argument("--clear", action="store_true", help="remove them; they are compiled anew when they are needed")
    cache.set_defaults(run=run_cache)


def run_cache(args: argparse.Namespace) -> int:
    from checkpoints.hub import compiled_dir
    from jaxllm.execution.compile_cache import clear, entries, folder_in_use

    folder = folder_in_use(compiled_dir())
    found = clear(folder) if args.clear else entries(folder)
    size = sum(entry.nbytes for entry in found)
    print(f"{folder}: {len(found)} programs, {size / MB:.1f} MB{', removed' if args.clear else ''}")
    count, nbytes, newest = Counter[str](), Counter[str](), dict[str, float]()
    for entry in found:
        count[entry.name] += 1
        nbytes[entry.name] += entry.nbytes
        newest.setdefault(entry.name, entry.compiled)
    for name, total in nbytes.most_common():
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(newest[name]))
        print(f"  {name:<32} {count[name]:4} {total / MB:8.1f} MB, the newest of {day}")
    return 0

"""The tests that compare with transformers and with what was recorded of it, those of one device, on this one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter

import jax

from bench.gpu.results import Reporter, options_of_a_part

# What needs another program, several devices or the network skips itself or is left out.
TESTS = (
    "tests/checkpoints/test_families.py",
    "tests/decoder",
    "tests/scoring/test_scorer.py",
    "tests/generation/test_engine.py",
    "tests/generation/test_laws.py",
    "tests/generation/test_controls.py",
    "tests/execution/test_sampling.py",
)


def main() -> None:
    parser = options_of_a_part(__doc__)
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 14))
    parser.add_argument("-k", default="not round_trip and not counted and not what_is_recorded", help="as pytest's")
    args = parser.parse_args()
    report = Reporter(args)
    platform = {"gpu": "cuda,cpu"}.get(jax.default_backend(), jax.default_backend())
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-W", "default", "-n", args.processes, "--dist=worksteal"]
    command += ["-m", "full or not full", "-k", args.k, *TESTS]
    counted: Counter[str] = Counter()
    failed = []
    with subprocess.Popen(
        list(map(str, command)), env=os.environ | {"JAX_PLATFORMS": platform}, stdout=subprocess.PIPE, text=True
    ) as tests:
        assert tests.stdout is not None
        for line in tests.stdout:
            print(line, end="", flush=True)
            outcome = re.match(r"\[gw\d+\].* (PASSED|FAILED|SKIPPED|ERROR) (.*)", line)
            if outcome:
                counted[outcome[1]] += 1
                if outcome[1] in ("FAILED", "ERROR"):
                    failed.append(outcome[2])
                    report(failed=outcome[2])
    report(tests=dict(counted), failed=failed)


if __name__ == "__main__":
    main()

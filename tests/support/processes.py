"""Processes of their own, with caches of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from paths import ROOT


def environment_in(xdg: Path) -> dict[str, str]:
    """The environment of a process with a cache folder of its own."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_COMPILATION", "JAX_ENABLE_COMP"))}
    return env | {"XDG_CACHE_HOME": str(xdg), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def start(xdg: Path, *arguments: str, model: Path | None = None) -> subprocess.Popen[str]:
    """`jaxllm` with these arguments. `model` takes the place of the demo's."""
    # Whoever runs the tests in the background has SIGINT ignored, and a child inherits that.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from jaxllm.commands import cli, demo; "
    )
    program += "demo.MODEL = sys.argv.pop(1) or demo.MODEL; sys.exit(cli.main())"
    env = environment_in(xdg) | {"PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", program, str(model or ""), *arguments]
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

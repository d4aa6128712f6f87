"""The machine of a bench, and the measured ceilings of its device."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from jaxllm.decoder.layers import dot
from jaxllm.planning.measure import copy_rate, seconds_of

PACKAGES = ("jax", "jaxlib", "flax", "transformers", "torch")


def describe() -> dict[str, Any]:
    """Device, processor, versions and date of this run."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": len(jax.devices()),
        "processor": _processor(),
        "instructions": _instructions(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name))},
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor()


def _instructions() -> list[str]:
    """The instruction sets of this CPU, of those that decide how fast it multiplies matrices."""
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in _cpuinfo("flags").split()]


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith(key)), "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def process_seconds() -> float:
    """Seconds since this process was started, from the kernel's own record of it; Linux alone."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def peak_bytes() -> int:
    """Most memory that this process has had resident, mapped files included; Linux alone. `getrusage` counts its parent's too."""
    return status_bytes("VmHWM")


def status_bytes(name: str, pid: int | str = "self") -> int:
    """A size that the kernel states of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median time of `run` after one run to warm up; whatever arrays it returns are waited for."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, when one device copies an array that no cache holds."""
    return copy_rate(jax.devices()[:1])


def matmul_rate(dtype: str) -> float:
    """FLOPs a second of a square product on one device, large enough to be the ceiling.

    Of random numbers: a GPU multiplies ones faster, as its transistors have less to do. Float32 is not rounded to TF32.
    """
    n = 2048 if jax.devices()[0].platform == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (n, n), dtype)
    step = jax.jit(lambda a, b: dot("ij,jk->ik", a, b))
    return 2 * n**3 / seconds_of(lambda: step(x, x))


def report(result: dict[str, Any], save: Path | None) -> None:
    """Print the result as one JSON line, the last of stdout, and keep it if a file is named."""
    if save is not None:
        save.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))

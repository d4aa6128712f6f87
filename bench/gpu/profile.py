"""Seconds by kernel, from a trace of jax's profiler."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

KEPT = 30  # kernels
ON_A_CPU = "tf_XLA"  # threads that run operations there


def profile(run: Callable[[], Any]) -> dict[str, Any]:
    """Trace `run`: the seconds that the device was busy, from its first kernel to its last, and of the kernels that took most."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        events = list(_events(ProfileData.from_file(str(file))))
    seconds: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for name, _, duration in events:
        seconds[name] += 1e-9 * duration
        count[name] += 1
    first, last = min(start for _, start, _ in events), max(start + duration for _, start, duration in events)
    most = sorted(seconds, key=seconds.__getitem__, reverse=True)[:KEPT]
    return {
        "busy_seconds": _covered(events),
        "span_seconds": 1e-9 * (last - first),
        "launches": len(events),
        "kernels": [(name, count[name], seconds[name]) for name in most],
    }


def _events(data: ProfileData) -> Iterator[tuple[str, float, float]]:
    """(name, start, duration) in nanoseconds of what ran on the device."""
    for plane in data.planes:
        gpu = plane.name.startswith("/device:GPU")
        for line in plane.lines:
            if (gpu and line.name.startswith("Stream")) or (not gpu and line.name.startswith(ON_A_CPU)):
                for event in line.events:
                    yield event.name, event.start_ns, event.duration_ns


def _covered(events: list[tuple[str, float, float]]) -> float:
    """Seconds in which at least one of them ran."""
    total, until = 0.0, 0.0
    for _, start, duration in sorted(events, key=lambda event: event[1]):
        total += max(start + duration - max(start, until), 0)
        until = max(until, start + duration)
    return 1e-9 * total

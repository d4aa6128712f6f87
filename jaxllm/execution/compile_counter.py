"""A count of what was compiled."""

from __future__ import annotations

from dataclasses import dataclass

import jax


@dataclass
class CompileCounter:
    """Programs this process asked the cache for: `hits` were found, `misses` were compiled."""

    hits: int = 0
    misses: int = 0
    seconds: float = 0.0


def _count() -> CompileCounter:
    counter = CompileCounter()

    def on_event(event: str, **_: object) -> None:
        counter.hits += event == "/jax/compilation_cache/cache_hits"
        counter.misses += event == "/jax/compilation_cache/cache_misses"

    def on_duration(event: str, duration_secs: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counter.seconds += duration_secs

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    return counter


# One for the process, as jax's events are.
COUNTER = _count()

"""The persistent compilation cache, on by default, and a count of what was compiled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax


@dataclass
class CompileCounter:
    """Programs this process asked the cache for: `hits` were found, `misses` were compiled."""

    hits: int = 0
    misses: int = 0
    seconds: float = 0.0


def use_compilation_cache(folder: Path) -> None:
    """Keep every compiled program in `folder`, unless the user has set a folder of their own.

    jax by default skips programs that compile in under a second, which is most of them.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


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

"""Compiling ahead: every program that generating may need, into the compilation cache, several at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from jaxllm.decoder.cache_spec import Pool
from jaxllm.execution import programs
from jaxllm.execution.programs import StepProgram
from jaxllm.execution.step_shapes import StepShapes
from jaxllm.execution.steps import Steps


def wanted(steps: Steps, pool: Pool, shapes: StepShapes, *, random: bool = True) -> list[StepProgram]:
    """Programs for any prompts and answers that the pool's sequences may have.

    Greedy decoding's, and with `random` also those that sample. Requests for log-probabilities, penalties and the like have
    programs of their own, which are compiled when they are first needed.
    """
    found = programs.empty_cache(steps, pool)
    for width in shapes.widths:
        for sampled in (False, True) if random else (False,):
            how: dict[str, Any] = {"random": sampled, "width": width}
            found += [programs.decode(steps, rows * steps.layout.data, pool, **how) for rows in shapes.rows]
            found += [programs.prefill(steps, tokens, pool, **how) for tokens in shapes.tokens]
    return found


def compile_all(found: list[StepProgram], done: Callable[[StepProgram], None]) -> None:
    """Compile them, as many at once as the host has cores; `done` is called after each, on this thread."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = {pool.submit(program.compile): program for program in found}
        try:
            for job in as_completed(jobs):
                job.result()
                done(jobs[job])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

"""Compiling ahead: every program that generating may need, into the compilation cache, several at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

from jaxllm.buckets import chunk_rungs
from jaxllm.execution import programs
from jaxllm.execution.cache_shapes import CacheLadder
from jaxllm.execution.programs import StepProgram
from jaxllm.execution.steps import Steps


def wanted(steps: Steps, max_model_len: int, max_num_seqs: int, *, random: bool = True) -> list[StepProgram]:
    """Programs for prompts and answers up to `max_model_len` tokens in up to `max_num_seqs` sequences, the smallest first.

    Greedy decoding's, and with `random` also those that sample. Requests for log-probabilities, penalties and the like have
    programs of their own, which are compiled when they are first needed.
    """
    ladder = CacheLadder.of(steps.layout, max_num_seqs, max_model_len)
    found: list[StepProgram] = []
    for shape, higher in ladder.reachable().items():
        found += programs.empty_cache(steps, *shape)
        for target in higher:
            found += programs.grown_cache(steps, shape, target)
        for sampled in (False, True) if random else (False,):
            found.append(programs.decode(steps, *shape, random=sampled))
            chunks = [chunk for chunk in chunk_rungs() if chunk <= shape[1]]
            found += [programs.prefill(steps, chunk, *shape, random=sampled) for chunk in chunks]
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

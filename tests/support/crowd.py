"""Requests that come, and are cancelled, at steps of their own, and an engine that runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxllm.execution.steps import MAX_STEPS
from jaxllm.generation.engine import Engine
from jaxllm.generation.sequence import Sequence
from jaxllm.requests.sampling_params import SamplingParams

STOP = (5, 60)


@dataclass(frozen=True)
class Case:
    """A request, the step in which it arrives and the step before which it is cancelled, if it is."""

    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    stop_ids: tuple[int, ...] = STOP
    arrival: int = 0
    cancelled: int | None = None

    def sequence(self, id: int) -> Sequence:
        return Sequence(id, self.prompt, self.params, self.max_tokens, self.stop_ids, self.seed)


def run(engine: Engine, cases: list[Case], steps: Callable[[], int] = lambda: MAX_STEPS) -> list[Sequence]:
    """All the cases at once, each from its arrival on."""
    sequences = [case.sequence(i) for i, case in enumerate(cases)]
    step = 0
    while any(s.finish_reason is None for s in sequences):
        for case, sequence in zip(cases, sequences, strict=True):
            if case.arrival == step:
                engine.scheduler.add(sequence)
            if case.cancelled == step:
                engine.scheduler.cancel(sequence.id)
        engine.step(steps(), ahead=step % 3 > 0)
        step += 1
    while engine.busy:
        engine.step()
    engine.scheduler.check_integrity()
    return sequences

"""Sequences and the slots they hold. Plain Python: no array, no device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from jaxllm.requests.outputs import Logprob
from jaxllm.requests.sampling_params import SamplingParams


@dataclass(eq=False)
class Sequence:
    """One sample of one request on its way through the engine.

    Its cache holds the first `cached` of its tokens; the last token it generated is never in there. Where it had to be read anew,
    `reread` of its generated tokens count to what is prefilled.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    stop_ids: tuple[int, ...]
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cached: int = 0
    reread: int = 0
    slot: int | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def beginning(self) -> list[int]:
        """What is prefilled: the prompt, and what was generated before it had to be read anew."""
        return self.prompt + self.tokens[: self.reread] if self.reread else self.prompt

    @property
    def prefilling(self) -> bool:
        return self.cached < len(self.prompt) + self.reread

    def read_anew(self) -> None:
        """All its tokens will be prefilled again."""
        self.cached, self.reread = 0, len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self.max_tokens - len(self.tokens)

    def append(self, token: int, logprobs: dict[int, Logprob] | None) -> None:
        """Take a generated token; ends the sequence at a stop id or at its limit."""
        self.tokens.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if token in self.stop_ids and len(self.tokens) > self.params.min_tokens:
            self.finish_reason, self.stop_reason = "stop", token
        elif self.remaining <= 0:
            self.finish_reason = "length"


class Scheduler:
    """Who waits, who holds which slot. First come, first served."""

    def __init__(self, max_slots: int):
        self.max_slots = max_slots
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def admit(self) -> None:
        """Give free slots, lowest first, to those who have waited longest."""
        free = (slot for slot in range(self.max_slots) if slot not in self.running)
        for slot in list(free)[: len(self.waiting)]:
            sequence = self.waiting.popleft()
            sequence.slot = slot
            self.running[slot] = sequence

    def release_finished(self) -> list[Sequence]:
        """Take the finished sequences out of their slots."""
        done = [s for s in self.running.values() if s.finish_reason is not None]
        for sequence in done:
            assert sequence.slot is not None
            del self.running[sequence.slot]
            sequence.slot = None
        return done

    def cancel(self, id: int) -> None:
        """End a sequence where it stands. Nothing happens if it has ended already."""
        for sequence in [*self.waiting, *self.running.values()]:
            if sequence.id == id and sequence.finish_reason is None:
                sequence.finish_reason = "cancelled"
        self.waiting = deque(s for s in self.waiting if s.finish_reason is None)

    @property
    def prefilling(self) -> list[Sequence]:
        """Sequences in a slot whose beginning is not all in the cache, oldest first."""
        return sorted((s for s in self.running.values() if s.prefilling), key=lambda s: s.id)

    @property
    def decoding(self) -> list[Sequence]:
        return [s for s in self.running.values() if not s.prefilling and s.finish_reason is None]

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

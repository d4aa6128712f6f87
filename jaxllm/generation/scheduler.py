"""What each step holds: who has a slot, whose prompt is prefilled, who decodes, and how a sequence ends.

Plain Python: no array, no device.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from jaxllm.buckets import MAX_CHUNK, chunk_bucket
from jaxllm.generation.sequence import Sequence
from jaxllm.requests.outputs import Logprob

PREFILL_BUDGET = 2048  # prompt tokens between two decode calls, while rows wait to decode

Choices = dict[int, Logprob]


class Chunk(NamedTuple):
    """Tokens [start, start + length) of a sequence's `prefill_tokens`."""

    sequence: Sequence
    start: int
    length: int

    @property
    def tokens(self) -> list[int]:
        return self.sequence.prefill_tokens[self.start : self.start + self.length]

    @property
    def is_last(self) -> bool:
        """Does it yield the sequence's next token?"""
        return self.start + self.length == len(self.sequence.prefill_tokens)


@dataclass(frozen=True)
class ScheduledStep:
    """One call of the device: chunks of prompts, or decoding. With neither, nobody is ready.

    Attributes:
      prefill: chunks on different data shards, all of the same bucket.
      decode: sequences that gain up to `max_tokens` tokens each; the call returns as soon as one has ended if `until_any`.
    """

    prefill: tuple[Chunk, ...] = ()
    decode: tuple[Sequence, ...] = ()
    max_tokens: int = 0
    until_any: bool = False


class Scheduler:
    """First come, first served.

    Args:
      max_slots: sequences that run at once.
      data_shards: slots are dealt out over them in turn; a prefill step takes a chunk on each.
      short_context: tokens up to which a cache is of use that was filled before there were more (longrope); None: always.
    """

    def __init__(self, max_slots: int, data_shards: int = 1, short_context: int | None = None):
        self.max_slots, self.data_shards, self.short_context = max_slots, data_shards, short_context
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        self._prefilled = 0  # tokens since the last decode call

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def prefilling(self) -> list[Sequence]:
        """Sequences in a slot whose `prefill_tokens` are not all in the cache, oldest first."""
        return sorted((s for s in self.running.values() if s.prefilling), key=lambda s: s.id)

    @property
    def decoding(self) -> list[Sequence]:
        return [s for s in self.running.values() if not s.prefilling and s.finish_reason is None]

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self, max_tokens: int) -> ScheduledStep:
        """The next step, in which a row decodes at most `max_tokens` tokens; 0 only prefills.

        Prompts go first, up to a budget while others wait to decode.
        """
        self.release_finished()
        self.admit()
        for sequence in self.decoding:
            if not self._steps_left(sequence, 1):
                sequence.reset_for_recompute()
        prefilling, decoding = self.prefilling, self.decoding
        if not decoding:
            self._prefilled = 0
        if prefilling and (self._prefilled < PREFILL_BUDGET or not max_tokens):
            chunks = self._chunks(prefilling)
            self._prefilled += sum(chunk.length for chunk in chunks)
            return ScheduledStep(prefill=chunks)
        if not decoding or not max_tokens:
            return ScheduledStep()
        self._prefilled = 0
        most = min(self._steps_left(sequence, max_tokens) for sequence in decoding)
        return ScheduledStep(decode=tuple(decoding), max_tokens=most, until_any=bool(self.waiting or prefilling))

    def append(self, sequence: Sequence, token: int, choices: Choices | None) -> None:
        """Take a generated token; a stop id ends the sequence, and its limit does."""
        sequence.tokens.append(token)
        if choices is not None:
            sequence.logprobs.append(choices)
        if token in sequence.stop_ids and len(sequence.tokens) > sequence.params.min_tokens:
            self.finish(sequence, "stop", token)
        elif sequence.remaining <= 0:
            self.finish(sequence, "length")

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None, keep: int | None = None) -> None:
        """End a sequence, with the first `keep` of its tokens. Its slot is free from the next step on."""
        if keep is not None:
            del sequence.tokens[keep:], sequence.logprobs[keep:]
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason

    def cancel(self, id: int) -> None:
        """End a sequence where it stands. Nothing happens if it has ended already."""
        for sequence in [*self.waiting, *self.running.values()]:
            if sequence.id == id and sequence.finish_reason is None:
                self.finish(sequence, "cancelled")
        self.waiting = deque(s for s in self.waiting if s.finish_reason is None)

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

    def data_shard(self, sequence: Sequence) -> int:
        """The part of the `data` axis whose cache holds the sequence."""
        assert sequence.slot is not None
        return sequence.slot % self.data_shards

    def _chunks(self, prefilling: list[Sequence]) -> tuple[Chunk, ...]:
        """A chunk of the oldest sequence and, on other data shards, of others whose chunk runs in the same program."""
        chunks: dict[int, Chunk] = {}
        bucket = 0
        for sequence in prefilling:
            length = min(len(sequence.prefill_tokens) - sequence.cached, MAX_CHUNK)
            bucket = bucket or chunk_bucket(length)
            if chunk_bucket(length) == bucket:
                chunks.setdefault(self.data_shard(sequence), Chunk(sequence, sequence.cached, length))
        return tuple(chunks.values())

    def _steps_left(self, sequence: Sequence, most: int) -> int:
        """Tokens, at most `most`, it can gain with its cache: past longrope's short context all keys are rotated otherwise."""
        if self.short_context is None or len(sequence.prefill_tokens) > self.short_context:
            return most
        return min(max(self.short_context - sequence.cached, 0), most)

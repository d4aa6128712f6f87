"""What each step holds: who runs, whose prompts are prefilled, who decodes, which pages they hold, and how a sequence ends.

Plain Python: no array, no device.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from jaxllm.buckets import PAGE, TILE
from jaxllm.execution.step_shapes import StepShapes
from jaxllm.generation.grammar import Grammar, GrammarError
from jaxllm.generation.pages import ROOT, PageTable
from jaxllm.generation.sequence import Sequence
from jaxllm.requests.outputs import Logprob
from sharding.padding import round_up

PREFILL_BUDGET = 2048  # prompt tokens on a data shard between two decode calls, while rows wait to decode
RETURN_AT = 8  # while others wait, a decode call returns when one in so many rows has stopped
LONG = -1  # root of the pages of sequences past longrope's short context

Choices = dict[int, Logprob]


class Chunk(NamedTuple):
    """Tokens [start, start + length) of a sequence's `prefill_tokens`; `start` is a multiple of TILE."""

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
      prefill: chunks of any number of sequences.
      decode: sequences that gain up to `max_tokens` tokens each; the call returns as soon as `until_stopped` have ended.
      reach: tokens of the longest of them that may be in its pages after the call.
    """

    prefill: tuple[Chunk, ...] = ()
    decode: tuple[Sequence, ...] = ()
    max_tokens: int = 0
    reach: int = 0
    until_stopped: int | None = None


@dataclass
class Statistics:
    """What a scheduler has done so far.

    Attributes:
      prompt_tokens: of all sequences that ran; `shared_tokens` of them were in the cache already.
      preempted: how often a sequence gave its pages back, to be computed again.
      steps: that were run; `host_seconds` were spent on them beside waiting for the devices, some of it while these ran.
    """

    prompt_tokens: int = 0
    shared_tokens: int = 0
    preempted: int = 0
    steps: int = 0
    host_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """The part of the prompts' tokens that were shared."""
        return self.shared_tokens / max(self.prompt_tokens, 1)


class Scheduler:
    """First come, first served, in each priority. Where pages are short, who came last gives its own back, to be computed again.

    Args:
      max_num_seqs: sequences that run at once.
      tables: the pages of each data shard.
      shapes: of the steps.
      short_context: tokens up to which a cache is of use that was filled before there were more (longrope); None: always.
      batch_invariant: the keys of a prompt are those that a step of prompts makes, and those of generated tokens decoding's,
        whatever happens: what was generated is not shared, and is generated again where its pages were given back.
    """

    def __init__(
        self,
        max_num_seqs: int,
        tables: list[PageTable],
        shapes: StepShapes,
        short_context: int | None = None,
        *,
        batch_invariant: bool = False,
    ):
        self.max_num_seqs, self.tables, self.shapes, self.short_context = max_num_seqs, tables, shapes, short_context
        self.batch_invariant = batch_invariant
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of their coming
        self.statistics = Statistics()
        self._prefilled = 0  # tokens since the last decode call

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def pages_held(self) -> float:
        """The part of the cache's pages that sequences hold, from 0 to 1."""
        pools = [pool for table in self.tables for pool in table.pools]
        return 1 - sum(pool.free for pool in pools) / sum(pool.pages - 1 for pool in pools)

    @property
    def decoding(self) -> list[Sequence]:
        """Sequences whose last token is known and not in their pages: that of a prompt whose step still runs is not known."""
        return [s for s in self.running if s.awaits_decode and s.finish_reason is None]

    def add(self, sequence: Sequence) -> None:
        place = len(self.waiting)
        while place and self.waiting[place - 1].priority > sequence.priority:
            place -= 1
        self.waiting.insert(place, sequence)

    def schedule(self, max_tokens: int) -> ScheduledStep:
        """The next step, in which a row decodes at most `max_tokens` tokens; 0 only prefills.

        Prompts go first, up to a budget while others wait to decode.
        """
        self.release_finished()
        decoding = self.decoding
        for sequence in decoding if self.short_context is not None else ():
            if not self._steps_left(sequence, 1):
                self.preempt(sequence)
        if not decoding:
            self._prefilled = 0
        if self._prefilled < PREFILL_BUDGET or not max_tokens:
            chunks = self._chunks()
            if chunks:
                return self._prefill(chunks)
        if not max_tokens:
            return ScheduledStep()
        self._prefilled = 0
        return self._decode(max_tokens)

    def schedule_ahead(self, step: ScheduledStep, max_tokens: int) -> ScheduledStep | None:
        """What may be queued behind `step` while its results are not known yet: more prompts, or more tokens of the same rows.

        None where it depends on them: on a place that frees, on a stop string, which the host looks for, or on a grammar.
        """
        self.release_finished()
        if step.prefill:
            chunks = self._chunks() if self._prefilled < PREFILL_BUDGET or not self.decoding else ()
            return self._prefill(chunks) if chunks else None
        rows = [s for s in step.decode if s.finish_reason is None]
        if not rows or self.waiting or len(rows) < len(self.running) or any(s.params.stops or s.grammar for s in rows):
            return None
        if self._rows_of(rows) != self._rows_of(step.decode):
            return None
        tokens = min(min(self._steps_left(s, step.max_tokens + max_tokens) for s in rows) - step.max_tokens, max_tokens)
        if tokens <= 0 or all(s.remaining <= step.max_tokens for s in rows):
            return None
        return self._extended(rows, step.max_tokens, tokens) if self._has_room(rows, step.max_tokens + tokens) else None

    def append(self, sequence: Sequence, token: int, choices: Choices | None) -> None:
        """Take a generated token; a stop id ends the sequence, and its limit does."""
        sequence.tokens.append(token)
        if choices is not None:
            sequence.logprobs.append(choices)
        if token in sequence.stop_ids and len(sequence.tokens) > sequence.params.min_tokens:
            self.finish(sequence, "stop", token)
        elif sequence.grammar is not None and self._ends(sequence, sequence.grammar, token):
            self.finish(sequence, "stop")
        elif sequence.remaining <= 0:
            self.finish(sequence, "length")

    def _ends(self, sequence: Sequence, grammar: Grammar, token: int) -> bool:
        """Does a new token end the form that the sequence is held to, or break it?"""
        try:
            grammar.advance(token)
        except GrammarError as error:
            sequence.error = error
        return grammar.ended

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None, keep: int | None = None) -> None:
        """End a sequence, with the first `keep` of its tokens. Its pages are free from the next step on."""
        if keep is not None:
            del sequence.tokens[keep:], sequence.logprobs[keep:]
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason

    def cancel(self, id: int) -> None:
        """End a sequence where it stands. Nothing happens if it has ended already."""
        for sequence in [*self.waiting, *self.running]:
            if sequence.id == id and sequence.finish_reason is None:
                self.finish(sequence, "cancelled")
        self.waiting = deque(s for s in self.waiting if s.finish_reason is None)

    def release_finished(self) -> list[Sequence]:
        """Take the finished sequences out, and their pages back."""
        done = [s for s in self.running if s.finish_reason is not None]
        for sequence in done:
            self._leave(sequence)
        return done

    def preempt(self, sequence: Sequence, *, whole: bool = True, keep_tokens: bool = False) -> None:
        """Take a sequence's pages back; it is the next of its priority to be admitted. `whole`: they hold what they should.

        `keep_tokens`: with `batch_invariant` too, which generates them a second time, to the bit.
        """
        self.statistics.preempted += 1
        self._leave(sequence, whole=whole)
        sequence.reset_for_recompute(keep_tokens=keep_tokens or not self.batch_invariant)
        place = 0
        while place < len(self.waiting) and self.waiting[place].priority < sequence.priority:
            place += 1
        self.waiting.insert(place, sequence)

    def lose_pages(self, *, keep_tokens: bool = False) -> None:
        """What the pages hold is of no use any more: nothing is shared from before, and all who run are computed again."""
        self.release_finished()
        for table in self.tables:
            table.clear()
        for sequence in reversed(self.running.copy()):
            self.preempt(sequence, whole=False, keep_tokens=keep_tokens)

    def check_integrity(self) -> None:
        """Every page is accounted for. Raises AssertionError."""
        for shard, table in enumerate(self.tables):
            table.check_integrity(s.held for s in self.running if s.held is not None and s.shard == shard)

    def _leave(self, sequence: Sequence, *, whole: bool = True) -> None:
        self.running.remove(sequence)
        if sequence.held is not None:
            table, tokens = self.tables[sequence.shard], sequence.prompt
            if not self.batch_invariant:
                tokens = tokens + sequence.tokens
            if whole:
                table.know(sequence.held, tokens, min(sequence.cached, len(tokens)))
            table.release(sequence.held)
            sequence.held = None

    # Prompts

    def _prefill(self, chunks: tuple[Chunk, ...]) -> ScheduledStep:
        self._prefilled += sum(chunk.length for chunk in chunks) // len(self.tables)
        return ScheduledStep(prefill=chunks)

    def _chunks(self) -> tuple[Chunk, ...]:
        """Chunks of those that are being prefilled, then of those that wait, as many tokens as a step is to have."""
        prefilling = [s for s in self.running if s.prefilling and s.finish_reason is None]
        room = [self._step_tokens(prefilling)] * len(self.tables)
        chunks: list[Chunk] = []
        for sequence in prefilling:
            if (chunk := self._chunk(sequence, room)) is not None:
                chunks.append(chunk)
        while self.waiting and len(self.running) < self.max_num_seqs:
            if (chunk := self._admit(self.waiting[0], room)) is None:
                break
            chunks.append(chunk)
        return tuple(chunks)

    def _step_tokens(self, prefilling: list[Sequence]) -> int:
        """Tokens of the step on each data shard, as far as can be known before pages are shared."""
        tokens, most = 0, self.shapes.tokens[-1] * len(self.tables)
        places = self.max_num_seqs - len(self.running)
        for sequence in [*prefilling, *(s for s, _ in zip(self.waiting, range(places), strict=False))]:
            tokens += round_up(len(sequence.prefill_tokens) - sequence.cached, TILE)
            if tokens >= most:
                break
        return self.shapes.tokens_for(min(-(-tokens // len(self.tables)), self.shapes.tokens[-1]))

    def _admit(self, sequence: Sequence, room: list[int]) -> Chunk | None:
        """Let a sequence run with the pages it finds, on the data shard that has fewest; None where there is no room."""
        tokens = sequence.prefill_tokens
        here = [sum(s.shard == shard for s in self.running) for shard in range(len(self.tables))]
        open_shards = [shard for shard in range(len(self.tables)) if room[shard] >= TILE and here[shard] < self.shapes.rows[-1]]
        if not open_shards:
            return None
        found = {shard: self._find(sequence, shard) for shard in open_shards}
        shard = min(open_shards, key=lambda shard: (here[shard], -len(found[shard])))
        table = self.tables[shard]
        held = table.begin(found[shard])
        if not table.has(table.missing(held, len(tokens) + 1)):
            table.release(held)
            return None
        sequence.held, sequence.shard, sequence.cached = held, shard, (len(found[shard]) - 1) * PAGE
        if not sequence.num_recomputed:
            sequence.num_shared = sequence.cached
            self.statistics.prompt_tokens += len(sequence.prompt)
            self.statistics.shared_tokens += sequence.cached
        if sequence.admitted is None:
            sequence.admitted = time.perf_counter()
        self.waiting.popleft()
        self.running.append(sequence)
        return self._chunk(sequence, room)

    def _chunk(self, sequence: Sequence, room: list[int]) -> Chunk | None:
        """The next chunk of a sequence, with pages to hold it, as far as there is `room` on its data shard."""
        start, left = sequence.cached, len(sequence.prefill_tokens) - sequence.cached
        length = min(left, room[sequence.shard])
        table, held = self.tables[sequence.shard], sequence.held
        assert held is not None
        if length <= 0:
            return None
        table.leave_window(held, start)
        if not table.has(table.missing(held, start + length)):
            return None
        table.extend(held, start + length)
        # Known from now on: what follows in the same step is written before any row reads.
        table.know(held, sequence.prefill_tokens, start + length)
        room[sequence.shard] -= round_up(length, TILE)
        return Chunk(sequence, start, length)

    def _find(self, sequence: Sequence, shard: int) -> list[int]:
        """What of its tokens is there already; what of the prompt must be looked at is computed all the same."""
        root = self._root(sequence)
        return [root] if sequence.wants_prompt_logprobs else self.tables[shard].find(sequence.prefill_tokens, root)

    def _root(self, sequence: Sequence) -> int:
        """The root of its pages in the tree."""
        root = LONG if self.short_context is not None and len(sequence.prefill_tokens) > self.short_context else ROOT
        if not sequence.cache_salt:
            return root
        digest = hashlib.sha256(f"{root}{sequence.cache_salt}".encode(errors="surrogatepass")).digest()
        return LONG - 1 - int.from_bytes(digest)  # below all others, and another for another salt

    # Decoding

    def _decode(self, max_tokens: int) -> ScheduledStep:
        """A decode call for all that are ready, with pages for what it adds; who came last waits where they do not suffice."""
        while decoding := self.decoding:
            if any(s.grammar for s in decoding):  # the host says what may follow each token
                max_tokens = 1
            tokens = max_tokens if self.short_context is None else min(self._steps_left(s, max_tokens) for s in decoding)
            while tokens and not self._has_room(decoding, tokens):
                tokens //= 2
            if tokens:
                break
            self.preempt(max(reversed(self.running), key=lambda s: s.priority))
        if not decoding:
            return ScheduledStep()
        return self._extended(decoding, 0, tokens)

    def _extended(self, rows: list[Sequence], before: int, tokens: int) -> ScheduledStep:
        """The decode call of so many tokens a row, after `before` that another adds, with the pages that they take."""
        reach = 0
        for sequence in rows:
            assert sequence.held is not None
            length = self._length_after(sequence, before + tokens)
            reach = max(reach, length)
            if not sequence.held.reaches(length):
                self.tables[sequence.shard].extend(sequence.held, length)
        others = self.waiting or len(rows) < len(self.running)
        return ScheduledStep(
            decode=tuple(rows),
            max_tokens=tokens,
            reach=reach,
            until_stopped=-(-len(rows) // RETURN_AT) if others else None,
        )

    def _rows_of(self, sequences: Iterable[Sequence]) -> int:
        """Rows of their decode step on each data shard."""
        return self.shapes.rows_for(max(Counter(s.shard for s in sequences).values()))

    def _has_room(self, decoding: list[Sequence], tokens: int) -> bool:
        """Are there free pages on each data shard for so many more tokens a row?"""
        wanted = [[0] * len(table.pools) for table in self.tables]
        for sequence in decoding:
            held, length = sequence.held, self._length_after(sequence, tokens)
            if held is not None and not held.reaches(length):
                table = self.tables[sequence.shard]
                table.leave_window(held, sequence.cached)
                for group, n in enumerate(table.missing(held, length)):
                    wanted[sequence.shard][group] += n
        return all(table.has(n) for table, n in zip(self.tables, wanted, strict=True))

    def _length_after(self, sequence: Sequence, tokens: int) -> int:
        """Tokens in its pages after so many decode steps, of which it takes no more than remain."""
        return sequence.cached + min(tokens, sequence.remaining)

    def _steps_left(self, sequence: Sequence, most: int) -> int:
        """Tokens, at most `most`, it can gain with its cache: past longrope's short context all keys are rotated otherwise."""
        if self.short_context is None or len(sequence.prefill_tokens) > self.short_context:
            return most
        return min(max(self.short_context - sequence.cached, 0), most)

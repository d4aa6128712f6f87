"""The loop: sequences in, tokens out.

Each turn admits who waits, prefills up to a budget of prompt tokens, and lets every ready row decode several tokens in one call.
The host decides from plain lists; what goes to the device is rebuilt from them each call, and only the cache stays there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxllm.buckets import MAX_CHUNK, STOP_ID_WIDTH, chunk_bucket, power_of_two
from jaxllm.decoder import kv_cache as kv
from jaxllm.decoder.batch import TokenBatch
from jaxllm.execution.batch import DecodeBatch, LogitsPenalties, Logprobs, Sampled, SamplingBatch, SamplingFilters
from jaxllm.execution.cache_shapes import CacheLadder
from jaxllm.execution.steps import MAX_STEPS, Steps
from jaxllm.generation.scheduler import Scheduler, Sequence
from jaxllm.requests.outputs import Logprob
from jaxllm.requests.sampling_params import MAX_LOGPROBS

PREFILL_BUDGET = 2048  # prompt tokens a turn, while other rows wait to decode


class Engine:
    """Continuous batching over a dense cache of one model."""

    def __init__(
        self,
        steps: Steps,
        params: list[jax.Array],
        *,
        max_model_len: int,
        max_num_seqs: int,
        on_program: Callable[[str], None] = lambda name: None,
    ):
        """`on_program` is called with a program's name before its first use, which may compile it."""
        self.steps, self.params = steps, params
        self.config, self.layout = steps.config, steps.layout
        self.ladder = CacheLadder.of(self.layout, max_num_seqs, max_model_len)
        self.max_length = self.ladder.max_length
        self.scheduler = Scheduler(max_num_seqs)
        self.cache: kv.Cache = []
        self.cache_dtype = kv.cache_dtype(steps.dtype, self.layout.platform)
        self.rows = self.length = 0  # 0: nothing is in it
        self.made = (0, 0)  # rows and positions of its arrays
        self.on_program = on_program
        self.programs: set[tuple[Any, ...]] = set()

    def turn(self, max_steps: int = MAX_STEPS) -> list[Sequence]:
        """One turn of the loop, at most `max_steps` tokens a row in its decode call; 0 only prefills.

        Returns the sequences that gained tokens or ended.
        """
        scheduler = self.scheduler
        done = scheduler.release_finished()  # ended by the caller since the last turn
        if not scheduler.running:
            self.rows = self.length = 0  # the next burst sizes the cache anew
        scheduler.admit()
        changed = self._prefill_some()
        for sequence in scheduler.decoding:
            if not self._steps_as_read(sequence):
                sequence.read_anew()
        ready = scheduler.decoding
        if ready and max_steps:
            crowded = bool(scheduler.waiting or scheduler.prefilling)
            changed += self._decode(ready, max_steps, until_any=crowded)
        scheduler.release_finished()
        return list({s.id: s for s in done + changed}.values())

    def drop_cancelled(self) -> None:
        """Free the slots of cancelled sequences now. Called too when a step was interrupted: where that lost the cache, every
        sequence that had tokens in it is cancelled.
        """
        if self._cache_is_lost():
            self.rows = self.length = 0
            self.cache = []
            for sequence in self.scheduler.running.values():
                if sequence.cached:
                    self.scheduler.cancel(sequence.id)
        self.scheduler.release_finished()

    def _cache_is_lost(self) -> bool:
        arrays = [array for layer in self.cache for array in layer]
        whole = len(self.cache) == self.config.num_layers and not any(array.is_deleted() for array in arrays)
        return not whole or self.made != (self.rows, self.length)

    # Prefill

    def _prefill_some(self) -> list[Sequence]:
        budget = PREFILL_BUDGET
        changed: list[Sequence] = []
        while budget > 0 and self.scheduler.prefilling:
            group = self._group(self.scheduler.prefilling)
            budget -= sum(len(self._chunk(s)) for s in group)
            changed += self._prefill(group)
            if not self.scheduler.decoding:
                budget = PREFILL_BUDGET  # nobody waits
        return changed

    def _chunk(self, sequence: Sequence) -> list[int]:
        return sequence.beginning[sequence.cached : sequence.cached + MAX_CHUNK]

    def _group(self, pending: list[Sequence]) -> list[Sequence]:
        """The oldest sequence and, on other parts of the data axis, others whose chunk runs in the same program."""
        size = chunk_bucket(len(self._chunk(pending[0])))
        group: dict[int, Sequence] = {}
        for sequence in pending:
            if chunk_bucket(len(self._chunk(sequence))) == size:
                group.setdefault(self._part(sequence), sequence)
        return list(group.values())

    def _prefill(self, group: list[Sequence]) -> list[Sequence]:
        """One chunk of each sequence of the group; the last chunk of a prompt yields its first token."""
        data = self.layout.data
        size = chunk_bucket(len(self._chunk(group[0])))
        self._fit_cache(max(s.cached for s in group) + size)
        tokens = np.zeros((data, size), np.int32)
        lengths, slots, last = np.zeros((3, data), np.int32)
        start = np.full(
            data, max(s.cached for s in group), np.int32
        )  # of parts that have no row, the farthest: blocks before are skipped
        valid = np.zeros(data, bool)
        by_part: list[Sequence | None] = [None] * data
        for sequence in group:
            i, chunk = self._part(sequence), self._chunk(sequence)
            by_part[i] = sequence
            tokens[i, : len(chunk)] = chunk
            start[i], lengths[i], last[i] = sequence.cached, len(sequence.beginning), len(chunk) - 1
            slots[i], valid[i] = self._row(sequence) % (self.rows // data), True
        batch = TokenBatch(tokens, start, lengths, slots, None if data == 1 else valid)
        args = self._put((batch, last, self._sampling(by_part)))
        self._announce(f"prefill of {size} tokens", args, _top(group))
        self.cache, sampled = self.steps.prefill(self.params, self.cache, *args, top_logprobs=_top(group))
        for sequence in group:
            sequence.cached += len(self._chunk(sequence))
        finished = [s for s in group if not s.prefilling]
        if finished:
            host = jax.device_get(sampled)
            for sequence in finished:
                _append(sequence, host, (self._part(sequence),))
        return finished

    # Decode

    def _decode(self, ready: list[Sequence], max_steps: int, until_any: bool) -> list[Sequence]:
        running = self.scheduler.running.values()
        deepest = max(s.cached for s in running)
        self._fit_cache(min(deepest + min(max_steps, MAX_STEPS), self.max_length))
        limit = min(max_steps, MAX_STEPS, self.length - deepest, *(self._steps_as_read(s) for s in ready))
        by_row: list[Sequence | None] = [None] * self.rows
        tokens, position, remaining = np.zeros((3, self.rows), np.int32)
        for sequence in running:
            # A row in the middle of its prompt is carried along: what it writes is overwritten by its next chunk.
            position[self._row(sequence)] = sequence.cached
        for sequence in ready:
            row = self._row(sequence)
            by_row[row] = sequence
            tokens[row], remaining[row] = sequence.tokens[-1], sequence.remaining
        live = np.array([s is not None for s in by_row])
        sampling = self._sampling(by_row)
        batch = DecodeBatch(tokens, position, live, remaining, sampling, np.int32(limit), np.bool_(until_any))
        batch = self._put(batch)
        self._announce(f"decode of {self.rows} rows", batch, _top(ready))
        self.cache, sampled, steps = self.steps.decode(self.params, self.cache, batch, top_logprobs=_top(ready))
        host, taken = jax.device_get((sampled, steps))
        for sequence in ready:
            for step in range(int(taken)):
                if sequence.finish_reason is None:
                    sequence.cached += 1
                    _append(sequence, host, (step, self._row(sequence)))
        return ready

    def _steps_as_read(self, sequence: Sequence) -> int:
        """Tokens that it can gain with the keys it has in the cache: past longrope's short context all are turned otherwise."""
        short = self.config.short_context
        if short is None or len(sequence.beginning) > short:
            return MAX_STEPS
        return max(short - sequence.cached, 0)

    # What the device is given

    def _announce(self, name: str, args: Any, top_logprobs: int | None) -> None:
        shapes = tuple(x.shape for x in jax.tree.leaves(args))
        key = (name, self.rows, self.length, jax.tree.structure(args), shapes, top_logprobs)
        if key not in self.programs:
            self.programs.add(key)
            self.on_program(f"{name}, {self.length} positions")

    def _part(self, sequence: Sequence) -> int:
        """The part of the data axis that holds the sequence's slot: slots are dealt out in turn."""
        assert sequence.slot is not None
        return sequence.slot % self.layout.data

    def _row(self, sequence: Sequence) -> int:
        """The sequence's row of the whole cache."""
        assert sequence.slot is not None
        data = self.layout.data
        return sequence.slot % data * (self.rows // data) + sequence.slot // data

    def _fit_cache(self, length: int) -> None:
        """Give the cache enough rows for every slot in use and at least `length` positions."""
        slots = max(self.scheduler.running) + 1
        if self.rows == 0:
            shape = self.ladder.shape(slots, length)
            if not self.cache or shape != self.made:
                self.cache = []  # freed before the next one is made
                self.cache = kv.init(self.config, self.layout, *shape, self.cache_dtype)
            self.rows, self.length = self.made = shape
        for shape in self.ladder.climb((self.rows, self.length), slots, length):
            shapes = kv.abstract(self.config, self.layout, *shape, self.cache_dtype)
            self.made = (0, 0)  # neither as before nor as it will be
            self.cache = kv.resize(self.cache, self.layout, shapes)
            self.rows, self.length = self.made = shape

    def _sampling(self, sequences: list[Sequence | None]) -> SamplingBatch:
        def column(of: Callable[[Sequence], Any], empty: Any, dtype: Any) -> np.ndarray:
            return np.array([empty if s is None else of(s) for s in sequences], dtype)

        here = [s for s in sequences if s is not None]
        width = max(STOP_ID_WIDTH, power_of_two(max(len(s.stop_ids) for s in here)))
        stop_ids = np.full((len(sequences), width), -1, np.int32)
        for i, s in enumerate(sequences):
            if s is not None:
                stop_ids[i, : len(s.stop_ids)] = s.stop_ids
        filters = penalties = None
        if any(s.params.temperature > 0 for s in here):
            filters = SamplingFilters(
                temperature=column(lambda s: s.params.temperature, 0, np.float32),
                seed=column(lambda s: s.seed, 0, np.uint32),
                top_k=column(lambda s: max(s.params.top_k, 0), 0, np.int32),
                top_p=column(lambda s: s.params.top_p, 1, np.float32),
                min_p=column(lambda s: s.params.min_p, 0, np.float32),
            )
        if any(_controlled(s) for s in here):
            penalties = LogitsPenalties(
                min_tokens=column(lambda s: s.params.min_tokens, 0, np.int32),
                penalty=column(lambda s: s.params.repetition_penalty, 1, np.float32),
                seen=np.zeros((len(sequences), self.config.vocab_size), bool),
                bias=np.zeros((len(sequences), self.config.vocab_size), np.float32),
            )
            for i, s in enumerate(sequences):
                if s is not None:
                    _fill(penalties, i, s)
        return SamplingBatch(column(lambda s: len(s.tokens), 0, np.int32), stop_ids, filters, penalties)

    def _put(self, tree: Any) -> Any:
        """Host arrays onto the devices, rows split over the data axis."""
        rows, whole = self.layout.sharding(("rows",)), self.layout.sharding(())
        return jax.device_put(tree, jax.tree.map(lambda x: rows if np.ndim(x) else whole, tree))


def _top(sequences: list[Sequence]) -> int | None:
    """How many alternatives the program reports: none at all, or as many as anyone may ask for."""
    return None if all(s.params.logprobs is None for s in sequences) else MAX_LOGPROBS


def _controlled(sequence: Sequence) -> bool:
    p = sequence.params
    return p.min_tokens > 0 or p.repetition_penalty != 1 or bool(p.logit_bias)


def _fill(penalties: LogitsPenalties, row: int, sequence: Sequence) -> None:
    penalties.seen[row, sequence.prompt + sequence.tokens] = True
    for token, bias in (sequence.params.logit_bias or {}).items():
        penalties.bias[row, token] = bias


def _append(sequence: Sequence, sampled: Sampled, at: tuple[int, ...]) -> None:
    """Give a sequence the token, and the log-probabilities it asked for, found at `at`."""
    token = int(sampled.token[at])
    wanted = sequence.params.logprobs
    sequence.append(token, None if wanted is None else _choices(sampled.logprobs, at, token, wanted))


def _choices(logprobs: Logprobs | None, at: tuple[int, ...], token: int, wanted: int) -> dict[int, Logprob]:
    assert logprobs is not None
    choices = {token: Logprob(float(logprobs.chosen[at]), int(logprobs.rank[at]))}
    for i in range(wanted):
        choices.setdefault(int(logprobs.top_ids[at][i]), Logprob(float(logprobs.top[at][i]), i + 1))
    return choices

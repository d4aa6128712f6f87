"""The loop: sequences in, tokens out.

The scheduler says what the next step holds, here it runs: from plain lists to arrays, to the devices, and back. What goes to the
devices is made anew for each step; only the cache stays there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxllm.buckets import chunk_bucket
from jaxllm.decoder import kv_cache as kv
from jaxllm.execution.batch import ALL_LOGPROBS, Logprobs, Sampled, batch_shardings
from jaxllm.execution.cache_shapes import CacheLadder
from jaxllm.execution.steps import MAX_STEPS, Steps
from jaxllm.generation.inputs import cache_row, decode_inputs, prefill_inputs
from jaxllm.generation.scheduler import Chunk, ScheduledStep, Scheduler
from jaxllm.generation.sequence import Sequence
from jaxllm.requests.outputs import Logprob
from jaxllm.requests.sampling_params import MAX_LOGPROBS
from sharding.mesh import to_devices, to_host


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
        self.scheduler = Scheduler(max_num_seqs, self.layout.data, self.config.short_context)
        self.cache: kv.Cache = []
        self.rows = self.length = 0  # 0: nothing is in it
        self.made = (0, 0)  # rows and positions of its arrays
        self.on_program = on_program
        self.programs: set[tuple[Any, ...]] = set()

    def step(self, max_tokens: int = MAX_STEPS) -> None:
        """Run one step: a chunk of prompts, or a decode call of at most `max_tokens` tokens a row; 0 only prefills."""
        self.scheduler.release_finished()  # those that their callers ended
        if not self.scheduler.running:
            self.rows = self.length = 0  # the next burst sizes the cache anew
        step = self.scheduler.schedule(min(max_tokens, MAX_STEPS))
        if step.prefill:
            self._prefill(step.prefill)
        elif step.decode:
            self._decode(step)
        self.scheduler.release_finished()

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

    def _prefill(self, chunks: tuple[Chunk, ...]) -> None:
        """The last chunk of a prompt yields its first token."""
        size = chunk_bucket(chunks[0].length)
        self._fit_cache(max(chunk.start for chunk in chunks) + size)
        top_logprobs = _top_logprobs([chunk.sequence for chunk in chunks])
        args = self._to_devices(prefill_inputs(chunks, self.layout.data, self.config.vocab_size))
        self._announce(f"prefill of {size} tokens", args, top_logprobs)
        self.cache, sampled = self.steps.prefill(self.params, self.cache, *args, top_logprobs=top_logprobs)
        last = [chunk.sequence for chunk in chunks if chunk.is_last]
        for chunk in chunks:
            chunk.sequence.cached += chunk.length
        if last:
            host = to_host(sampled)
            for sequence in last:
                self._append(sequence, host, (self.scheduler.data_shard(sequence),))

    def _decode(self, step: ScheduledStep) -> None:
        running = list(self.scheduler.running.values())
        deepest = max(sequence.cached for sequence in running)
        self._fit_cache(min(deepest + step.max_tokens, self.max_length))
        step = replace(step, max_tokens=min(step.max_tokens, self.length - deepest))
        top_logprobs = _top_logprobs(step.decode)
        batch = self._to_devices(decode_inputs(step, running, self.rows, self.layout.data, self.config.vocab_size))
        self._announce(f"decode of {self.rows} rows", batch, top_logprobs)
        self.cache, sampled, taken = self.steps.decode(self.params, self.cache, batch, top_logprobs=top_logprobs)
        host, steps = to_host((sampled, taken))
        for sequence in step.decode:
            assert sequence.slot is not None
            row = cache_row(sequence.slot, self.rows, self.layout.data)
            for at in range(int(steps)):
                if sequence.finish_reason is None:
                    sequence.cached += 1
                    self._append(sequence, host, (at, row))

    def _append(self, sequence: Sequence, sampled: Sampled, at: tuple[int, ...]) -> None:
        """Give a sequence the token, and the log-probabilities it asked for, found at `at`."""
        token, wanted = int(sampled.token[at]), sequence.params.logprobs
        self.scheduler.append(sequence, token, None if wanted is None else _choices(sampled.logprobs, at, token, wanted))

    def _to_devices(self, batch: Any) -> Any:
        return to_devices(batch, batch_shardings(self.layout, batch))

    def _announce(self, name: str, args: Any, top_logprobs: int | None) -> None:
        shapes = tuple(x.shape for x in jax.tree.leaves(args))
        key = (name, self.rows, self.length, jax.tree.structure(args), shapes, top_logprobs)
        if key not in self.programs:
            self.programs.add(key)
            self.on_program(f"{name}, {self.length} positions")

    def _fit_cache(self, length: int) -> None:
        """Give the cache enough rows for every slot in use and at least `length` positions."""
        slots = max(self.scheduler.running) + 1
        if self.rows == 0:
            shape = self.ladder.shape(slots, length)
            if not self.cache or shape != self.made:
                self.cache = []  # freed before the next one is made
                self.cache = kv.init(self.steps.cache_specs, self.layout, *shape)
            self.rows, self.length = self.made = shape
        for shape in self.ladder.climb((self.rows, self.length), slots, length):
            shapes = kv.abstract(self.steps.cache_specs, self.layout, *shape)
            self.made = (0, 0)  # neither as before nor as it will be
            self.cache = kv.resize(self.cache, self.layout, shapes)
            self.rows, self.length = self.made = shape


def _top_logprobs(sequences: Collection[Sequence]) -> int | None:
    """How many alternatives the program reports: none at all, as many as most may ask for, or ALL_LOGPROBS."""
    wanted = [s.params.logprobs for s in sequences if s.params.logprobs is not None]
    if not wanted:
        return None
    return ALL_LOGPROBS if ALL_LOGPROBS in wanted else MAX_LOGPROBS


def _choices(logprobs: Logprobs | None, at: tuple[int, ...], token: int, wanted: int) -> dict[int, Logprob]:
    """The chosen token and the `wanted` likeliest, or all of them."""
    assert logprobs is not None
    ids, values = logprobs.top_ids[at], logprobs.top[at]
    if not len(ids):  # in the vocabulary's order
        ids = np.argsort(-values, kind="stable")
        values = values[ids]
    count = len(ids) if wanted == ALL_LOGPROBS else wanted
    choices = {token: Logprob(float(logprobs.chosen[at]), int(logprobs.rank[at]))}
    for i, (other, value) in enumerate(zip(ids[:count].tolist(), values[:count].tolist(), strict=True)):
        choices.setdefault(other, Logprob(value, i + 1))
    return choices

"""The loop: sequences in, tokens out.

The scheduler says what the next step holds, here it runs: from plain lists to arrays, to the devices, and back. What goes to the
devices is made anew for each step; only the cache stays there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np

from jaxllm.buckets import MAX_STEP_TOKENS
from jaxllm.decoder import kv_cache as kv
from jaxllm.decoder.cache_spec import Pool
from jaxllm.execution.batch import ALL_LOGPROBS, Logprobs, Sampled, batch_shardings
from jaxllm.execution.step_shapes import StepShapes
from jaxllm.execution.steps import MAX_STEPS, Steps
from jaxllm.generation.inputs import decode_inputs, prefill_inputs
from jaxllm.generation.pages import PageTable
from jaxllm.generation.scheduler import Chunk, ScheduledStep, Scheduler
from jaxllm.generation.sequence import Sequence
from jaxllm.requests.outputs import Logprob
from jaxllm.requests.sampling_params import MAX_LOGPROBS
from sharding.mesh import to_devices, to_host


class Engine:
    """Continuous batching over the pages of one model's cache."""

    def __init__(
        self,
        steps: Steps,
        params: list[jax.Array],
        *,
        pool: Pool,
        max_num_seqs: int,
        max_num_batched_tokens: int = MAX_STEP_TOKENS,
        enable_prefix_caching: bool = True,
        on_program: Callable[[str], None] = lambda name: None,
    ):
        """`on_program` is called with a program's name before its first use, which may compile it."""
        self.steps, self.params, self.pool = steps, params, pool
        self.config, self.layout = steps.config, steps.layout
        rows = -(-max_num_seqs // self.layout.data)
        self.shapes = StepShapes.of(self.layout.platform, pool.max_model_len, rows, max_num_batched_tokens)
        sharing = enable_prefix_caching and not self.config.keys_depend_on_length
        tables = [PageTable(pool.pages, sharing=sharing) for _ in range(self.layout.data)]
        self.scheduler = Scheduler(max_num_seqs, tables, self.shapes, self.config.short_context)
        self.cache: kv.Cache = []
        self.on_program = on_program
        self.programs: set[tuple[Any, ...]] = set()

    def step(self, max_tokens: int = MAX_STEPS) -> None:
        """Run one step: chunks of prompts, or a decode call of at most `max_tokens` tokens a row; 0 only prefills."""
        step = self.scheduler.schedule(min(max_tokens, MAX_STEPS))
        try:
            if step.prefill:
                self._prefill(step.prefill)
            elif step.decode:
                self._decode(step)
        except BaseException:
            self.scheduler.undo(step)
            raise
        self.scheduler.release_finished()

    def drop_cancelled(self) -> None:
        """Free the pages of cancelled sequences now. Called too when a step was interrupted: where that lost the cache, every
        sequence that had tokens in it is cancelled.
        """
        lost = self._cache_is_lost()
        if lost:
            self.cache = []
            for sequence in self.scheduler.running:
                if sequence.cached:
                    self.scheduler.cancel(sequence.id)
        self.scheduler.release_finished()
        if lost:
            self.scheduler.forget_pages()

    def _cache_is_lost(self) -> bool:
        arrays = [array for layer in self.cache for array in layer]
        return len(self.cache) != self.config.num_layers or any(array.is_deleted() for array in arrays)

    def _prefill(self, chunks: tuple[Chunk, ...]) -> None:
        """The last chunk of a prompt yields its first token."""
        placed = prefill_inputs(chunks, self.layout, self.shapes, len(self.pool.pages), self.config.vocab_size)
        top_logprobs = _top_logprobs([chunk.sequence for chunk in chunks])
        batch, args = placed.batch[0], self._to_devices(placed.batch)
        self._announce(f"prefill of {batch.tokens.size // self.layout.data} tokens", args, top_logprobs)
        self.cache, sampled = self.steps.prefill(self.params, self._cache(), *args, top_logprobs=top_logprobs)
        host = to_host(sampled) if placed.rows else None
        for chunk in chunks:
            chunk.sequence.cached += chunk.length
        for sequence, row in placed.rows:
            assert host is not None
            self._append(sequence, host, (row,))

    def _decode(self, step: ScheduledStep) -> None:
        placed = decode_inputs(step, self.layout, self.shapes, len(self.pool.pages), self.config.vocab_size)
        top_logprobs, batch = _top_logprobs(step.decode), self._to_devices(placed.batch)
        self._announce(f"decode of {len(placed.batch.tokens)} rows", batch, top_logprobs)
        self.cache, sampled, taken = self.steps.decode(self.params, self._cache(), batch, top_logprobs=top_logprobs)
        host, steps = to_host((sampled, taken))
        for sequence, row in placed.rows:
            for at in range(int(steps)):
                if sequence.finish_reason is None:
                    sequence.cached += 1
                    self._append(sequence, host, (at, row))

    def _cache(self) -> kv.Cache:
        """The cache, which is made before its first use."""
        return self.cache or kv.init(self.steps.cache_specs, self.layout, self.pool.pages)

    def _append(self, sequence: Sequence, sampled: Sampled, at: tuple[int, ...]) -> None:
        """Give a sequence the token, and the log-probabilities it asked for, found at `at`."""
        token, wanted = int(sampled.token[at]), sequence.params.logprobs
        self.scheduler.append(sequence, token, None if wanted is None else _choices(sampled.logprobs, at, token, wanted))

    def _to_devices(self, batch: Any) -> Any:
        return to_devices(batch, batch_shardings(self.layout, batch))

    def _announce(self, name: str, args: Any, top_logprobs: int | None) -> None:
        shapes = tuple(x.shape for x in jax.tree.leaves(args))
        key = (name, jax.tree.structure(args), shapes, top_logprobs)
        if key not in self.programs:
            self.programs.add(key)
            self.on_program(name)


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

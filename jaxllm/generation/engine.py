"""The loop: sequences in, tokens out.

The scheduler says what the next step holds, here it runs: from plain lists to arrays, to the devices, and back. A step is started
and finished apart, so that the next can be queued between: a decode call of the same rows takes up their state on the device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.buckets import MAX_LOGPROBS, MAX_STEP_TOKENS, PAGE, TILE
from jaxllm.decoder.cache_spec import Pool
from jaxllm.execution.batch import ALL_LOGPROBS, Logprobs, Sampled
from jaxllm.execution.runner import Runner, Tell, to_nobody
from jaxllm.execution.step_shapes import StepShapes
from jaxllm.execution.steps import MAX_STEPS, Steps
from jaxllm.generation.inputs import Placed, decode_inputs, expected_decode, further_inputs, prefill_inputs
from jaxllm.generation.pages import PageTable
from jaxllm.generation.scheduler import Chunk, ScheduledStep, Scheduler
from jaxllm.generation.sequence import Sequence
from jaxllm.requests.outputs import Logprob
from sharding.mesh import to_host

FEWEST_STEPS = 4  # of a decode call
CALL_SECONDS = 0.25  # of a decode call, and so about the wait of a request that comes meanwhile


class InFlight(NamedTuple):
    """A step that was given to the devices, and what they will have made of it.

    Attributes:
      placed: what the step was given, the cache and parameters apart; whose row is which.
      sampled: of a prefill step [S], or of a decode call [steps, R].
      taken: the steps of a decode call.
      started: when it was given to them, by `time.perf_counter`.
    """

    step: ScheduledStep
    placed: Placed
    sampled: Sampled
    taken: jax.Array | None = None
    started: float = 0.0


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
        batch_invariant: bool = False,
        on_program: Callable[[str], None] = lambda name: None,
        tell: Tell = to_nobody,
    ):
        """`on_program`, `tell`: see `Runner`."""
        self.steps, self.pool = steps, pool
        self.config, self.layout = steps.config, steps.layout
        rows = -(-max_num_seqs // self.layout.data)
        self.shapes = StepShapes.of(
            self.layout.platform,
            pool.max_model_len,
            rows,
            max_num_batched_tokens,
            attention=steps.attention,
            batch_invariant=batch_invariant,
        )
        sharing = enable_prefix_caching and not self.config.keys_depend_on_length
        tables = [PageTable(pool.pages, sharing=sharing) for _ in range(self.layout.data)]
        context = self.config.short_context
        self.scheduler = Scheduler(max_num_seqs, tables, self.shapes, context, batch_invariant=batch_invariant)
        self.flying: deque[InFlight] = deque()
        self.current = ScheduledStep()
        self._seconds_per_step = self._finished_at = self._waited = 0.0
        self.runner = Runner(steps, params, pool, on_program, tell)

    @property
    def busy(self) -> bool:
        return self.scheduler.busy or bool(self.flying)

    def step(self, max_tokens: int = MAX_STEPS, *, ahead: bool = True) -> None:
        """Wait for one step: chunks of prompts, or a decode call of at most `max_tokens` tokens a row; 0 only prefills.

        A call has no more tokens than it can do in CALL_SECONDS. Afterwards `current` is the step that was run, an empty one if
        there was nothing. If this raises, it is the step that failed, and all sequences that run will be computed again.

        `ahead`: what may follow the step is queued first.
        """
        self.current = ScheduledStep()
        max_tokens, began, waited = min(max_tokens, self._steps_of_a_call()), time.perf_counter(), self._waited
        try:
            if not self.flying:
                self._start(self.scheduler.schedule(max_tokens))
            if ahead and len(self.flying) == 1:
                more = self.scheduler.schedule_ahead(self.flying[0].step, max_tokens)
                if more is not None and self._fits_behind(more, self.flying[0]):
                    self._start(more)
            if self.flying:
                self.current = self.flying[0].step
                self._finish(self.flying[0])
                self.flying.popleft()
        except BaseException:
            self.flying.clear()
            self.runner.forget()
            self.scheduler.lose_pages()
            raise
        finally:
            if not self.flying:
                self.runner.rest()
            self.scheduler.release_finished()
            statistics = self.scheduler.statistics
            statistics.steps += 1
            statistics.host_seconds += time.perf_counter() - began - (self._waited - waited)

    def replace_params(self, params: list[jax.Array]) -> None:
        """Go on with other parameters, to which nothing that was computed before is of use but the tokens that came of it."""
        self.flying.clear()  # what it would have said comes of the new ones
        self.scheduler.lose_pages(keep_tokens=True)
        self.runner.params = params

    def _fits_behind(self, step: ScheduledStep, before: InFlight) -> bool:
        """Lists of tokens on the device have room for as many as their program reaches, and no more."""
        listed = before.placed.batch.rows.listed if step.decode else None
        return listed is None or listed.shape[1] == PAGE * self.shapes.width_for(step.reach)

    def _steps_of_a_call(self) -> int:
        """Tokens a row in the next decode call: few before it is known how long one takes."""
        if not self._seconds_per_step:
            return FEWEST_STEPS
        return min(max(int(CALL_SECONDS / self._seconds_per_step), FEWEST_STEPS), MAX_STEPS)

    def _start(self, step: ScheduledStep) -> None:
        """Give a step, if there is anything in it, to the devices, without waiting for them."""
        self.current = step
        if step.prefill:
            self.flying.append(self._start_prefill(step))
        elif step.decode:
            self.flying.append(self._start_decode(step, self.flying[0] if self.flying else None))

    def _finish(self, flying: InFlight) -> None:
        """Wait for a step, and give its sequences their tokens."""
        if not (flying.placed.rows or flying.sampled.prompt):
            return
        before = time.perf_counter()
        sampled, taken = to_host((flying.sampled, flying.taken))
        now = time.perf_counter()
        self._waited += now - before
        if taken is not None and taken:
            self._seconds_per_step = (now - max(self._finished_at, flying.started)) / int(taken)
        self._finished_at = now
        if sampled.prompt is not None:
            for chunk, tile in flying.placed.tiles:
                _take_of_prompt(chunk, sampled.prompt, tile * TILE)
        for sequence, row in flying.placed.rows:
            if taken is None:
                self._take(sequence, sampled, (row,))
            else:
                for at in range(int(taken)):
                    if sequence.finish_reason is None:
                        sequence.cached += 1
                        self._take(sequence, sampled, (at, row))

    def _start_prefill(self, step: ScheduledStep) -> InFlight:
        """The last chunk of a prompt yields its first token."""
        self._expect_decode()
        placed = prefill_inputs(step.prefill, self.layout, self.shapes, len(self.pool.pages))
        sampled = self.runner.prefill(placed.batch, _top_logprobs([chunk.sequence for chunk in step.prefill]))
        for chunk in step.prefill:
            chunk.sequence.cached += chunk.length
        return InFlight(step, placed, sampled, None, time.perf_counter())

    def _start_decode(self, step: ScheduledStep, after: InFlight | None) -> InFlight:
        top = _top_logprobs(step.decode)
        if after is None:
            placed = decode_inputs(step, self.layout, self.shapes, len(self.pool.pages))
            sampled, taken = self.runner.decode(placed.batch, top)
        else:
            batch = further_inputs(step, after.placed, self.shapes)
            placed = after.placed._replace(batch=batch)
            sampled, taken = self.runner.decode_on(batch.pages, batch.limit, batch.until_stopped, top)
        return InFlight(step, placed, sampled, taken, time.perf_counter())

    def _expect_decode(self) -> None:
        """Have the program ready, by when they are prefilled, that those who are here will decode with."""
        sequences = [*self.scheduler.running, *self.scheduler.waiting][: self.scheduler.max_num_seqs]
        if any(s.remaining > 1 for s in sequences):
            batch = expected_decode(sequences, self.layout, self.shapes, len(self.pool.pages), MAX_STEPS)
            self.runner.expect_decode(batch, _top_logprobs(sequences))

    def _take(self, sequence: Sequence, sampled: Sampled, at: tuple[int, ...]) -> None:
        """Give a sequence, unless it has ended, the token found at `at`, and the log-probabilities it asked for."""
        if sequence.finish_reason is not None:
            return
        token, wanted = int(sampled.token[at]), sequence.params.logprobs
        self.scheduler.append(sequence, token, None if wanted is None else _choices(sampled.logprobs, at, token, wanted))


def _top_logprobs(sequences: Collection[Sequence]) -> int | None:
    """How many alternatives the program reports: none at all, as many as most may ask for, or ALL_LOGPROBS."""
    wanted = [s.params.logprobs for s in sequences if s.params.logprobs is not None]
    if not wanted:
        return None
    return ALL_LOGPROBS if ALL_LOGPROBS in wanted else MAX_LOGPROBS


def _take_of_prompt(chunk: Chunk, logprobs: Logprobs, at: int) -> None:
    """Give a sequence the log-probabilities of its prompt's tokens that follow those of a chunk, which begins at token `at`."""
    sequence = chunk.sequence
    if sequence.prompt_logprobs is None or len(sequence.of_prompt) != chunk.start:
        return  # of a chunk that is computed again
    for i, token in enumerate(sequence.prompt[chunk.start + 1 : chunk.start + chunk.length + 1]):
        sequence.of_prompt.append(_choices(logprobs, (at + i,), token, sequence.prompt_logprobs))


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

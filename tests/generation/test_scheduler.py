"""Who runs, when, in which pages, and how a sequence ends."""

from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.workload import Lengths
from jaxllm.buckets import MAX_STEP_TOKENS, PAGE, TILE
from jaxllm.execution.step_shapes import StepShapes
from jaxllm.generation.pages import PageTable
from jaxllm.generation.scheduler import PREFILL_BUDGET, ScheduledStep, Scheduler
from jaxllm.generation.sequence import Sequence
from jaxllm.requests.outputs import Logprob
from jaxllm.requests.sampling_params import SamplingParams

pytestmark = pytest.mark.fast


def sequence(
    id: int = 0, *, prompt: int = 3, max_tokens: int = 4, stop_ids: tuple[int, ...] = (), min_tokens: int = 0, first: int = 0
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens)
    return Sequence(id, list(range(first, first + prompt)), params, max_tokens, stop_ids, seed=0)


def scheduler_of(most: int, data_shards: int = 1, short_context: int | None = None, pages: int = 1000) -> Scheduler:
    """`pages` on each data shard, the one that belongs to nobody included."""
    tables = [PageTable({None: pages}) for _ in range(data_shards)]
    return Scheduler(most, tables, StepShapes.of("cpu", 64 * 1000, -(-most // data_shards)), short_context)


def test_ends_at_its_limit() -> None:
    scheduler, s = scheduler_of(1), sequence(max_tokens=2)
    scheduler.append(s, 7, None)
    assert s.finish_reason is None and s.remaining == 1
    scheduler.append(s, 7, None)
    assert (s.finish_reason, s.stop_reason) == ("length", None)  # type: ignore[comparison-overlap]
    assert (s.tokens, s.logprobs) == ([7, 7], [])


def test_ends_at_a_stop_id_even_when_that_is_the_last_token() -> None:
    s = sequence(max_tokens=1, stop_ids=(5, 9))
    scheduler_of(1).append(s, 9, {9: Logprob(-1.0, 1)})
    assert (s.finish_reason, s.stop_reason, s.logprobs) == ("stop", 9, [{9: Logprob(-1.0, 1)}])


def test_no_stop_id_counts_before_min_tokens() -> None:
    s = sequence(max_tokens=9, stop_ids=(5,), min_tokens=2)
    for expected in (None, None, "stop"):
        scheduler_of(1).append(s, 5, None)
        assert s.finish_reason == expected


def test_who_comes_first_is_prefilled_first() -> None:
    scheduler = scheduler_of(2)
    many = [sequence(i) for i in range(4)]
    for s in many:
        scheduler.add(s)
    assert [chunk.sequence for chunk in scheduler.schedule(0).prefill] == many[:2]
    assert scheduler.running == many[:2] and list(scheduler.waiting) == many[2:]
    scheduler.finish(many[0], "length")
    assert scheduler.release_finished() == [many[0]] and many[0].held is None
    assert [chunk.sequence for chunk in scheduler.schedule(0).prefill] == [many[1], many[2]]
    assert list(scheduler.waiting) == [many[3]]


def test_who_is_more_urgent_comes_first_and_gives_back_last() -> None:
    scheduler = scheduler_of(2, pages=8)
    many = [sequence(i, prompt=2 * PAGE, max_tokens=2 * PAGE, first=1000 * i) for i in range(5)]
    for s, priority in zip(many, (0, 1, -1, 0, 1), strict=True):
        s.priority = priority
        scheduler.add(s)
    order = [many[i] for i in (2, 0, 3, 1, 4)]
    assert list(scheduler.waiting) == order
    while scheduler.busy:
        run(scheduler, 64)
        if len(scheduler.running) == 2:
            assert scheduler.running[0].priority <= scheduler.running[1].priority
    assert all(len(s.tokens) == 2 * PAGE for s in many) and scheduler.statistics.preempted
    urgent, patient = (sequence(i, prompt=2 * PAGE, first=1000 * i) for i in (5, 6))
    patient.priority = 1
    scheduler.add(patient)
    scheduler.schedule(0)
    scheduler.add(urgent)
    scheduler.preempt(patient)
    assert list(scheduler.waiting) == [urgent, patient]


def test_cancelling_the_waiting_the_running_and_the_ended() -> None:
    scheduler = scheduler_of(1)
    running, waiting, ended = sequence(0), sequence(1), sequence(2)
    for s in (ended, running, waiting):
        scheduler.add(s)
    scheduler.schedule(0)
    scheduler.finish(ended, "length")
    scheduler.schedule(0)
    for s in (running, waiting, ended):
        scheduler.cancel(s.id)
    assert [s.finish_reason for s in (running, waiting, ended)] == ["cancelled", "cancelled", "length"]
    # The running one holds its pages until the loop takes it out.
    ends = (scheduler.busy, scheduler.decoding, scheduler.release_finished(), scheduler.busy)
    assert ends == (True, [], [running], False)
    scheduler.check_integrity()


@pytest.mark.parametrize("shards", [1, 2])
@given(
    pages=st.integers(8, 30),
    most=st.integers(1, 5),
    actions=st.lists(st.sampled_from(["add", "step", "prefill", "end", "cancel", "fail"]), max_size=60),
    random=st.randoms(),
)
def test_every_page_is_accounted_for_and_nobody_is_forgotten(
    shards: int, pages: int, most: int, actions: list[str], random: Random
) -> None:
    """Whatever comes, ends, is cancelled, fails or runs out of pages; and at the end all have what they asked for."""
    scheduler = scheduler_of(most, shards, pages=pages)
    everyone: list[Sequence] = []
    longest = (pages - 1) * PAGE
    for action in [*actions, *["step"] * 2000]:
        if action == "add":
            prompt = random.choice([5, 63, 64, 65, 200, longest - 30])
            everyone.append(sequence(len(everyone), prompt=prompt, max_tokens=random.choice([1, 5, min(90, longest - prompt)])))
            everyone[-1].priority, everyone[-1].cache_salt = random.choice([0, 0, 1, -5]), random.choice(["", "", "a"])
            scheduler.add(everyone[-1])
        elif action == "step":
            run(scheduler, random.choice([1, 4, 64]), lambda: random.random() < 0.7)
        elif action == "prefill":
            run(scheduler, 0)
        elif action == "end" and scheduler.running:
            scheduler.finish(random.choice(scheduler.running), "stop")
        elif action == "cancel" and everyone:
            scheduler.cancel(random.choice(everyone).id)
        elif action == "fail":
            scheduler.schedule(4)
            scheduler.lose_pages()
        scheduler.check_integrity()
        assert len(scheduler.running) <= most
        assert all(s.finish_reason is None and s.held is None for s in scheduler.waiting)
        if not scheduler.busy and action == "step":
            break
    assert not scheduler.busy
    for s in everyone:
        assert s.finish_reason != "length" or len(s.tokens) == s.max_tokens
        assert s.finish_reason is not None and s.held is None


def test_sequences_hold_their_own_tokens_and_less_than_a_page_each() -> None:
    """So that four times as many of the lengths that users have run at once as with rows as long as the longest may be."""
    pages, longest = 160, 600
    prompts, answers = (lengths.draw(np.random.default_rng(0), 200) for lengths in (Lengths(83, 400), Lengths(61, 200)))
    scheduler, most = scheduler_of(256, pages=1 + pages), 0
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        scheduler.add(sequence(i, prompt=prompt, max_tokens=answer, first=1000 * i))
    while scheduler.busy:
        step = run(scheduler, 8)
        for s in scheduler.running:
            if s.held is not None and s in step.decode:
                assert len(s.held.pages[0]) * PAGE < s.cached + 8 + PAGE
        if not scheduler.statistics.preempted:
            most = max(most, len(scheduler.running))
    assert most >= 4 * (pages * PAGE // longest)


def test_a_decision_over_many_rows_takes_no_time() -> None:
    scheduler = scheduler_of(256, pages=256 * 20)
    for i in range(256):
        scheduler.add(sequence(i, prompt=300, max_tokens=700))
    while scheduler.waiting or any(s.prefilling for s in scheduler.running):
        run(scheduler, 0)
    assert len(scheduler.schedule(64).decode) == 256  # how long it takes: bench/throughput


# What a step holds


def run(scheduler: Scheduler, max_tokens: int = 4, ahead: Callable[[], bool] = lambda: False) -> ScheduledStep:
    """Schedule a step, and others while its results are not known if `ahead` says so, and do what the engine would do."""
    flying = [start(scheduler.schedule(max_tokens))]
    while ahead() and (step := scheduler.schedule_ahead(flying[-1], max_tokens)) is not None:
        flying.append(start(step))
        finish(scheduler, flying[-2])
        scheduler.check_integrity()
    finish(scheduler, flying[-1])
    return flying[0]


def start(step: ScheduledStep) -> ScheduledStep:
    for chunk in step.prefill:
        chunk.sequence.cached += chunk.length
    return step


def finish(scheduler: Scheduler, step: ScheduledStep) -> None:
    for chunk in step.prefill:
        if chunk.is_last and chunk.sequence.finish_reason is None:
            scheduler.append(chunk.sequence, 7, None)
    for s in step.decode:
        for _ in range(step.max_tokens):
            if s.finish_reason is None:
                s.cached += 1
                scheduler.append(s, 7, None)
                assert s.held is not None and s.cached <= PAGE * len(s.held.pages[0]), "a token has no page"


def chunks_of(step: ScheduledStep) -> list[tuple[int, int, int]]:
    return [(chunk.sequence.id, chunk.start, chunk.length) for chunk in step.prefill]


def test_a_long_prompt_is_prefilled_in_chunks_and_then_decodes() -> None:
    scheduler = scheduler_of(2)
    scheduler.add(sequence(0, prompt=MAX_STEP_TOKENS + 5, max_tokens=6))
    assert chunks_of(run(scheduler)) == [(0, 0, MAX_STEP_TOKENS)]
    assert chunks_of(run(scheduler)) == [(0, MAX_STEP_TOKENS, 5)]
    step = run(scheduler)
    assert ([s.id for s in step.decode], step.max_tokens, step.until_stopped) == ([0], 4, None)
    assert run(scheduler).decode and run(scheduler) == ScheduledStep()
    assert not scheduler.busy


def test_a_prefill_takes_many_prompts_on_each_data_shard() -> None:
    scheduler = scheduler_of(8, data_shards=2)
    for i, length in enumerate((20, 60, 30, 17, 25)):
        scheduler.add(sequence(i, prompt=length, first=100 * i))
    assert chunks_of(scheduler.schedule(0)) == [(0, 0, 20), (1, 0, 60), (2, 0, 30), (3, 0, 17), (4, 0, 25)]
    assert [s.shard for s in scheduler.running] == [0, 1, 0, 1, 0]


def test_chunks_fill_a_step_in_tiles() -> None:
    """What does not fit goes on in the next step, from the beginning of a tile."""
    scheduler = scheduler_of(8)
    for i, length in enumerate((1000, 100, 7)):
        scheduler.add(sequence(i, prompt=length, first=5000 * i))
    assert chunks_of(run(scheduler, 0)) == [(0, 0, 1000), (1, 0, TILE)]
    assert chunks_of(run(scheduler, 0)) == [(1, TILE, 100 - TILE), (2, 0, 7)]


def test_a_common_beginning_is_prefilled_once_even_in_one_step() -> None:
    scheduler = scheduler_of(8)
    for i in range(3):
        scheduler.add(sequence(i, prompt=2 * PAGE + 9))
    assert chunks_of(run(scheduler)) == [(0, 0, 2 * PAGE + 9), (1, 2 * PAGE, 9), (2, 2 * PAGE, 9)]
    scheduler.add(sequence(3, prompt=2 * PAGE))  # of all its tokens, the last page is computed again
    assert chunks_of(scheduler.schedule(0)) == [(3, PAGE, PAGE)]
    pages = [s.held.pages[0][:2] for s in scheduler.running if s.held]
    assert pages[0] == pages[1] == pages[2] and pages[0][0] == pages[3][0] and pages[0][1] != pages[3][1]


def test_no_beginning_is_common_to_two_salts() -> None:
    scheduler = scheduler_of(8)
    salts = ["", "a", "b", "a", "\ud800"]
    for i, salt in enumerate(salts):
        s = sequence(i, prompt=2 * PAGE + 9)
        s.cache_salt = salt
        scheduler.add(s)
    whole = 2 * PAGE + 9
    *first, (last, start, _) = chunks_of(run(scheduler))
    assert first == [(0, 0, whole), (1, 0, whole), (2, 0, whole), (3, 2 * PAGE, 9)] and (last, start) == (4, 0)
    scheduler.check_integrity()


def test_generated_tokens_may_be_a_beginning_too() -> None:
    scheduler = scheduler_of(8)
    first = sequence(0, prompt=PAGE - 4, max_tokens=PAGE + 9)
    scheduler.add(first)
    while scheduler.busy:
        run(scheduler, 64)
    follow = Sequence(1, first.prompt + first.tokens + [3], first.params, 5, (), seed=0)
    scheduler.add(follow)
    assert chunks_of(scheduler.schedule(0)) == [(1, 2 * PAGE, 6)] and follow.num_shared == 2 * PAGE


def test_who_came_last_gives_its_pages_back() -> None:
    """Two that need four pages each, of seven."""
    scheduler = scheduler_of(2, pages=8)
    first, last = (sequence(i, prompt=2 * PAGE, max_tokens=2 * PAGE, first=1000 * i) for i in range(2))
    scheduler.add(first)
    scheduler.add(last)
    lengths = []
    while first.finish_reason is None:
        run(scheduler, 64)
        lengths.append(len(last.tokens))
    assert last.held is None and last.num_recomputed == len(last.tokens) > 0
    assert list(scheduler.waiting) == [last]
    while scheduler.busy:
        run(scheduler, 64)
    assert len(last.tokens) == 2 * PAGE


def test_who_decodes_waits_for_no_more_than_a_budget_of_prompts() -> None:
    scheduler = scheduler_of(64)
    scheduler.add(sequence(0, max_tokens=1000))
    run(scheduler)
    for i in range(1, 12):
        scheduler.add(sequence(i, prompt=512, max_tokens=1, first=1000 * i))
    prefilled = 0
    while not (step := run(scheduler)).decode:
        prefilled += sum(chunk.length for chunk in step.prefill)
    assert prefilled == PREFILL_BUDGET and step.until_stopped == 1
    assert run(scheduler).prefill  # and again


def test_a_prompt_that_lacks_a_token_does_not_decode() -> None:
    """Where a step's last chunk ends one token before a prompt does."""
    scheduler = scheduler_of(64)
    scheduler.add(sequence(0, max_tokens=100))
    run(scheduler)
    for i, prompt in enumerate((PREFILL_BUDGET - 4 * TILE, 4 * TILE + 1), start=1):
        scheduler.add(sequence(i, prompt=prompt, first=10_000 * i))
    while not (step := run(scheduler)).decode:
        last = chunks_of(step)[-1]
    assert last == (2, 0, 4 * TILE) and [s.id for s in step.decode] == [0, 1]
    assert chunks_of(run(scheduler)) == [(2, 4 * TILE, 1)]


def test_without_a_row_that_decodes_prompts_have_no_budget() -> None:
    scheduler = scheduler_of(2)
    scheduler.add(sequence(0, prompt=2 * PREFILL_BUDGET))
    assert [bool(run(scheduler).prefill) for _ in range(5)] == [True] * 4 + [False]


def test_no_token_is_decoded_where_none_is_wanted() -> None:
    scheduler = scheduler_of(2)
    scheduler.add(sequence(0))
    assert run(scheduler, 0).prefill
    assert run(scheduler, 0) == ScheduledStep()


def test_past_the_short_context_a_sequence_is_prefilled_again() -> None:
    scheduler = scheduler_of(2, short_context=10)
    s = sequence(0, prompt=7, max_tokens=20)
    scheduler.add(s)
    run(scheduler)
    assert run(scheduler, 8).max_tokens == 3  # until ten of its tokens are in the cache
    assert (s.cached, len(s.tokens)) == (10, 4)
    assert chunks_of(run(scheduler, 8)) == [(0, 0, 11)] and s.num_recomputed == 4
    assert run(scheduler, 8).max_tokens == 8


def test_a_stop_string_takes_back_the_tokens_behind_it() -> None:
    scheduler, s = scheduler_of(1), sequence(max_tokens=9)
    scheduler.add(s)
    run(scheduler)
    run(scheduler)
    scheduler.finish(s, "stop", "end", keep=2)
    assert (s.tokens, s.finish_reason, s.stop_reason) == ([7, 7], "stop", "end")
    assert run(scheduler) == ScheduledStep() and not scheduler.busy

"""Who gets a slot, when, and how a sequence ends."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.buckets import MAX_CHUNK, chunk_bucket
from jaxllm.generation.scheduler import PREFILL_BUDGET, ScheduledStep, Scheduler
from jaxllm.generation.sequence import Sequence
from jaxllm.requests.outputs import Logprob
from jaxllm.requests.sampling_params import SamplingParams

pytestmark = pytest.mark.fast


def sequence(
    id: int = 0, *, prompt: int = 3, max_tokens: int = 4, stop_ids: tuple[int, ...] = (), min_tokens: int = 0
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens)
    return Sequence(id, list(range(prompt)), params, max_tokens, stop_ids, seed=0)


def test_ends_at_its_limit() -> None:
    scheduler, s = Scheduler(1), sequence(max_tokens=2)
    scheduler.append(s, 7, None)
    assert s.finish_reason is None and s.remaining == 1
    scheduler.append(s, 7, None)
    assert (s.finish_reason, s.stop_reason) == ("length", None)  # type: ignore[comparison-overlap]
    assert (s.tokens, s.logprobs) == ([7, 7], [])


def test_ends_at_a_stop_id_even_when_that_is_the_last_token() -> None:
    s = sequence(max_tokens=1, stop_ids=(5, 9))
    Scheduler(1).append(s, 9, {9: Logprob(-1.0, 1)})
    assert (s.finish_reason, s.stop_reason, s.logprobs) == ("stop", 9, [{9: Logprob(-1.0, 1)}])


def test_no_stop_id_counts_before_min_tokens() -> None:
    s = sequence(max_tokens=9, stop_ids=(5,), min_tokens=2)
    for expected in (None, None, "stop"):
        Scheduler(1).append(s, 5, None)
        assert s.finish_reason == expected


def test_prefills_until_its_prompt_is_cached() -> None:
    scheduler = Scheduler(4)
    first, second = sequence(0), sequence(1)
    for s in (second, first):  # arrival decides the slot, age the order of prefill
        scheduler.add(s)
    scheduler.admit()
    assert (second.slot, first.slot) == (0, 1)
    assert scheduler.prefilling == [first, second] and scheduler.decoding == []
    first.cached = 2
    assert scheduler.prefilling == [first, second]
    first.cached = 3
    assert scheduler.prefilling == [second] and scheduler.decoding == [first]


def test_a_freed_slot_goes_to_the_longest_waiting() -> None:
    scheduler = Scheduler(2)
    many = [sequence(i) for i in range(4)]
    for s in many:
        scheduler.add(s)
    scheduler.admit()
    assert [s.slot for s in many] == [0, 1, None, None]
    scheduler.finish(many[0], "length")
    assert scheduler.release_finished() == [many[0]] and many[0].slot is None
    scheduler.admit()
    assert [s.slot for s in many] == [None, 1, 0, None]
    assert list(scheduler.waiting) == [many[3]]


def test_cancelling_the_waiting_the_running_and_the_ended() -> None:
    scheduler = Scheduler(1)
    running, waiting, ended = sequence(0), sequence(1), sequence(2)
    for s in (ended, running, waiting):
        scheduler.add(s)
    scheduler.admit()
    scheduler.finish(ended, "length")
    scheduler.release_finished()
    scheduler.admit()
    for s in (running, waiting, ended):
        scheduler.cancel(s.id)
    assert [s.finish_reason for s in (running, waiting, ended)] == ["cancelled", "cancelled", "length"]
    assert scheduler.busy  # the running one holds its slot until the loop takes it out
    assert scheduler.decoding == [] and scheduler.release_finished() == [running]
    assert not scheduler.busy


@given(st.integers(1, 5), st.lists(st.sampled_from(["add", "admit", "end", "cancel", "release"]), max_size=60), st.randoms())
def test_no_slot_is_held_twice_and_nobody_is_forgotten(slots: int, actions: list[str], random: object) -> None:
    choice: Callable[[list[Sequence]], Sequence] = random.choice  # type: ignore[attr-defined]
    scheduler = Scheduler(slots)
    everyone: list[Sequence] = []
    released: list[Sequence] = []
    for action in actions:
        if action == "add":
            everyone.append(sequence(len(everyone)))
            scheduler.add(everyone[-1])
        elif action == "admit":
            waited, free = list(scheduler.waiting), slots - len(scheduler.running)
            scheduler.admit()
            assert list(scheduler.waiting) == waited[free:]  # the first to come got the free slots
        elif action == "end" and scheduler.running:
            scheduler.finish(choice(list(scheduler.running.values())), "length")
        elif action == "cancel" and everyone:
            scheduler.cancel(choice(everyone).id)
        elif action == "release":
            released += scheduler.release_finished()
        held = list(scheduler.running.values())
        assert all(s.slot == slot and 0 <= slot < slots for slot, s in scheduler.running.items())
        cancelled_waiting = [s for s in everyone if s.finish_reason == "cancelled" and s not in held + released]
        together = held + released + list(scheduler.waiting) + cancelled_waiting
        assert sorted(s.id for s in together) == list(range(len(everyone)))
        assert all(s.finish_reason is None for s in scheduler.waiting)


@pytest.mark.parametrize("slots", [1, 3])
def test_slots_are_dealt_lowest_first(slots: int) -> None:
    scheduler = Scheduler(slots)
    for i in range(slots + 2):
        scheduler.add(sequence(i))
    scheduler.admit()
    assert list(scheduler.running) == list(range(slots))


# What a step holds


def run(scheduler: Scheduler, max_tokens: int = 4) -> ScheduledStep:
    """Schedule a step and do to its sequences what the engine would."""
    step = scheduler.schedule(max_tokens)
    for chunk in step.prefill:
        chunk.sequence.cached += chunk.length
        if chunk.is_last:
            scheduler.append(chunk.sequence, 7, None)
    for s in step.decode:
        for _ in range(step.max_tokens):
            if s.finish_reason is None:
                s.cached += 1
                scheduler.append(s, 7, None)
    return step


def chunks_of(step: ScheduledStep) -> list[tuple[int, int, int]]:
    return [(chunk.sequence.id, chunk.start, chunk.length) for chunk in step.prefill]


def test_a_long_prompt_is_prefilled_in_chunks_and_then_decodes() -> None:
    scheduler = Scheduler(2)
    scheduler.add(sequence(0, prompt=MAX_CHUNK + 5, max_tokens=6))
    assert chunks_of(run(scheduler)) == [(0, 0, MAX_CHUNK)]
    assert chunks_of(run(scheduler)) == [(0, MAX_CHUNK, 5)]
    step = run(scheduler)
    assert ([s.id for s in step.decode], step.max_tokens, step.until_any) == ([0], 4, False)
    assert run(scheduler).decode and run(scheduler) == ScheduledStep()
    assert not scheduler.busy


def test_a_prefill_takes_a_chunk_of_one_bucket_on_each_data_shard() -> None:
    scheduler = Scheduler(8, data_shards=2)
    for i, length in enumerate((20, 200, 30, 17, 25)):  # slots 0, 2, 4 are of the first shard
        scheduler.add(sequence(i, prompt=length))
    step = scheduler.schedule(0)
    assert chunks_of(step) == [(0, 0, 20), (3, 0, 17)]
    assert {chunk_bucket(chunk.length) for chunk in step.prefill} == {32}


def test_who_decodes_waits_for_no_more_than_a_budget_of_prompts() -> None:
    scheduler = Scheduler(64)
    scheduler.add(sequence(0, max_tokens=1000))
    run(scheduler)
    for i in range(1, 12):
        scheduler.add(sequence(i, prompt=MAX_CHUNK, max_tokens=1))
    prefilled = 0
    while not (step := run(scheduler)).decode:
        prefilled += sum(chunk.length for chunk in step.prefill)
    assert prefilled == PREFILL_BUDGET and step.until_any
    assert run(scheduler).prefill  # and again


def test_without_a_row_that_decodes_prompts_have_no_budget() -> None:
    scheduler = Scheduler(2)
    scheduler.add(sequence(0, prompt=2 * PREFILL_BUDGET))
    assert [bool(run(scheduler).prefill) for _ in range(9)] == [True] * 8 + [False]


def test_no_token_is_decoded_where_none_is_wanted() -> None:
    scheduler = Scheduler(2)
    scheduler.add(sequence(0))
    assert run(scheduler, 0).prefill
    assert run(scheduler, 0) == ScheduledStep()


def test_past_the_short_context_a_sequence_is_prefilled_again() -> None:
    scheduler = Scheduler(2, short_context=10)
    s = sequence(0, prompt=7, max_tokens=20)
    scheduler.add(s)
    run(scheduler)
    assert run(scheduler, 8).max_tokens == 3  # until ten of its tokens are in the cache
    assert (s.cached, len(s.tokens)) == (10, 4)
    assert chunks_of(run(scheduler, 8)) == [(0, 0, 11)] and s.num_recomputed == 4
    assert run(scheduler, 8).max_tokens == 8


def test_a_stop_string_takes_back_the_tokens_behind_it() -> None:
    scheduler, s = Scheduler(1), sequence(max_tokens=9)
    scheduler.add(s)
    run(scheduler)
    run(scheduler)
    scheduler.finish(s, "stop", "end", keep=2)
    assert (s.tokens, s.finish_reason, s.stop_reason) == ([7, 7], "stop", "end")
    assert run(scheduler) == ScheduledStep() and not scheduler.busy

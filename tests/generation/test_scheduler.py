"""Who gets a slot, when, and how a sequence ends."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.generation.scheduler import Scheduler, Sequence
from jaxllm.requests.outputs import Logprob
from jaxllm.requests.sampling_params import SamplingParams


def sequence(
    id: int = 0, *, prompt: int = 3, max_tokens: int = 4, stop_ids: tuple[int, ...] = (), min_tokens: int = 0
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens)
    return Sequence(id, list(range(prompt)), params, max_tokens, stop_ids, seed=0)


def test_ends_at_its_limit() -> None:
    s = sequence(max_tokens=2)
    s.append(7, None)
    assert s.finish_reason is None and s.remaining == 1
    s.append(7, None)
    assert (s.finish_reason, s.stop_reason) == ("length", None)  # type: ignore[comparison-overlap]
    assert (s.tokens, s.logprobs) == ([7, 7], [])


def test_ends_at_a_stop_id_even_when_that_is_the_last_token() -> None:
    s = sequence(max_tokens=1, stop_ids=(5, 9))
    s.append(9, {9: Logprob(-1.0, 1)})
    assert (s.finish_reason, s.stop_reason, s.logprobs) == ("stop", 9, [{9: Logprob(-1.0, 1)}])


def test_no_stop_id_counts_before_min_tokens() -> None:
    s = sequence(max_tokens=9, stop_ids=(5,), min_tokens=2)
    for expected in (None, None, "stop"):
        s.append(5, None)
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
    many[0].finish_reason = "length"
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
    ended.finish_reason = "length"
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
            choice(list(scheduler.running.values())).finish_reason = "length"
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

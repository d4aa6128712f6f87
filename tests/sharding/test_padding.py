"""Padding: every head is somewhere, beside its KV head, and there is no more padding than there must be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.padding import PAD, PaddedHeads, pad_heads, pad_tail, round_up

pytestmark = pytest.mark.fast

SIZES = st.integers(1, 16)


@given(st.integers(0, 1000), st.integers(1, 64))
def test_round_up_is_the_next_multiple(size: int, multiple: int) -> None:
    rounded = round_up(size, multiple)
    assert rounded % multiple == 0
    assert 0 <= rounded - size < multiple


@given(st.integers(1, 200), st.integers(1, 16))
def test_a_tail_is_the_source_and_then_padding(size: int, divisor: int) -> None:
    index = pad_tail(size, divisor)
    assert index[:size] == tuple(range(size))
    assert set(index[size:]) <= {PAD}
    assert len(index) % divisor == 0 and len(index) - size < divisor


@given(SIZES, SIZES, SIZES)
def test_every_query_head_stands_once_on_the_slot_of_its_kv_head(per_kv: int, kv_heads: int, divisor: int) -> None:
    heads = pad_heads(per_kv * kv_heads, kv_heads, divisor)
    assert len(heads.kv_index) == heads.slots and len(heads.query_index) == heads.slots * heads.group
    placed = []
    for position, query in enumerate(heads.query_index):
        if query != PAD:
            placed.append(query)
            assert heads.kv_index[position // heads.group] == query // per_kv
    assert sorted(placed) == list(range(per_kv * kv_heads))
    assert set(heads.kv_index) - {PAD} == set(range(kv_heads))


@given(SIZES, SIZES, SIZES)
def test_slots_divide_so_that_a_kv_head_is_on_the_device_of_its_queries(per_kv: int, kv_heads: int, divisor: int) -> None:
    heads = pad_heads(per_kv * kv_heads, kv_heads, divisor)
    assert heads.slots % divisor == 0
    slots, queries = heads.slots // divisor, heads.slots * heads.group // divisor
    for device in range(divisor):
        own = heads.kv_index[device * slots : (device + 1) * slots]
        for query in heads.query_index[device * queries : (device + 1) * queries]:
            assert query == PAD or query // per_kv in own


@given(SIZES, SIZES, SIZES)
def test_a_slot_of_padding_holds_padding_alone(per_kv: int, kv_heads: int, divisor: int) -> None:
    heads = pad_heads(per_kv * kv_heads, kv_heads, divisor)
    for slot, kv in enumerate(heads.kv_index):
        if kv == PAD:
            assert set(heads.query_index[slot * heads.group : (slot + 1) * heads.group]) == {PAD}


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_there_are_no_fewer_heads_to_have(per_kv: int, kv_heads: int, divisor: int) -> None:
    """Any layout gives each device as many slots as the next, each one KV head and `group` queries: try all of them."""
    heads = pad_heads(per_kv * kv_heads, kv_heads, divisor)
    counts = []
    for group in range(1, per_kv + 1):
        # With groups of this size a KV head must stand on so many slots.
        needed = -(-per_kv // group) * kv_heads
        slots = next(n for n in range(1, needed + divisor + 1) if n % divisor == 0 and n >= needed)
        counts.append((slots * group, slots))
    assert (heads.slots * heads.group, heads.slots) == min(counts)


@given(SIZES, SIZES)
def test_one_device_pads_nothing(per_kv: int, kv_heads: int) -> None:
    heads = pad_heads(per_kv * kv_heads, kv_heads, 1)
    assert heads.query_index == tuple(range(per_kv * kv_heads))
    assert heads.kv_index == tuple(range(kv_heads))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((9, 3, 4), PaddedHeads(9, 3, copies=1, group=3, slots=4)),
        ((13, 1, 4), PaddedHeads(13, 1, copies=4, group=4, slots=4)),
        ((32, 8, 4), PaddedHeads(32, 8, copies=1, group=4, slots=8)),
        ((32, 32, 4), PaddedHeads(32, 32, copies=1, group=1, slots=32)),
        ((8, 2, 4), PaddedHeads(8, 2, copies=2, group=2, slots=4)),
        ((1, 1, 3), PaddedHeads(1, 1, copies=1, group=1, slots=3)),
    ],
)
def test_published_shapes(sizes: tuple[int, int, int], expected: PaddedHeads) -> None:
    assert pad_heads(*sizes) == expected


def test_where_the_heads_of_13_over_4_devices_stand() -> None:
    heads = pad_heads(13, 1, 4)
    assert heads.kv_index == (0, 0, 0, 0)
    assert heads.query_index == (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, PAD, PAD, PAD)


def test_where_the_heads_of_9_and_3_over_4_devices_stand() -> None:
    heads = pad_heads(9, 3, 4)
    assert heads.kv_index == (0, 1, 2, PAD)
    assert heads.query_index == (0, 1, 2, 3, 4, 5, 6, 7, 8, PAD, PAD, PAD)

"""The sizes that shapes are made of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.buckets import MAX_STEP_TOKENS, PAGE, TILE, pages_held, pages_of, power_of_two

pytestmark = pytest.mark.fast


@given(st.integers(1, 1 << 40))
def test_power_of_two_is_the_smallest(n: int) -> None:
    found = power_of_two(n)
    assert found.bit_count() == 1 and found >= n and (found == 1 or found // 2 < n)


@given(st.integers(0, 1 << 40))
def test_pages_hold_the_tokens_and_no_page_is_empty(tokens: int) -> None:
    assert PAGE * (pages_of(tokens) - 1) < tokens <= PAGE * pages_of(tokens)


def test_a_page_and_a_step_hold_whole_tiles() -> None:
    assert PAGE % TILE == 0 and MAX_STEP_TOKENS % TILE == 0


@given(st.none() | st.integers(1, 5000), st.integers(1, 20_000), st.data())
def test_no_step_sees_more_pages_than_are_held(window: int | None, length: int, data: st.DataObject) -> None:
    """From the first position that the step's first token sees to the last that the step writes."""
    start = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(start + 1, min(start + MAX_STEP_TOKENS, length)))
    first = 0 if window is None else max(start - window + 1, 0)
    assert pages_of(end) - first // PAGE <= pages_held(window, length) <= pages_of(length)

"""The sizes that shapes are made of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.buckets import MAX_STEP_TOKENS, PAGE, TILE, pages_of, power_of_two

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

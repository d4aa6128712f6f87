"""Steps have few shapes, and each holds what it is asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.buckets import MAX_STEP_TOKENS, PAGE, TILE, pages_of
from jaxllm.execution.step_shapes import StepShapes

pytestmark = pytest.mark.fast

PLATFORMS = st.sampled_from(["cpu", "gpu", "tpu"])


@given(PLATFORMS, st.integers(1, 1 << 17), st.integers(1, 300), st.integers(TILE, MAX_STEP_TOKENS), st.data())
def test_a_shape_holds_what_it_is_asked_for(platform: str, length: int, rows: int, tokens: int, data: st.DataObject) -> None:
    shapes = StepShapes.of(platform, length, rows, tokens)
    for ladder in (shapes.tokens, shapes.rows, shapes.widths):
        assert list(ladder) == sorted(set(ladder))
    assert shapes.rows[-1] == rows and shapes.widths[-1] == pages_of(length)
    assert tokens <= shapes.tokens[-1] < tokens + TILE and all(n % TILE == 0 for n in shapes.tokens)
    few = data.draw(st.integers(1, rows))
    assert few <= shapes.rows_for(few) in shapes.rows
    some = data.draw(st.integers(1, length))
    assert some <= shapes.width_for(some) * PAGE and shapes.width_for(some) in shapes.widths


@given(PLATFORMS, st.integers(1, 5000))
def test_a_step_of_prompts_is_filled_or_little_is_wasted(platform: str, tokens: int) -> None:
    shapes = StepShapes.of(platform, 2048, 64)
    chosen = shapes.tokens_for(tokens)
    assert chosen in shapes.tokens
    cost, steps, left = 0, 0, tokens
    while left > 0:
        taken = shapes.tokens_for(left)
        cost, steps, left = cost + taken, steps + 1, left - taken
    most = 1.25 * tokens + 64 if platform == "cpu" else 4 * tokens + 64
    assert cost <= most and steps <= -(-tokens // MAX_STEP_TOKENS) + 4

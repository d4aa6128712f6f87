"""Steps have few shapes, each holds what it is asked for, and warm-up knows them all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.buckets import MAX_STEP_TOKENS, PAGE, TILE, pages_of
from jaxllm.decoder.cache_spec import Pool
from jaxllm.execution.step_shapes import StepShapes
from jaxllm.execution.steps import Steps
from jaxllm.execution.warmup import wanted
from jaxllm.planning.presets import PRESETS
from sharding.hardware import absent_devices
from sharding.layout import make_layout

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
    assert chosen <= tokens or chosen <= 1.5 * tokens or chosen <= 256


@pytest.mark.parametrize("on", ["cpu", "1xH100", "1xv6e"])
def test_there_are_few_programs_and_warmup_knows_them_all(on: str) -> None:
    """At most twelve for greedy generation up to 2,048 positions in 64 sequences, beside what makes the empty pages."""
    import jax

    config = replace(PRESETS["smollm2-135m"], num_layers=1)
    layout = make_layout("tensor", jax.devices()[:1] if on == "cpu" else absent_devices(on), config.hidden_size)
    shapes = StepShapes.of(layout.platform, 2048, 64)
    found = wanted(Steps(config, layout, "float32"), Pool.of(config, 2048, 64 * 512, 64), shapes, random=False)
    names = [program.name for program in found if program.name != "empty cache"]
    assert len(set(names)) == len(names) == (len(shapes.tokens) + len(shapes.rows)) * len(shapes.widths) <= 12

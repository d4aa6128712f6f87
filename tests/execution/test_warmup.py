"""Warm-up knows every program that a step may need, and they are few."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import full_pool

from jaxllm.decoder.cache_spec import Pool
from jaxllm.execution import programs
from jaxllm.execution.programs import StepProgram
from jaxllm.execution.step_shapes import StepShapes
from jaxllm.execution.steps import Steps
from jaxllm.execution.warmup import wanted
from jaxllm.planning.presets import PRESETS
from sharding.hardware import absent_devices
from sharding.layout import Layout, make_layout

pytestmark = pytest.mark.fast

CONFIG = replace(PRESETS["smollm2-135m"], num_layers=1)
SEQUENCES, LENGTH = 64, 2048
PLACES = [(on, name) for on in ("cpu", "4xH100", "4xv6e") for name in ("tensor", "replicated")]


@lru_cache
def steps_on(on: str, name: str) -> Steps:
    devices: list[Any] = jax.devices()[:4] if on == "cpu" else absent_devices(on)
    return Steps(CONFIG, make_layout(name, devices, CONFIG.hidden_size), "float32")


def sizes(layout: Layout, sequences: int = SEQUENCES, length: int = LENGTH) -> tuple[Pool, StepShapes]:
    pool = full_pool(CONFIG, layout, sequences, length)
    return pool, StepShapes.of(layout.platform, length, -(-sequences // layout.data))


def shapes(program: StepProgram) -> Any:
    return jax.tree.structure(program.args), tuple(x.shape for x in jax.tree.leaves(program.args))


@pytest.mark.parametrize(("on", "name"), PLACES)
def test_programs_are_few_and_each_has_its_name(on: str, name: str) -> None:
    """At most twelve for greedy generation, and as many for sampling, beside what makes the empty pages."""
    steps = steps_on(on, name)
    pages = len(programs.empty_cache(steps, sizes(steps.layout)[0]))
    greedy, everything = (wanted(steps, *sizes(steps.layout), random=random)[pages:] for random in (False, True))
    assert len(greedy) <= 12 and len(everything) == 2 * len(greedy)
    assert len({program.name for program in everything}) == len({shapes(program) for program in everything}) == len(everything)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(PLACES), st.integers(1, 300), st.integers(1, 9000), st.data())
def test_every_step_is_foreseen(place: tuple[str, str], sequences: int, length: int, data: st.DataObject) -> None:
    steps = steps_on(*place)
    pool, ladder = sizes(steps.layout, sequences, length)
    known = {shapes(program) for program in wanted(steps, pool, ladder)}
    rows = steps.layout.data * ladder.rows_for(data.draw(st.integers(1, ladder.rows[-1]), "sequences that decode"))
    tokens = ladder.tokens_for(data.draw(st.integers(1, ladder.tokens[-1]), "tokens"))
    width = ladder.width_for(data.draw(st.integers(1, length), "position"))
    for random in (False, True):
        assert shapes(programs.decode(steps, rows, pool, random=random, width=width)) in known
        assert shapes(programs.prefill(steps, tokens, pool, random=random, width=width)) in known

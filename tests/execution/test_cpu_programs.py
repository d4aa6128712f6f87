"""The steps as XLA compiles them for a CPU: the cache is read where it lies and written in place, and little else is held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import pytest
from pools import full_pool

from jaxllm.decoder.attention import Attention
from jaxllm.decoder.cache_spec import Pool
from jaxllm.execution import programs
from jaxllm.execution.steps import Steps
from jaxllm.planning.presets import PRESETS
from sharding.hlo import analyse
from sharding.layout import make_layout

CONFIG = replace(PRESETS["smollm2-135m"], num_layers=2, vocab_size=500)


LENGTH = 1024
PREFILL, DECODE = partial(programs.prefill, tokens=512), partial(programs.decode, rows=8)


def scoring(steps: Steps, pool: Pool) -> programs.StepProgram:
    return programs.score(steps, 256, 8)


@pytest.mark.parametrize("step", ["prefill", "decode of a row each", "decode"])
@pytest.mark.parametrize(("layout_name", "devices"), [("tensor", 1), ("tensor", 4), ("replicated", 4)])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
def test_no_step_copies_the_cache(layout_name: str, devices: int, step: str, dtype: str) -> None:
    layout = make_layout(layout_name, jax.devices()[:devices], CONFIG.hidden_size)
    steps, rows = Steps(CONFIG, layout, dtype), layout.data * (1 if step == "decode of a row each" else 8)
    pool = full_pool(CONFIG, layout, rows, LENGTH)
    one = programs.prefill(steps, 512, pool) if step == "prefill" else programs.decode(steps, rows, pool)
    program, whole = analyse(one.compile()), pool.nbytes(layout, steps.cache_specs)
    array = whole // CONFIG.num_layers // 2  # the keys, or the values, of a layer
    assert program.large_copies(array) == []
    assert program.memory is not None
    assert program.memory.alias == whole
    assert program.memory.temp < array or array < 1 << 20 or step == "prefill"


@pytest.mark.parametrize("layout_name", ["tensor", pytest.param("replicated", marks=pytest.mark.full), "gathered"])
@pytest.mark.parametrize("of", [PREFILL, DECODE])
def test_more_layers_hold_no_more(layout_name: str, of: Callable[..., programs.StepProgram]) -> None:
    layout = make_layout(layout_name, jax.devices()[:4], CONFIG.hidden_size)
    pool = full_pool(CONFIG, layout, 8, LENGTH)

    def temporaries(layers: int) -> int:
        return of(Steps(replace(CONFIG, num_layers=layers), layout, "float32"), pool=pool).temp_bytes()

    assert temporaries(6) - temporaries(3) < CONFIG.layer_params * 4 / 10


def test_decode_holds_no_copy_of_a_16_bit_embedding() -> None:
    config = replace(CONFIG, vocab_size=8000)
    layout = make_layout("tensor", jax.devices()[:1], config.hidden_size)
    held = programs.decode(Steps(config, layout, "bfloat16"), 1, full_pool(config, layout, 1, 256)).temp_bytes()
    assert held < config.vocab_size * config.hidden_size


@pytest.mark.parametrize(
    ("of", "layout_name", "devices"),
    [(PREFILL, "tensor", 1), (DECODE, "tensor", 1), (scoring, "tensor", 1), (DECODE, "replicated-2x2", 4)],
)
def test_angles_are_computed_once(of: Callable[..., programs.StepProgram], layout_name: str, devices: int) -> None:
    """And not for every head of every layer."""
    layout = make_layout(layout_name, jax.devices()[:devices], CONFIG.hidden_size)
    program = analyse(of(Steps(CONFIG, layout, "float32"), pool=full_pool(CONFIG, layout, 8 * layout.data, LENGTH)).compile())
    opcodes = [i.opcode for computation in program.module.computations.values() for i in computation.values()]
    assert opcodes.count("cosine") == opcodes.count("sine") == 1


@pytest.mark.parametrize("of", [PREFILL, DECODE])
def test_layers_of_one_kind_are_traced_once(of: Callable[..., programs.StepProgram], monkeypatch: pytest.MonkeyPatch) -> None:
    traced, attention = [], Attention.__call__

    def counted(self: Attention, *args: Any) -> Any:
        traced.append(self)
        return attention(self, *args)

    monkeypatch.setattr(Attention, "__call__", counted)
    layout = make_layout("tensor", jax.devices()[:1], CONFIG.hidden_size)
    config = replace(CONFIG, num_layers=6, windows=(64, None))
    text = of(Steps(config, layout, "float32"), pool=full_pool(config, layout, 8, LENGTH)).compile().as_text()
    assert len(traced) == 2
    assert text is not None
    assert "run_layer" in text  # the name of what was one function, and is inlined
    assert " call(" not in text

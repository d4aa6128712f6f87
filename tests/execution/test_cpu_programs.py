"""The steps as XLA compiles them for a CPU: the cache is read where it lies and written in place, and little else is held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import pytest

from jaxllm.decoder.cache_spec import Pool
from jaxllm.execution import programs
from jaxllm.execution.steps import Steps
from jaxllm.planning.presets import PRESETS
from sharding.hlo import analyse
from sharding.layout import make_layout

CONFIG = replace(PRESETS["smollm2-135m"], num_layers=2, vocab_size=500)
POOL = Pool.of(CONFIG, 512, 8 * 512, 8)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(("layout_name", "devices"), [("tensor", 1), ("tensor", 4), ("replicated", 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_copies_no_page(layout_name: str, devices: int, rows: int, dtype: str) -> None:
    layout = make_layout(layout_name, jax.devices()[:devices], CONFIG.hidden_size)
    steps, pool = Steps(CONFIG, layout, dtype), Pool.of(CONFIG, 1024, rows * 1024, rows)
    program = analyse(programs.decode(steps, rows * layout.data, pool).compile())
    whole = pool.nbytes(layout, steps.cache_specs)
    one = whole // CONFIG.num_layers // 2  # the keys, or the values, of a layer
    assert program.large_copies(one) == []
    assert program.memory is not None
    assert program.memory.alias == whole
    assert program.memory.temp < one or one < 1 << 20


@pytest.mark.parametrize("layout_name", ["tensor", "replicated", "gathered"])
@pytest.mark.parametrize("of", [partial(programs.prefill, tokens=512, pool=POOL), partial(programs.decode, rows=8, pool=POOL)])
def test_more_layers_hold_no_more(layout_name: str, of: Callable[..., programs.StepProgram]) -> None:
    layout = make_layout(layout_name, jax.devices()[:4], CONFIG.hidden_size)

    def temporaries(layers: int) -> int:
        return of(Steps(replace(CONFIG, num_layers=layers), layout, "float32")).temp_bytes()

    assert temporaries(6) - temporaries(3) < CONFIG.layer_params * 4 / 10


def test_decode_holds_no_copy_of_a_16_bit_embedding() -> None:
    config = replace(CONFIG, vocab_size=8000)
    layout = make_layout("tensor", jax.devices()[:1], config.hidden_size)
    held = programs.decode(Steps(config, layout, "bfloat16"), 1, POOL).temp_bytes()
    assert held < config.vocab_size * config.hidden_size

"""What XLA makes of decoding on a CPU: the cache is read where it lies, and written in place."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from jaxllm import programs
from jaxllm.config import PRESETS
from jaxllm.plan import cache_bytes
from jaxllm.steps import Steps
from sharding.hlo import analyse
from sharding.layout import make_layout

CONFIG = replace(PRESETS["smollm2-135m"], num_layers=2, vocab_size=500)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(("layout_name", "devices"), [("tensor", 1), ("tensor", 4), ("replicated", 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_copies_no_cache(layout_name: str, devices: int, rows: int, dtype: str) -> None:
    layout = make_layout(layout_name, jax.devices()[:devices], CONFIG.hidden_size)
    length, rows = 1024, rows * layout.data
    program = analyse(programs.decode(Steps(CONFIG, layout, dtype), rows, length).compile())
    whole = cache_bytes(CONFIG, layout, dtype, rows, length)
    one = whole // CONFIG.num_layers // 2  # the keys, or the values, of a layer
    assert program.large_copies(one) == []
    assert program.memory is not None
    assert program.memory.alias == whole
    assert program.memory.temp < one or one < 1 << 20

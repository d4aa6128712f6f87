"""A plan's working memory of a step is that of XLA's programs, within a tenth."""

from __future__ import annotations

import itertools
from dataclasses import replace

import jax
import pytest
from layers import layered

from jaxllm.buckets import MAX_STEP_TOKENS
from jaxllm.config import ModelConfig
from jaxllm.decoder.cache_spec import Pool
from jaxllm.execution import programs
from jaxllm.execution.steps import Steps
from jaxllm.planning.plan import layouts
from jaxllm.planning.presets import PRESETS
from jaxllm.planning.working_memory import score_bytes, step_bytes
from sharding.layout import make_layout

SMOL = replace(PRESETS["smollm2-135m"], num_layers=2)
# The other: ungrouped heads, other proportions, a head of its own.
CONFIGS = {"smollm2": SMOL, "llama": ModelConfig(32000, 512, 1376, 2, 8, 8, 64, 2048)}
ALWAYS = [("tensor", "llama"), *((name, "smollm2") for name in ("tensor", "gathered", "replicated-2x2", "tensor-1"))]
LENGTH = 512


@pytest.mark.parametrize(
    ("name", "model"),
    layered(itertools.product([*layouts(4), "tensor-1", "gathered-1"], CONFIGS), lambda *case: case in ALWAYS),
)
def test_temporaries_are_foreseen(name: str, model: str) -> None:
    config, (name, alone, _) = CONFIGS[model], name.partition("-1")
    layout = make_layout(name, jax.devices()[: 1 if alone else 4], config.hidden_size)
    steps = Steps(config, layout, "float32")

    rows = 8 * layout.data
    pool = Pool.of(config, LENGTH, 8 * LENGTH, 8)
    generating = (programs.prefill(steps, MAX_STEP_TOKENS, pool), programs.decode(steps, rows, pool))
    held = max(one.temp_bytes() for one in generating)
    assert step_bytes(config, layout, "float32", rows, LENGTH) == pytest.approx(held, rel=0.1)
    assert score_bytes(config, layout, "float32") == pytest.approx(programs.score(steps, 2048, 0).temp_bytes(), rel=0.1)

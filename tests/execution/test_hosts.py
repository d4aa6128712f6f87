"""LLaMA-30B over two hosts of four H100 that are not there: what goes over the network, and what stays within a host."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from layers import layered
from pools import full_pool
from test_promises import CONTEXT, LAYERS, SMALL, STEPS

from jaxllm.execution.steps import Steps
from jaxllm.planning.presets import PRESETS
from sharding.hlo import analyse
from sharding.layout import make_layout
from sharding.targets import target_devices

HOSTS, EACH = 2, 4
LAYOUTS = ["tensor", "gathered", "gathered-2x4", "replicated-2x4"]
FEW = [("tensor", "decode"), ("gathered-2x4", "decode"), ("gathered-2x4", "score")]
WEIGHT = 1 << 23  # numbers of a matrix that is gathered, at least
REDUCES, GATHERS = 2 * LAYERS + 1, 4 * LAYERS + 2  # of the halves of layers and the embedding; of matrices and tables


@pytest.mark.parametrize(
    ("name", "step"), layered([(name, step) for name in LAYOUTS for step in STEPS], lambda name, step: (name, step) in FEW)
)
def test_what_crosses_hosts(name: str, step: str) -> None:
    config = replace(PRESETS["llama-30b"], num_layers=LAYERS)
    try:
        layout = make_layout(name, target_devices("h100", EACH, HOSTS), config.hidden_size)
    except RuntimeError as error:
        pytest.skip(str(error))
    steps, pool = Steps(config, layout, "bfloat16"), full_pool(config, layout, 8, CONTEXT)
    program = analyse(STEPS[step](steps, pool).compile())
    large = [(c.kind, c.crosses(EACH), math.prod(array.shape)) for c in program.collectives for array in c.results]
    large = [one for one in large if one[2] * 2 >= SMALL]
    reduces = [crosses for kind, crosses, _ in large if kind == "all-reduce"]
    assert reduces == [layout.hosts("model") > 1] * (REDUCES if layout.model > 1 else 0)
    gathers = [(crosses, size) for kind, crosses, size in large if kind == "all-gather"]
    weights = [crosses for crosses, size in gathers if size >= WEIGHT]
    assert weights == [True] * (GATHERS if layout.gathered else 0)
    # Beside them logits, whole on each device, and what was sampled or scored, whole in each process.
    assert len(gathers) - len(weights) <= (layout.model > 1 and step != "score") + 3 * (layout.data > 1)
    assert len(reduces) + len(gathers) == len(large)
    copies = program.large_copies(1 << 20)
    if step.startswith("decode"):
        assert copies == []
        assert program.memory is not None and program.memory.alias == pool.nbytes(layout, steps.cache_specs)

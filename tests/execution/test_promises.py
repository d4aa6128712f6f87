"""The exchanges of each layout in each step, and no copies of weights, in programs for devices that are not there.

Two layers of each model: a layer's share is what two have more than one.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from layers import layered
from pools import full_pool

from jaxllm.buckets import MAX_STEP_TOKENS
from jaxllm.decoder.cache_spec import Pool
from jaxllm.execution import programs
from jaxllm.execution.steps import Steps
from jaxllm.planning.presets import PRESETS
from jaxllm.platforms import choices
from sharding.hlo import analyse
from sharding.layout import make_layout
from sharding.targets import target_devices

LAYERS = 2
CONTEXT = 2048
SMALL = 1 << 12  # bytes, below which are a loop's conditions, a chosen token, a row's sums of the vocabulary
STEPS = {
    "decode": lambda steps, pool: programs.decode(steps, 8, pool),
    "decode of a row each": lambda steps, pool: programs.decode(steps, steps.layout.data, pool),
    "prefill": lambda steps, pool: programs.prefill(steps, MAX_STEP_TOKENS, pool),
    "score": lambda steps, pool: programs.score(steps, choices(steps.layout.platform).scoring_row, 8),
}
DEVICES = [("h100", "bfloat16"), ("v100", "float16"), ("v6e", "bfloat16")]
RUNS = [(model, *device) for model in ("llama-30b", "llama-3-70b") for device in DEVICES]
RUNS += [(model, "h100", "bfloat16") for model in ("opt-30b", "mixtral-8x7b", "gemma-2-27b", "qwen3-30b-a3b")]
LAYOUTS = ["tensor", "replicated", "gathered", "replicated-2x2", "gathered-2x2"]
# One model in every layout, in the steps that differ most; of the others what could differ: a device of another kind, and a
# model of another form.
FEW = [("tensor", "decode"), ("gathered-2x2", "score"), ("replicated", "prefill")]


def kept(name: str, step: str, model: str, kind: str, dtype: str) -> bool:
    if (model, kind) == ("llama-30b", "h100"):
        return step in ("decode", "score") or (name, step) in (("tensor", "prefill"), ("gathered-2x2", "decode of a row each"))
    return (name, step) in FEW[: 3 if model == "llama-30b" else 2] and kind != "v6e"


CASES = [(name, step, *run) for run in RUNS for step in STEPS for name in LAYOUTS]


@pytest.mark.parametrize(("name", "step", "model", "kind", "dtype"), layered(CASES, kept))
def test_a_layout_keeps_its_promise(name: str, step: str, model: str, kind: str, dtype: str) -> None:
    config = replace(PRESETS[model], num_layers=LAYERS)
    try:
        layout = make_layout(name, target_devices(kind, 4), config.hidden_size)
    except RuntimeError as error:
        pytest.skip(str(error))
    steps, pool = Steps(config, layout, dtype), full_pool(config, layout, 8, CONTEXT)
    program = analyse(STEPS[step](steps, pool).compile())
    large = [c for c in program.collectives if c.nbytes >= SMALL]
    # XLA may combine small ones into one.
    arrays = [(c.kind, array) for c in large for array in c.results]
    # On TPUs small gathers are sums of what is zero elsewhere.
    logits = [kind for kind, array in arrays if array.dtype == "f32" and math.prod(array.shape) % config.vocab_size == 0]
    assert len(logits) <= (layout.model > 1 and step != "score")
    reduces = 2 * LAYERS + 1 if layout.model > 1 else 0
    # Queries, keys and values are one matrix, gate and up another, those of all experts one array; a router is one more.
    matrices = 4 + (config.experts is not None)
    gathers = matrices * LAYERS + config.num_tables if layout.gathered else 0
    assert sum(kind == "all-reduce" for kind, _ in arrays) == reduces + logits.count("all-reduce")
    assert sum(kind == "all-gather" for kind, _ in arrays) == gathers + logits.count("all-gather")
    assert len(arrays) == reduces + gathers + len(logits)

    copies = program.large_copies(1 << 20)
    assert [copy for copy in copies if _is_weight(copy.result.shape, steps)] == []
    if step != "score":
        assert [copy for copy in copies if _is_pool(copy.result.shape, steps, pool)] == []
        assert program.memory is not None
        assert program.memory.alias == pool.nbytes(layout, steps.cache_specs)
    if step.startswith("decode") and layout.platform == "gpu":
        assert copies == []


@pytest.mark.full
@pytest.mark.parametrize("model", ["llama-30b", "gemma-2-27b", "opt-30b"])
def test_no_table_is_copied_to_be_looked_up(model: str) -> None:
    """XLA for TPUs would write a table viewed as integers out once more, in every step."""
    config = replace(PRESETS[model], num_layers=1)
    try:
        layout = make_layout("tensor", target_devices("v6e", 4), config.hidden_size)
    except RuntimeError as error:
        pytest.skip(str(error))
    steps = Steps(config, layout, "bfloat16")
    memory = analyse(STEPS["decode"](steps, full_pool(config, layout, 8, CONTEXT)).compile()).memory
    assert memory is not None and memory.temp < 1 << 23


def _is_weight(shape: tuple[int, ...], steps: Steps) -> bool:
    """Whether a shape is a matrix's in any order: whole, as it is stored or as it is computed with."""
    for parameter, stored in zip(steps.params, steps.shardings, strict=True):
        used = (
            (parameter.shape[0] // steps.layout.model, *parameter.shape[1:]),
            (*parameter.shape[:-1], parameter.shape[-1] // steps.layout.model),
        )
        for one in (parameter.shape, stored.shard_shape(parameter.shape), *used):
            if sorted(shape) == sorted(one) and len(one) > 1:
                return True
    return False


def _is_pool(shape: tuple[int, ...], steps: Steps, pool: Pool) -> bool:
    """Whether a shape is that of a layer's keys or values, in any order."""
    arrays = [x for spec in steps.cache_specs for x in spec.abstract(steps.layout, pool.pages[spec.window])]
    return any(sorted(shape) == sorted(x.sharding.shard_shape(x.shape)) for x in arrays)

"""The promises of the layouts, read from programs compiled for GPUs that are not there: LLaMA-30B's decode and scoring."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from layers import layered

from jaxllm.buckets import MAX_STEP_TOKENS, PAGE
from jaxllm.decoder.cache_spec import Pool
from jaxllm.execution import programs
from jaxllm.execution.steps import Steps
from jaxllm.planning.presets import PRESETS
from sharding.hardware import hardware
from sharding.hlo import HloProgram, analyse
from sharding.layout import Layout, make_layout
from sharding.targets import target_devices

CONFIG = PRESETS["llama-30b"]
CONTEXT = 2048
WEIGHT = 1 << 20  # bytes; the smallest weight matrix of a device is 88 MB


def laid_out(kind: str, layout_name: str) -> Layout:
    try:
        devices = target_devices(kind, 4)
    except RuntimeError as error:
        pytest.skip(str(error))
    return make_layout(layout_name, devices, CONFIG.hidden_size)


def decode_program(
    kind: str, dtype: str, layout_name: str, rows: int, layers: int = CONFIG.num_layers
) -> tuple[HloProgram, Layout]:
    layout = laid_out(kind, layout_name)
    steps = Steps(replace(CONFIG, num_layers=layers), layout, dtype)
    return analyse(programs.decode(steps, rows, pool_of(layout, rows)).compile()), layout


def pool_of(layout: Layout, rows: int) -> Pool:
    each = rows // layout.data
    return Pool.of(CONFIG, CONTEXT, each * CONTEXT, each)


def cache_bytes(layout: Layout, rows: int) -> int:
    """Bytes of keys and values in 16 bits on one device, and of a page that is nobody's."""
    positions = (rows // layout.data) * CONTEXT + PAGE
    return 2 * CONFIG.num_layers * (CONFIG.num_kv_heads // layout.model) * positions * CONFIG.head_dim * 2


@pytest.mark.parametrize(
    ("kind", "dtype", "rows"),
    layered(
        [("h100", "bfloat16", 1), ("h100", "bfloat16", 8), ("v100", "float16", 1), ("v100", "float16", 8)],
        lambda kind, dtype, rows: (kind, rows) == ("h100", 8),
    ),
)
def test_tensor_decode_keeps_its_promise(kind: str, dtype: str, rows: int) -> None:
    program, layout = decode_program(kind, dtype, "tensor", rows)
    assert program.count("all-reduce") == 2 * CONFIG.num_layers + 1
    assert program.count("all-gather") <= 1
    assert {c.kind for c in program.collectives} <= {"all-reduce", "all-gather"}
    # The one all-gather is of the logits, not of a weight.
    assert all(c.nbytes == rows * CONFIG.vocab_size * 4 for c in program.collectives if c.kind == "all-gather")
    assert program.large_copies(WEIGHT) == []
    assert program.memory is not None
    assert program.memory.alias == cache_bytes(layout, rows)
    assert program.memory.temp < 200e6
    if kind == "v100":
        assert program.memory.argument + program.memory.temp < 0.9 * 32e9


@pytest.mark.parametrize(("kind", "dtype"), [("h100", "bfloat16"), ("v100", "float16")])
@pytest.mark.parametrize("layout_name", ["tensor", "replicated"])
def test_a_full_step_of_prompts_copies_neither_weights_nor_pages(kind: str, dtype: str, layout_name: str) -> None:
    layout = laid_out(kind, layout_name)
    steps, pool = Steps(replace(CONFIG, num_layers=3), layout, dtype), Pool.of(CONFIG, CONTEXT, 8 * CONTEXT, 8)
    program = analyse(programs.prefill(steps, MAX_STEP_TOKENS, pool).compile())
    assert program.count("all-reduce") == (2 * 3 + 1 if layout.model > 1 else 0)
    pages = pool.nbytes(layout, steps.cache_specs)
    assert program.large_copies(pages // 3 // 2) == []
    assert program.memory is not None
    assert program.memory.alias == pages


@pytest.mark.full  # test_promises has it of two layers
def test_replicated_over_data_has_no_collective_in_a_layer() -> None:
    """Two by two: the model axis keeps the promise of `tensor`; over the data axis only the loop's conditions are reduced."""
    program, layout = decode_program("h100", "bfloat16", "replicated-2x2", 4)
    large = [c for c in program.collectives if c.nbytes > 64]
    assert sum(c.kind == "all-reduce" for c in large) == 2 * CONFIG.num_layers + 1
    assert sum(c.kind == "all-gather" for c in large) <= 1
    assert program.large_copies(WEIGHT) == []
    assert program.memory is not None
    assert program.memory.alias == cache_bytes(layout, 4)


def score_program(kind: str, dtype: str, layout_name: str, layers: int, width: int) -> HloProgram:
    config, layout = replace(CONFIG, num_layers=layers), laid_out(kind, layout_name)
    return analyse(programs.score(Steps(config, layout, dtype), ROW, width).compile())


ROW = 16384  # tokens of a step on each device


@pytest.mark.parametrize(("kind", "dtype"), [("h100", "bfloat16"), ("v100", "float16")])
def test_gathered_scoring_gathers_weights_alone(kind: str, dtype: str) -> None:
    """The embedding, seven matrices a layer and the head; and what a layer needs is freed when it is done."""
    program = score_program(kind, dtype, "gathered", layers=4, width=8)
    assert {c.kind for c in program.collectives} == {"all-gather"}
    assert program.count("all-gather") == 7 * 4 + 2
    assert not any(c.in_loop for c in program.collectives)
    # A device's shard of a weight is gathered as it lies.
    assert not [copy for copy in program.large_copies(WEIGHT) if "leaves" in copy.source]
    # Nowhere is there an array of [tokens, vocabulary].
    arrays = [array for computation in program.module.computations.values() for i in computation.values() for array in i.results]
    assert max(math.prod(array.shape) for array in arrays) < ROW * CONFIG.vocab_size
    assert program.memory is not None
    whole = program.memory.argument + program.memory.temp + (CONFIG.num_layers - 4) * CONFIG.layer_params * 2 // 4
    assert whole < 0.9 * 32e9
    deeper = score_program(kind, dtype, "gathered", layers=6, width=8)
    assert deeper.memory is not None and deeper.memory.temp < 1.02 * program.memory.temp


@pytest.mark.parametrize(("kind", "dtype"), [("h100", "bfloat16"), ("a100-80gb", "bfloat16"), ("v100", "float16")])
def test_gathers_hide_behind_compute(kind: str, dtype: str) -> None:
    """Each begins before the compute that it hides behind; of the embedding and the first layer's first weight there is none."""
    program = score_program(kind, dtype, "gathered", layers=4, width=8)
    overlaps = program.overlaps("all-gather")
    assert len(overlaps) == 7 * 4 + 2
    rates = hardware(target_devices(kind, 1)[0])
    assert rates is not None
    for overlap in overlaps[2:-1]:
        # A product of 16,384 tokens takes ten times as long as its weight's way over NVLink.
        gather = 3 / 4 * overlap.collective.nbytes / rates.link
        assert overlap.products >= 1 or overlap.moved / rates.bandwidth > gather, overlap
    assert overlaps[-1].moved > 0  # the head's, once a step


def test_replicated_scoring_exchanges_nothing() -> None:
    program = score_program("h100", "bfloat16", "replicated", layers=2, width=8)
    assert program.collectives == []


@pytest.mark.parametrize(("kind", "dtype"), [("h100", "bfloat16"), ("v100", "float16")])
def test_gathered_decode_holds_two_layers_at_a_time(kind: str, dtype: str) -> None:
    """However many there are; and only weights are gathered, in every step of the loop."""
    programs = [decode_program(kind, dtype, "gathered", 4, layers)[0] for layers in (3, 6)]
    for program, layers in zip(programs, (3, 6), strict=True):
        large = [c for c in program.collectives if c.nbytes > WEIGHT]
        assert {c.kind for c in large} == {"all-gather"}
        assert len(large) == 7 * layers + 2
        assert all(c.in_loop for c in large)
    few, many = (program.memory for program in programs)
    assert few is not None and many is not None
    table = CONFIG.vocab_size * CONFIG.hidden_size
    assert many.temp == pytest.approx(few.temp, rel=0.01)
    assert many.temp < 2 * (2 * CONFIG.layer_params + 2 * table)

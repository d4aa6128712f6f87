"""The promises of the layouts, read from programs compiled for GPUs that are not there: LLaMA-30B's generating and scoring."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from layers import layered
from pools import full_pool

from jaxllm.buckets import MAX_STEP_TOKENS, PAGE
from jaxllm.config import ModelConfig
from jaxllm.decoder.paged_attention import PASS_BYTES
from jaxllm.execution import programs
from jaxllm.execution.programs import StepProgram
from jaxllm.execution.steps import Steps
from jaxllm.planning.presets import PRESETS
from sharding.hardware import hardware
from sharding.hlo import HloProgram, analyse
from sharding.layout import Layout, make_layout
from sharding.targets import target_devices

CONFIG = PRESETS["llama-30b"]
CONTEXT = 2048
WEIGHT = 1 << 20  # bytes; the smallest weight matrix of a device is 88 MB
SHALLOW = replace(CONFIG, num_layers=12)  # a fifth of its layers, in a fifth of the time
GPUS = [("h100", "bfloat16"), ("v100", "float16")]


def laid_out(kind: str, layout_name: str, config: ModelConfig = CONFIG) -> Layout:
    try:
        devices = target_devices(kind, 4)
    except RuntimeError as error:
        pytest.skip(str(error))
    return make_layout(layout_name, devices, config.hidden_size)


def decode(steps: Steps, rows: int, length: int = CONTEXT) -> StepProgram:
    return programs.decode(steps, rows, full_pool(steps.config, steps.layout, rows, length))


def prefill(steps: Steps) -> StepProgram:
    return programs.prefill(steps, MAX_STEP_TOKENS, full_pool(steps.config, steps.layout, 8, CONTEXT))


def read(one: StepProgram) -> HloProgram:
    """The compiled step, which updates every array of its cache in place and copies none."""
    program, cache = analyse(one.compile()), [array for layer in one.args[1] for array in layer]
    shards = [array.sharding.shard_shape(array.shape) for array in cache]
    assert program.memory is not None
    assert program.memory.alias == sum(math.prod(shape) * 2 for shape in shards)
    whole = {tuple(sorted(shape)) for shape in shards}
    assert [copy for copy in program.large_copies(WEIGHT) if tuple(sorted(copy.result.shape)) in whole] == []
    return program


def keeps_promise_of_tensor(program: HloProgram, samples: int, layers: int = CONFIG.num_layers) -> None:
    assert program.count("all-reduce") == 2 * layers + 1
    assert program.count("all-gather") <= 1
    assert {c.kind for c in program.collectives} <= {"all-reduce", "all-gather"}
    # The one all-gather is of the logits, not of a weight.
    assert all(c.nbytes == samples * CONFIG.vocab_size * 4 for c in program.collectives if c.kind == "all-gather")
    assert program.large_copies(WEIGHT) == []


@pytest.mark.parametrize(
    ("kind", "dtype", "rows", "config"),
    layered(
        [(*gpu, rows, config) for gpu in GPUS for rows in (1, 8, 64) for config in (CONFIG, SHALLOW)],
        lambda kind, dtype, rows, config: config is SHALLOW and (kind, rows) == ("h100", 8),
    ),
)
def test_tensor_decode_keeps_its_promise(kind: str, dtype: str, rows: int, config: ModelConfig) -> None:
    steps = Steps(config, laid_out(kind, "tensor"), dtype)
    program = read(decode(steps, rows))
    keeps_promise_of_tensor(program, rows, config.num_layers)
    assert program.memory is not None
    assert program.memory.temp < 20e6  # heads of one query each: their pages are read where they lie
    if kind == "v100" and rows <= 8:
        assert program.memory.argument + program.memory.temp < 0.9 * 32e9


@pytest.mark.full  # test_promises has it of two layers
@pytest.mark.parametrize(("kind", "dtype"), GPUS)
def test_tensor_prefill_keeps_its_promise(kind: str, dtype: str) -> None:
    program = read(prefill(Steps(CONFIG, laid_out(kind, "tensor"), dtype)))
    keeps_promise_of_tensor(program, MAX_STEP_TOKENS // 16)
    assert program.memory is not None and program.memory.temp < 100e6


@pytest.mark.parametrize(("kind", "dtype"), GPUS)
def test_more_layers_hold_no_more(kind: str, dtype: str) -> None:
    def temporaries(layers: int) -> list[int]:
        steps = Steps(replace(CONFIG, num_layers=layers), laid_out(kind, "tensor"), dtype)
        return [one.temp_bytes() for one in (prefill(steps), decode(steps, 64))]

    assert temporaries(6) == pytest.approx(temporaries(3), rel=0.02)


@pytest.mark.parametrize(("kind", "dtype"), GPUS)
@pytest.mark.parametrize("layout_name", ["tensor", "replicated"])
def test_as_many_rows_as_pages_are_no_reason_for_a_copy(kind: str, dtype: str, layout_name: str) -> None:
    steps = Steps(replace(CONFIG, num_layers=3), laid_out(kind, layout_name), dtype)
    program = read(decode(steps, 8 * steps.layout.data, 8 * PAGE))
    assert program.large_copies(WEIGHT) == []
    assert program.memory is not None and program.memory.temp < 10e6


@pytest.mark.parametrize(
    ("model", "kind", "dtype", "rows"),
    layered(
        [(model, *gpu, rows) for model in ("gemma-2-27b", "mixtral-8x7b") for gpu in GPUS for rows in (1, 8, 64)],
        lambda model, kind, dtype, rows: (kind, rows) == ("h100", 64),
    ),
)
def test_windows_and_experts_copy_no_pool(model: str, kind: str, dtype: str, rows: int) -> None:
    """Grouped heads are a matrix product, whose pages are put together first: those of a pass, which stay in the second cache."""
    config = replace(PRESETS[model], num_layers=2)
    steps = Steps(config, laid_out(kind, "tensor", config), dtype)
    program = read(decode(steps, rows))
    assert program.count("all-reduce") == 2 * 2 + 1
    assert program.memory is not None
    assert program.memory.temp < 1.5 * PASS_BYTES + 2 * rows * config.vocab_size * 4
    step = read(prefill(steps))
    assert step.count("all-reduce") == 2 * 2 + 1
    assert step.memory is not None and step.memory.temp < 150e6


@pytest.mark.full  # test_promises has it of two layers
def test_replicated_over_data_has_no_collective_in_a_layer() -> None:
    """Two by two: the model axis keeps the promise of `tensor`; over the data axis only the loop's conditions are reduced."""
    program = read(decode(Steps(CONFIG, laid_out("h100", "replicated-2x2"), "bfloat16"), 4))
    large = [c for c in program.collectives if c.nbytes > 64]
    assert sum(c.kind == "all-reduce" for c in large) == 2 * CONFIG.num_layers + 1
    assert sum(c.kind == "all-gather" for c in large) <= 1
    assert program.large_copies(WEIGHT) == []


def score_program(kind: str, dtype: str, layout_name: str, layers: int, width: int) -> HloProgram:
    config, layout = replace(CONFIG, num_layers=layers), laid_out(kind, layout_name)
    return analyse(programs.score(Steps(config, layout, dtype), ROW, width).compile())


ROW = 16384  # tokens of a step on each device


@pytest.mark.parametrize("step", ["decode", "prefill", "score"])
def test_four_products_a_layer(step: str) -> None:
    """And the head's; attention's are in kernels. No weights are put together for one."""
    layers = 2
    steps = Steps(replace(CONFIG, num_layers=layers), laid_out("h100", "tensor"), "bfloat16")
    one = {"decode": decode(steps, 8), "prefill": prefill(steps), "score": programs.score(steps, ROW, 0)}[step]
    computations = analyse(one.compile()).module.computations.values()
    instructions = [i for computation in computations for i in computation.values()]
    products = [i for i in instructions if i.opcode == "dot" or (i.opcode == "custom-call" and "dot_general" in i.source)]
    assert len(products) == 4 * layers + 1
    weights = {shape for p in steps.abstract_params() if len(shape := p.sharding.shard_shape(p.shape)) > 1}
    joined = [name for i in instructions if i.opcode == "concatenate" for name in i.operands]
    shapes = {i.name: array.shape for i in instructions for array in i.results}
    assert not [name for name in joined if shapes.get(name) in weights]


@pytest.mark.parametrize(("kind", "dtype"), GPUS)
def test_products_are_rounded_within(kind: str, dtype: str) -> None:
    """What several weights are multiplied to at once is never written in float32, as the sums of the others are."""
    program = score_program(kind, dtype, "replicated", layers=2, width=8)
    written = [array for i in program.module.computations[program.module.entry].values() for array in i.results]
    sizes = {ROW * 3 * CONFIG.hidden_size, ROW * 2 * CONFIG.intermediate_size}
    assert {array.dtype for array in written if math.prod(array.shape) in sizes} == {"bf16" if dtype == "bfloat16" else "f16"}


@pytest.mark.parametrize(("kind", "dtype"), [("h100", "bfloat16"), ("v100", "float16")])
def test_gathered_scoring_gathers_weights_alone(kind: str, dtype: str) -> None:
    """The embedding, four matrices a layer and the head; and what a layer needs is freed when it is done."""
    program = score_program(kind, dtype, "gathered", layers=4, width=8)
    assert {c.kind for c in program.collectives} == {"all-gather"}
    assert program.count("all-gather") == 4 * 4 + 2
    assert not any(c.in_loop for c in program.collectives)
    # A device's shard of a weight is gathered as it lies.
    assert not [copy for copy in program.large_copies(WEIGHT) if "leaves" in copy.source]
    # Nowhere is there an array of [tokens, vocabulary].
    arrays = [array for computation in program.module.computations.values() for i in computation.values() for array in i.results]
    of_vocabulary = [math.prod(array.shape) for array in arrays if CONFIG.vocab_size in array.shape]
    assert of_vocabulary and max(of_vocabulary) < ROW * CONFIG.vocab_size
    assert program.memory is not None
    whole = program.memory.argument + program.memory.temp + (CONFIG.num_layers - 4) * CONFIG.layer_params * 2 // 4
    assert whole < 0.9 * 32e9
    deeper = score_program(kind, dtype, "gathered", layers=6, width=8)
    assert deeper.memory is not None and deeper.memory.temp < 1.02 * program.memory.temp


@pytest.mark.parametrize(("kind", "dtype"), [("h100", "bfloat16"), ("a100-80gb", "bfloat16"), ("v100", "float16")])
def test_gathers_hide_behind_compute(kind: str, dtype: str) -> None:
    """Each begins before the compute that it hides behind; of the embedding and the first layer's first weight there is none.

    Before Ampere XLA takes what it estimates to last as long, at times less: the products wait under a hundredth of their time.
    """
    layers = 4
    program = score_program(kind, dtype, "gathered", layers=layers, width=8)
    overlaps = program.overlaps("all-gather")
    assert len(overlaps) == 4 * layers + 2
    rates = hardware(target_devices(kind, 1)[0])
    assert rates is not None
    waits = 0.0
    for overlap in overlaps[2:-1]:
        assert overlap.moved > 0
        if not overlap.products:  # one of 16,384 tokens takes ten times as long as its weight's way over NVLink
            gather = 3 / 4 * overlap.collective.nbytes / rates.link
            waits += max(0.0, gather - overlap.moved / rates.bandwidth)
    assert waits == 0 or kind == "v100"
    assert waits < 1e-2 * layers * 2 * ROW * CONFIG.layer_params / rates.flops
    assert overlaps[-1].moved > 0  # the head's, once a step


def test_replicated_scoring_exchanges_nothing() -> None:
    program = score_program("h100", "bfloat16", "replicated", layers=2, width=8)
    assert program.collectives == []


@pytest.mark.parametrize(("kind", "dtype"), [("h100", "bfloat16"), ("v100", "float16")])
def test_gathered_decode_holds_two_layers_at_a_time(kind: str, dtype: str) -> None:
    """However many there are; and only weights are gathered, in every step of the loop."""
    layout = laid_out(kind, "gathered")
    found = [read(decode(Steps(replace(CONFIG, num_layers=layers), layout, dtype), 4)) for layers in (3, 6)]
    for program, layers in zip(found, (3, 6), strict=True):
        large = [c for c in program.collectives if c.nbytes > WEIGHT]
        assert {c.kind for c in large} == {"all-gather"}
        assert len(large) == 4 * layers + 2
        assert all(c.in_loop for c in large)
    few, many = (program.memory for program in found)
    assert few is not None and many is not None
    table = CONFIG.vocab_size * CONFIG.hidden_size
    assert many.temp == pytest.approx(few.temp, rel=0.01)
    assert many.temp < 2 * (2 * CONFIG.layer_params + 2 * table)

"""Plans for devices that are not here: what fits, the layout that `auto` takes and the roofline it is chosen by, remedies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import pytest

from jaxllm.decoder import kv_cache as kv
from jaxllm.decoder.cache_spec import Pool
from jaxllm.execution.steps import Steps
from jaxllm.planning.estimate import estimates
from jaxllm.planning.plan import MEMORY_UTILIZATION, Run, cache_bytes, find_plan, layouts, weight_bytes
from jaxllm.planning.presets import PRESETS
from jaxllm.planning.remedies import DoesNotFitError, plan_or_refuse, remedies
from jaxllm.planning.roofline import StepSeconds, decode_step, score_step, seconds_per_token
from sharding.hardware import AbsentDevice, absent, absent_devices, named
from sharding.layout import make_layout

pytestmark = pytest.mark.fast

GB = 10**9


def four(kind: str, memory: int | None = None) -> list[AbsentDevice]:
    known = named(kind)
    return absent(known if memory is None else replace(known, memory=memory), 4)


@pytest.mark.parametrize(
    ("kind", "memory", "model", "dtype", "chosen"),
    [
        ("v100", None, "llama-30b", "float16", "gathered"),
        ("h100", None, "llama-30b", "bfloat16", "replicated"),
        ("h100", 60 * GB, "llama-30b", "bfloat16", "gathered"),
        ("v100", None, "llama-7b", "float16", "replicated"),
    ],
)
def test_auto_scores_on_the_fastest_layout_that_fits(kind: str, memory: int | None, model: str, dtype: str, chosen: str) -> None:
    assert find_plan(Run(PRESETS[model], four(kind, memory), dtype, workload="score")).layout.name == chosen


@pytest.mark.parametrize(
    ("kind", "model", "chosen"),
    [("v100", "llama-30b", "tensor"), ("h100", "llama-7b", "tensor"), ("h100", "smollm2-135m", "replicated")],
)
def test_auto_generates_where_the_next_token_comes_first(kind: str, model: str, chosen: str) -> None:
    """Splitting a model of 135 M parameters saves less than the exchanges take."""
    assert find_plan(Run(PRESETS[model], four(kind), "float16")).layout.name == chosen


def test_layouts_over_some_devices() -> None:
    assert layouts(1) == ["tensor"]
    assert layouts(4) == ["replicated", "gathered", "replicated-2x2", "gathered-2x2", "tensor"]


@pytest.mark.parametrize("model", sorted(PRESETS))
@pytest.mark.parametrize("name", ["tensor", "gathered", "replicated", "gathered-2x2"])
def test_bytes_of_weights_and_cache_are_those_of_the_arrays(model: str, name: str) -> None:
    config = PRESETS[model]
    layout = make_layout(name, jax.devices()[:4], config.hidden_size)
    steps = Steps(config, layout, "bfloat16")
    leaves = steps.abstract_params()
    assert weight_bytes(config, layout, "bfloat16") == sum(map(held, leaves))
    pool = Pool.of(config, 1024, 8 // layout.data * 1024, 8 // layout.data)
    cache = kv.abstract(steps.cache_specs, layout, pool.pages)
    assert cache_bytes(config, layout, "bfloat16", 8, 1024) == sum(held(x) for layer in cache for x in layer)


def held(x: jax.ShapeDtypeStruct) -> int:
    assert x.sharding is not None
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def test_the_challenge_fits() -> None:
    """LLaMA-30B in 16 bits on four V100 of 32 GB."""
    found = {one.layout: one for one in estimates(PRESETS["llama-30b"], four("v100"), "float16", named("v100"))}
    assert {name for name, one in found.items() if one.fits} == {"gathered", "gathered-2x2", "tensor"}
    assert all(one.scores == one.fits for one in found.values())
    assert found["tensor"].weight_bytes == 16_265_679_872


@pytest.mark.parametrize("name", layouts(4))
@pytest.mark.parametrize(("kind", "model"), [("v100", "llama-30b"), ("h100", "llama-7b"), ("l4", "llama-7b")])
def test_what_is_said_to_fit_fits_and_no_more(kind: str, model: str, name: str) -> None:
    config, devices = PRESETS[model], four(kind)
    found = next(one for one in estimates(config, devices, "float16", named(kind)) if one.layout == name)

    def fits(rows: int, length: int) -> bool:
        """Does a run's cache hold so many sequences of this length at once?"""
        plan = find_plan(Run(config, devices, "float16", name, length, rows))
        return plan.fits and plan.sequences >= rows

    if found.sequences:
        assert fits(found.sequences, config.max_position)
    assert not fits(found.sequences + found.data, config.max_position)
    assert found.longest == 0 or fits(1, found.longest)
    assert found.longest == config.max_position or not fits(1, found.longest + 512)


RUNS = [
    Run(PRESETS["llama-30b"], absent_devices("2x rtx 4090"), "float16"),
    Run(PRESETS["llama-30b"], absent_devices("2x rtx 4090"), "float16", workload="score"),
    Run(PRESETS["llama-30b"], absent_devices("4xV100"), "float32"),
    Run(PRESETS["llama-30b"], absent_devices("4xV100"), "float16", "replicated"),
    Run(PRESETS["llama-30b"], absent_devices("4xV100"), "float16", "tensor", 2048, 1 << 16),
    Run(PRESETS["llama-7b"], absent_devices("L4"), "float32", max_model_len=2048, max_num_seqs=16),
    Run(PRESETS["llama-7b"], absent(replace(named("v100"), memory=158 * GB // 10), 1), "float16", max_model_len=2048),
]
REMEDIES = [
    ["4 such devices", "2 x A100-40GB"],
    ["4 such devices", "2 x A100-40GB"],
    ["dtype='float16', which halves the weights", "8 such devices", "4 x A100-40GB"],
    ["layout='gathered'", "4 x A100-80GB"],
    ["layout='gathered'", "max_num_seqs=32768", "16 such devices", "4 x L40S"],
    ["dtype='float16', which halves the weights", "2 such devices", "1 x TPU-v6e"],
    ["max_model_len=1024", "2 such devices", "1 x TPU-v5e"],
]


@pytest.mark.parametrize(("run", "expected"), [*zip(RUNS, REMEDIES, strict=True)])
def test_remedies_are_tried(run: Run, expected: list[str]) -> None:
    plan = find_plan(run)
    assert not plan.fits
    found = remedies(run, plan)
    assert [text for text, _ in found] == expected
    assert all(find_plan(changed).fits for _, changed in found)
    with pytest.raises(DoesNotFitError, match=f"layout {plan.layout.name} needs .* GiB of weights") as refused:
        plan_or_refuse(run)
    for text, _ in found:
        assert text in str(refused.value)


@dataclass(frozen=True)
class Card:
    """As much of a `jax.Device` as a plan asks for."""

    id: int
    platform: str
    device_kind: str
    compute_capability: str
    memory_stats: Callable[[], dict[str, int]]
    process_index: int = 0


def test_all_of_a_gpu_is_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA takes three quarters of it unless told otherwise; a card that was told so has no more to give."""
    limit = {"bytes_limit": 64 * GB, "bytes_in_use": 0}
    here = Card(0, "gpu", "NVIDIA H100 80GB HBM3", "9.0", memory_stats=lambda: limit)
    run = Run(PRESETS["llama-30b"], [here], "bfloat16", max_model_len=2048, max_num_seqs=8)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    text, changed = remedies(run, find_plan(run))[0]
    assert text.startswith("XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment") and find_plan(changed).fits
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    assert remedies(run, find_plan(run))[0][0] == "2 such devices"


def test_sequences_share_what_pages_fit() -> None:
    """Memory that holds one sequence of the whole context still lets many shorter ones run; what is over becomes pages."""
    plan = find_plan(Run(PRESETS["llama-30b"], four("v100"), "float16", "tensor"))
    assert (plan.max_model_len, plan.max_num_seqs, plan.sequences) == (2048, 64, 18)
    one_page = 60 * 2 * 13 * 64 * 128 * 2  # of keys and values, on one device
    assert plan.nbytes <= MEMORY_UTILIZATION * named("v100").memory < plan.nbytes + one_page
    roomy = find_plan(Run(PRESETS["llama-7b"], four("h100"), "float16", "tensor"))
    assert roomy.sequences == roomy.max_num_seqs == 64


def test_a_steps_time_is_its_flops_and_bytes() -> None:
    """LLaMA-30B on 4 V100 in steps of 16,384 tokens: 65 GFLOP a token at 100 TFLOP/s; 1.05 GB a layer over 150 GB/s."""
    config, rates = PRESETS["llama-30b"], named("v100")

    def step(name: str) -> StepSeconds:
        layout = make_layout(name, four("v100"), config.hidden_size)
        return score_step(config, layout, "float16", rates, 16384, width=8, scored=0)

    gathered, tensor, replicated = step("gathered"), step("tensor"), step("replicated")
    assert gathered.products == pytest.approx(16384 * 64e9 / 100e12, rel=0.02)
    assert gathered.gathers == pytest.approx(3 / 4 * 65e9 / 150e9, rel=0.02)
    assert gathered.total == replicated.total > gathered.gathers  # hidden
    assert tensor.products == pytest.approx(gathered.products / 4)
    assert tensor.reduces == pytest.approx(121 * (2 * 3 / 4 * 16384 * 6656 * 2 / 150e9 + rates.hop))


def test_a_token_reads_the_weights_and_the_cache() -> None:
    """LLaMA-30B on 4 V100: 16 GB over 900 GB/s and 121 exchanges; of 64 rows the cache is more than the weights."""
    config, rates = PRESETS["llama-30b"], named("v100")
    layout = make_layout("tensor", four("v100"), config.hidden_size)
    one, many = (decode_step(config, layout, "float16", rates, rows, 1024) for rows in (1, 64))
    assert one.products == pytest.approx(64.6e9 / 4 / 900e9, rel=0.01)
    assert one.reduces == pytest.approx(121 * rates.hop, rel=0.02)
    assert many.attention == pytest.approx(64 * 1024 * config.kv_bytes_per_token(2) / 4 / 900e9, rel=0.1)
    gathered = make_layout("gathered", four("v100"), config.hidden_size)
    assert decode_step(config, gathered, "float16", rates, 1, 1024).total > 6 * one.total


def test_few_tokens_are_not_worth_gathering_for() -> None:
    config = PRESETS["llama-30b"]

    def seconds(name: str, tokens: int) -> float:
        return seconds_per_token(config, make_layout(name, four("v100"), config.hidden_size), "float16", named("v100"), tokens)

    assert seconds("gathered", 16384) < seconds("tensor", 16384)
    assert seconds("gathered", 128) > seconds("tensor", 128)

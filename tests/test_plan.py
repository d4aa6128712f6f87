"""Which layout `auto` takes for scoring, and the roofline that it is chosen by; four GPUs that are not there."""

from __future__ import annotations

import jax
import pytest

from jaxllm import plan as plan_module
from jaxllm.config import PRESETS
from jaxllm.plan import DoesNotFitError, plan_layout, scoring_layouts
from jaxllm.roofline import StepSeconds, score_step, seconds_per_token
from sharding.hardware import hardware
from sharding.layout import make_layout
from sharding.targets import target_devices

GB = 10**9


def devices(kind: str, count: int = 4) -> list[jax.Device]:
    try:
        return target_devices(kind, count)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("kind", "memory", "model", "dtype", "chosen"),
    [
        ("v100", 32 * GB, "llama-30b", "float16", "gathered"),
        ("h100", 80 * GB, "llama-30b", "bfloat16", "replicated"),
        ("h100", 60 * GB, "llama-30b", "bfloat16", "gathered"),
        ("v100", 32 * GB, "llama-7b", "float16", "replicated"),
    ],
)
def test_auto_scores_on_the_fastest_layout_that_fits(
    monkeypatch: pytest.MonkeyPatch, kind: str, memory: int, model: str, dtype: str, chosen: str
) -> None:
    monkeypatch.setattr(plan_module, "device_memory", lambda device: memory)
    plan = plan_layout("auto", PRESETS[model], devices(kind), dtype, None, 1, "score")
    assert plan.layout.name == chosen
    assert plan_layout("auto", PRESETS["llama-7b"], devices(kind), dtype, None, 1).layout.name == "tensor"


def test_auto_says_what_is_missing_where_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "device_memory", lambda device: 16 * GB)
    with pytest.raises(DoesNotFitError, match=r"layout tensor needs .* GiB of weights .* remedies: use more devices"):
        plan_layout("auto", PRESETS["llama-30b"], devices("v100"), "float16", None, 1, "score")


def test_layouts_over_some_devices() -> None:
    assert scoring_layouts(1) == ["replicated", "gathered", "tensor"]
    assert scoring_layouts(4) == ["replicated", "gathered", "replicated-2x2", "gathered-2x2", "tensor"]


def test_a_steps_time_is_its_flops_and_bytes() -> None:
    """LLaMA-30B on 4 V100 in steps of 16,384 tokens: 65 GFLOP a token at 100 TFLOP/s; 1.05 GB a layer over 150 GB/s."""
    config, four = PRESETS["llama-30b"], devices("v100")
    rates = hardware(four[0])
    assert rates is not None

    def step(name: str) -> StepSeconds:
        return score_step(config, make_layout(name, four, config.hidden_size), "float16", rates, 16384, width=8, scored=0)

    gathered, tensor, replicated = step("gathered"), step("tensor"), step("replicated")
    assert gathered.products == pytest.approx(16384 * 64e9 / 100e12, rel=0.02)
    assert gathered.gathers == pytest.approx(3 / 4 * 65e9 / 150e9, rel=0.02)
    assert gathered.total == replicated.total > gathered.gathers  # hidden
    assert tensor.products == pytest.approx(gathered.products / 4)
    assert tensor.reduces == pytest.approx(60 * 2 * 2 * 3 / 4 * 16384 * 6656 * 2 / 150e9)


def test_few_tokens_are_not_worth_gathering_for() -> None:
    config, four = PRESETS["llama-30b"], devices("v100")
    rates = hardware(four[0])
    assert rates is not None

    def seconds(name: str, tokens: int) -> float:
        return seconds_per_token(config, make_layout(name, four, config.hidden_size), "float16", rates, tokens)

    assert seconds("gathered", 16384) < seconds("tensor", 16384)
    assert seconds("gathered", 128) > seconds("tensor", 128)

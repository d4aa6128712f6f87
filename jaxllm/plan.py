"""What a run needs and whether it fits, before anything is allocated."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxllm import cache as kv
from jaxllm.buckets import cache_length
from jaxllm.config import ModelConfig
from jaxllm.roofline import seconds_per_token
from jaxllm.score import row_length
from jaxllm.steps import Steps
from sharding.hardware import hardware
from sharding.layout import Layout, make_layout
from sharding.mesh import device_memory
from sharding.padding import round_up

USABLE = 0.92  # of a device's free memory; the rest is the compiler's and the driver's
ROWS = (64, 32, 16, 8, 4, 2, 1)


class DoesNotFitError(ValueError):
    """The run needs more memory than a device has; the message holds the bytes and the remedies."""


@dataclass(frozen=True)
class Plan:
    """Sizes of a run, in bytes a device."""

    layout: Layout
    dtype: str
    max_model_len: int
    max_num_seqs: int
    weight_bytes: int
    cache_bytes: int
    working_bytes: int  # of a step, beside weights and cache
    memory: int | None

    @property
    def fits(self) -> bool:
        return self.memory is None or self.weight_bytes + self.cache_bytes + self.working_bytes <= USABLE * self.memory


def make_plan(
    config: ModelConfig,
    layout: Layout,
    dtype: str,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    workload: str = "generate",
) -> Plan:
    """Fill in what the user left open, as much as fits; raises DoesNotFitError when nothing, or what they asked for, does not."""
    memory = device_memory(layout.mesh.devices.flat[0])
    weights = weight_bytes(config, layout, dtype)
    lengths = [max_model_len] if max_model_len else _halves(config.max_position)
    row_choices = [max_num_seqs] if max_num_seqs else ROWS
    for length in lengths:
        for rows in row_choices:
            cache = cache_bytes(config, layout, dtype, rows, length)
            working = score_bytes(config, layout, dtype) if workload == "score" else 2 * cache // config.num_layers
            plan = Plan(layout, dtype, length, rows, weights, cache, working, memory)
            if plan.fits:
                return plan
    raise DoesNotFitError(_refusal(plan))


def plan_layout(
    name: str,
    config: ModelConfig,
    devices: list[Any],
    dtype: str,
    max_model_len: int | None,
    max_num_seqs: int | None,
    workload: str = "generate",
) -> Plan:
    """`make_plan` on the layout `name`, or, of "auto", on the fastest that fits.

    Generating reads all weights for every token: they are split. For scoring, full steps of every layout are compared by their
    roofline; on hardware that is not known here the first that fits is taken, which moves the least.
    """

    def plan(name: str) -> Plan:
        layout = make_layout(name, devices, config.hidden_size)
        return make_plan(config, layout, dtype, max_model_len, max_num_seqs, workload)

    if name != "auto" or workload != "score":
        return plan("tensor" if name == "auto" else name)
    names = scoring_layouts(len(devices))
    fitting = []
    for choice in names:
        with contextlib.suppress(DoesNotFitError):
            fitting.append(plan(choice))
    known = hardware(devices[0])
    if not fitting:
        return plan(names[-1])  # says what is missing
    if known is None:
        return fitting[0]
    tokens = row_length(fitting[0].layout.platform)
    return min(fitting, key=lambda plan: seconds_per_token(config, plan.layout, dtype, known, tokens))


def scoring_layouts(devices: int) -> list[str]:
    """Layouts over so many devices, those that exchange less first."""
    mixed = [(data, devices // data) for data in range(devices - 1, 1, -1) if devices % data == 0]
    kinds = [f"{kind}-{data}x{model}" for kind in ("replicated", "gathered") for data, model in mixed]
    return ["replicated", "gathered", *kinds, "tensor"]


def weight_bytes(config: ModelConfig, layout: Layout, dtype: str) -> int:
    """Bytes of parameters on each device, padding included."""
    total = 0
    for leaf in Steps(config, layout, dtype).abstract_params():
        size = leaf.dtype.itemsize
        for n in leaf.sharding.shard_shape(leaf.shape):
            size *= n
        total += size
    return total


def cache_bytes(config: ModelConfig, layout: Layout, dtype: str, rows: int, length: int) -> int:
    """Bytes of keys and values on each device for `rows` sequences of `length` tokens."""
    platform = layout.mesh.devices.flat[0].platform
    kept = kv.cache_dtype(dtype, platform)
    shapes = kv.abstract(config, layout, round_up(rows, layout.data), cache_length(length, kv.BLOCK), kept)
    k = shapes[0].keys
    elements = 1
    for n in k.sharding.shard_shape(k.shape):
        elements *= n
    return 2 * len(shapes) * elements * jnp.dtype(kept).itemsize


def score_bytes(config: ModelConfig, layout: Layout, dtype: str) -> int:
    """About what a scoring step needs on each device: an ffn's float32 inputs, residuals, and the weights gathered meanwhile."""
    tokens = row_length(layout.mesh.devices.flat[0].platform)
    activations = tokens * (8 * config.intermediate_size // layout.model + 8 * config.hidden_size)
    if not layout.gathered:
        return activations
    widest = 2 * config.intermediate_size + config.vocab_size
    return activations + widest * config.hidden_size * jnp.dtype(dtype).itemsize // layout.model


def _halves(length: int) -> list[int]:
    """`length`, half of it and so on, down to 512."""
    lengths = [length]
    while lengths[-1] > 1024:
        lengths.append(lengths[-1] // 2)
    return lengths


def _refusal(plan: Plan) -> str:
    gib = 1 << 30
    assert plan.memory is not None
    name = plan.layout.name
    remedies = []
    if plan.weight_bytes > USABLE * plan.memory:
        if plan.dtype == "float32":
            remedies.append("dtype='bfloat16' halves the weights")
        if name.startswith("replicated"):
            remedies.append("layout='tensor' or 'gathered' splits them over the devices")
        remedies.append("use more devices")
    else:
        remedies.append(f"max_model_len below {plan.max_model_len}")
        if plan.max_num_seqs > 1:
            remedies.append(f"max_num_seqs below {plan.max_num_seqs}")
        remedies.append("more devices")
    return (
        f"does not fit: layout {name} needs {plan.weight_bytes / gib:.2f} GiB of weights and {plan.cache_bytes / gib:.2f} GiB of "
        f"cache ({plan.max_num_seqs} x {plan.max_model_len} tokens), beside {plan.working_bytes / gib:.2f} GiB to work with, on "
        f"each device, which has {plan.memory / gib:.2f} GiB free; remedies: {'; '.join(remedies)}"
    )

"""What a run needs and whether it fits, before anything is allocated."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxllm import cache as kv
from jaxllm.buckets import cache_length
from jaxllm.config import ModelConfig
from jaxllm.steps import Steps
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
    memory: int | None


def make_plan(
    config: ModelConfig, layout: Layout, dtype: str, max_model_len: int | None = None, max_num_seqs: int | None = None
) -> Plan:
    """Fill in what the user left open, as much as fits; raises DoesNotFitError when nothing, or what they asked for, does not."""
    memory = device_memory(layout.mesh.devices.flat[0])
    weights = weight_bytes(config, layout, dtype)
    lengths = [max_model_len] if max_model_len else _halves(config.max_position)
    row_choices = [max_num_seqs] if max_num_seqs else ROWS
    plans = [
        Plan(layout, dtype, length, rows, weights, cache_bytes(config, layout, dtype, rows, length), memory)
        for length in lengths
        for rows in row_choices
    ]
    for plan in plans:
        if memory is None or plan.weight_bytes + 2 * plan.cache_bytes // config.num_layers + plan.cache_bytes <= USABLE * memory:
            return plan
    raise DoesNotFitError(_refusal(config, plans[-1]))


AUTO = {"generate": ("tensor",), "score": ("replicated", "gathered")}


def plan_layout(
    name: str,
    config: ModelConfig,
    devices: list[Any],
    dtype: str,
    max_model_len: int | None,
    max_num_seqs: int | None,
    workload: str = "generate",
) -> Plan:
    """`make_plan` on the layout `name`; "auto" is the first that fits of those that suit the workload.

    Generating reads all weights for every token: they are split. Scoring moves nothing if each device holds the model, and if
    none can, gathers weights rather than exchange the activations of thousands of tokens.
    """
    names = AUTO[workload] if name == "auto" else (name,)
    for choice in names[:-1]:
        with contextlib.suppress(DoesNotFitError):
            return make_plan(config, make_layout(choice, devices, config.hidden_size), dtype, max_model_len, max_num_seqs)
    return make_plan(config, make_layout(names[-1], devices, config.hidden_size), dtype, max_model_len, max_num_seqs)


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


def _halves(length: int) -> list[int]:
    """`length`, half of it and so on, down to 512."""
    lengths = [length]
    while lengths[-1] > 1024:
        lengths.append(lengths[-1] // 2)
    return lengths


def _refusal(config: ModelConfig, plan: Plan) -> str:
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
        f"cache ({plan.max_num_seqs} x {plan.max_model_len} tokens) on each device, which has {plan.memory / gib:.2f} GiB free; "
        f"remedies: {'; '.join(remedies)}"
    )

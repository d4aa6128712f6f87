"""Single changes that make a run fit that does not, cheapest first, each of them tried."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jaxllm.planning.plan import Plan, Run, find_plan, layouts
from sharding.hardware import KNOWN, AbsentDevice, Hardware, absent, hardware

GIB = 1 << 30
# XLA takes so much of a GPU's memory when jax starts, and how it is told to take more
TAKEN, GIVEN = 0.75, 0.95
FRACTIONS = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
COUNTS = (2, 4, 8, 16, 32, 64)  # as machines have them


class DoesNotFitError(ValueError):
    """The run needs more memory than a device has; the message holds the bytes and the remedies."""


def plan_or_refuse(run: Run) -> Plan:
    """The plan of `find_plan`. Raises DoesNotFitError where it does not fit."""
    plan = find_plan(run)
    if plan.fits:
        return plan
    assert plan.memory is not None
    needs = f"{plan.weight_bytes / GIB:.2f} GiB of weights"
    if run.workload == "generate":
        needs += f" and {plan.cache_bytes / GIB:.2f} GiB of cache (a sequence of {plan.max_model_len} tokens on each data shard)"
    found = "; ".join(text for text, _ in remedies(run, plan)) or "a smaller model"
    raise DoesNotFitError(
        f"does not fit: layout {plan.layout.name} needs {needs}, beside {plan.working_bytes / GIB:.2f} GiB to work with, on "
        f"each device, which has {plan.memory / GIB:.2f} GiB free; remedies: {found}"
    )


def remedies(run: Run, plan: Plan) -> list[tuple[str, Run]]:
    """(text, changed run) of changes to `run`, whose `plan` does not fit, that make it fit: the first of each kind."""
    found = (next((change for change in kind if find_plan(change[1]).fits), None) for kind in _changes(run, plan))
    return [change for change in found if change]


def _changes(run: Run, plan: Plan) -> Iterator[list[tuple[str, Run]]]:
    """Lists of changes, one list a kind; the cheapest first."""
    if run.layout != "auto":
        others = [name for name in layouts(len(run.devices)) if name != run.layout]
        yield [(f"layout='{name}'", replace(run, layout=name)) for name in others]
    if run.max_num_seqs:
        yield [(f"max_num_seqs={n}", replace(run, max_num_seqs=n)) for n in _halves(run.max_num_seqs)]
    if run.max_model_len:
        yield [(f"max_model_len={n}", replace(run, max_model_len=n)) for n in _halves(run.max_model_len)]
    if run.dtype == "float32":
        half = "float16" if run.config.dtype == "float16" else "bfloat16"
        yield [(f"dtype='{half}', which halves the weights", replace(run, dtype=half))]
    device, count = run.devices[0], len(run.devices)
    if device.platform == "cpu":  # its devices share one memory
        return
    if not isinstance(device, AbsentDevice) and device.platform == "gpu" and not any(name in os.environ for name in FRACTIONS):
        given = _with_memory(hardware(device), int((plan.memory or 0) * GIVEN / TAKEN), device)
        yield [(f"{FRACTIONS[0]}={GIVEN} in the environment, for XLA takes {TAKEN} of a GPU unless told otherwise",
                replace(run, devices=absent(given, count)))]  # fmt: skip
    free = _with_memory(hardware(device), plan.memory, device)
    layout = run.layout if run.layout in ("tensor", "gathered", "replicated") else "auto"
    yield [(f"{n} such devices", replace(run, devices=absent(free, n), layout=layout)) for n in COUNTS if n > count]
    larger = sorted((known for known in KNOWN if known.memory > free.memory), key=lambda known: known.memory)
    yield [(f"{count} x {known.name}", replace(run, devices=absent(known, count))) for known in larger]


def _halves(n: int) -> list[int]:
    return [n >> i for i in range(1, n.bit_length())]


def _with_memory(rates: Hardware | None, memory: int | None, device: Any) -> Hardware:
    """The device's rates, with its free memory as its memory."""
    memory = memory or 0
    if rates is not None:
        return replace(rates, memory=memory)
    capability = str(device.compute_capability) if device.platform == "gpu" else None
    return Hardware(device.device_kind, "", memory, 1.0, 1.0, 1.0, 1.0, 0.0, capability)

"""Predicted time of the challenge on GPUs that are not here: the program compiled for them, and its steps' roofline.

Nothing of it is measured. The products' rate is the published one times what such GPUs reach; a step's time is the sum of its
parts, with gathers hidden where they are shorter.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from typing import Any

from jaxllm.execution.batch import abstract_batch, empty_packed_batch
from jaxllm.execution.steps import Steps
from jaxllm.planning.presets import PRESETS
from jaxllm.planning.roofline import MAX_MFU, StepSeconds, score_step
from jaxllm.platforms import choices
from jaxllm.scoring.scorer import Packing, Scorer
from sharding.hardware import hardware
from sharding.hlo import analyse
from sharding.layout import Layout, make_layout
from sharding.targets import compile_for_cuda, target_devices

GIB = 1 << 30


def target_layout(args: argparse.Namespace) -> Layout:
    """The layout `--layout` over the GPUs that `--on` names, such as 4xV100.

    Raises ValueError for anything else, RuntimeError where jax's CUDA plugin is missing.
    """
    match = re.fullmatch(r"([1-9]\d*)x(\S+)", args.on)
    if not match:
        raise ValueError(f"--on {args.on}: name a count and a GPU, such as 4xV100")
    return make_layout(args.layout, target_devices(match[2].lower(), int(match[1])), PRESETS[args.config].hidden_size)


def target_scorer(args: argparse.Namespace, layout: Layout) -> Scorer:
    """A scorer that packs and compiles for those GPUs; it has no parameters to run with."""
    return Scorer(Steps(PRESETS[args.config], layout, args.dtype), list, choices(layout.platform).scoring_row)


def predict(scorer: Scorer, packing: Packing) -> dict[str, Any]:
    """Compile the widest step, add up the roofline of all, print both."""
    steps, layout = scorer.steps, scorer.layout
    device = layout.mesh.devices.flat[0]
    rates = hardware(device)
    assert rates is not None, f"every GPU to compile for is in sharding.hardware; {device.device_kind} is not"
    batches = scorer.batches(packing)
    widest = max(shape for _, shape in batches)
    batch = abstract_batch(layout, empty_packed_batch(layout, widest.length, widest.max_scored))
    program = analyse(compile_for_cuda(steps.score, steps.abstract_params(), batch, width=widest.width))
    assert program.memory is not None
    kinds = {kind: program.count(kind) for kind in sorted({c.kind for c in program.collectives})}
    early = sum(overlap.moved > 0 for overlap in program.overlaps("all-gather"))
    print(f"{layout.name} on {layout.mesh.size} x {rates.name}: {program.memory.argument / GIB:.1f} GiB of weights and "
          f"{program.memory.temp / GIB:.1f} GiB of temporaries on each; collectives {kinds or 'none'}, "
          f"{early} all-gathers begun before work that hides them")  # fmt: skip
    times = []
    for rows, shape in batches:
        scored = max(len(one.scored) for one in rows)
        times.append(score_step(steps.config, layout, steps.dtype, rates, shape.length, shape.width, scored))
    total = sum(step.total for step in times)
    parts = {f.name: sum(getattr(step, f.name) for step in times) for f in fields(StepSeconds)}
    print(f"predicted: {len(times)} steps, {total:.1f} s of scoring at {MAX_MFU:.0%} of {rates.flops / 1e12:.0f} TFLOP/s: "
          + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items()))  # fmt: skip
    return {"hardware": rates.name, "count": layout.mesh.size, "argument_bytes": program.memory.argument,
            "temp_bytes": program.memory.temp, "collectives": kinds, "gathers_begun_early": early, "steps": len(times),
            "predicted_score_seconds": total, "predicted_parts": parts}  # fmt: skip

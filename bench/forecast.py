"""Predictions of a plan for the devices that are here, beside measurements.

    python -m bench.forecast --layout tensor --virtual-devices 4
    python -m bench.forecast --layout gathered --virtual-devices 4 --save FILE.json

Bytes of weights and cache are counted in the arrays, temporaries are the compiler's, times are medians of whole calls of the
engine. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import jax
import numpy as np

from bench.latency import run
from bench.machine import describe, median_seconds, report
from bench.subject import Subject, add_options
from checkpoints.hub import rates_dir
from jaxllm.execution import programs
from jaxllm.planning.measure import measured
from jaxllm.planning.plan import weight_bytes
from jaxllm.planning.roofline import decode_step, prefill_step, score_step
from jaxllm.planning.working_memory import score_bytes, step_bytes
from jaxllm.platforms import choices
from jaxllm.scoring.scorer import Scorer
from sharding.hardware import Hardware

PROMPT, NEW = 512, 33  # tokens
BATCHES = (1, 8)
WIDTH = 4  # tiles that a tile of a scored row sees, on average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    args = parser.parse_args()
    subject = Subject(args, max_model_len=2 * PROMPT, max_num_seqs=max(BATCHES))
    layout = subject.plan.layout
    rates = measured(list(layout.mesh.devices.flat), args.dtype, rates_dir())
    rows = [*generating(subject, rates, args), scoring(subject, rates, args), *sizes(subject)]
    print(f"{subject.name}, {args.dtype}, layout {layout.name} on {layout.mesh.size} device(s)")
    print(f"  {'':<34}{'predicted':>14}{'actual':>14}{'ratio':>8}")
    for row in rows:
        row["ratio"] = row["predicted"] / row["actual"]
        unit = "10.1f} ms" if row["unit"] == "s" else "13,.0f} "
        scale = 1e3 if row["unit"] == "s" else 1
        values = "".join(("{:" + unit).format(scale * row[key]).rjust(14) for key in ("predicted", "actual"))
        print(f"  {row['what']:<34}{values}{row['ratio']:>8.2f}")
    report({"bench": "forecast", "model": subject.name, "dtype": args.dtype, "layout": layout.name, "devices": layout.mesh.size,
            "machine": describe(), "repeats": args.repeats, "rows": rows}, args.save)  # fmt: skip


def generating(subject: Subject, rates: Hardware, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds until a prompt's first token, and a decode step of each batch, predicted and measured."""
    config, layout = subject.config, subject.plan.layout
    rows = []
    for batch in BATCHES:
        prompts = np.random.default_rng(0).integers(5, config.vocab_size, (batch, PROMPT)).tolist()
        run(subject, prompts, NEW)
        firsts, steps = zip(*(run(subject, prompts, NEW) for _ in range(args.repeats)), strict=True)
        if batch == 1:
            predicted = prefill_step(config, layout, args.dtype, rates, PROMPT).total
            rows.append({"what": f"prompt of {PROMPT}", "unit": "s", "predicted": predicted, "actual": statistics.median(firsts)})
        each = -(-batch // layout.data)
        predicted = decode_step(config, layout, args.dtype, rates, each, PROMPT + NEW).total
        rows.append({"what": f"decode, batch {batch}", "unit": "s", "predicted": predicted, "actual": statistics.median(steps)})
    return rows


def scoring(subject: Subject, rates: Hardware, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a full scoring step, predicted and measured: questions of 60 tokens with four endings of 24."""
    config, layout, engine = subject.config, subject.plan.layout, subject.engine
    tokens = choices(layout.platform).scoring_row
    scorer = Scorer(engine.steps, lambda: engine.runner.params, tokens)
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(layout.data * tokens // (60 + 4 * 23)):
        context = rng.integers(5, config.vocab_size, 60).tolist()
        pairs += [(context, rng.integers(5, config.vocab_size, 24).tolist()) for _ in range(4)]
    packing = scorer.pack(pairs)
    batches = scorer.batches(packing)
    scorer.compile(packing)
    actual = median_seconds(lambda: list(scorer.run(packing)), args.repeats)
    scored = max(len(one.scored) for rows, _ in batches for one in rows)
    one = score_step(config, layout, args.dtype, rates, packing.length, WIDTH, scored).total
    return {
        "what": f"score, {len(batches)} step(s) of {packing.length}",
        "unit": "s",
        "predicted": len(batches) * one,
        "actual": actual,
    }


def sizes(subject: Subject) -> list[dict[str, Any]]:
    """Bytes of the first device, predicted and counted."""
    config, engine, layout = subject.config, subject.engine, subject.plan.layout
    dtype, device = subject.plan.dtype, layout.mesh.devices.flat[0]

    def held(arrays: list[jax.Array]) -> int:
        return sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards if shard.device == device)

    rows, pool, tokens = max(BATCHES), engine.pool, choices(layout.platform).scoring_row
    generating = (programs.prefill(engine.steps, PROMPT, pool), programs.decode(engine.steps, rows, pool))
    scoring = programs.score(engine.steps, tokens, 0 if layout.platform == "cpu" else WIDTH)
    pairs = {
        "weights": (weight_bytes(config, layout, dtype), held(engine.runner.params)),
        "cache": (pool.nbytes(layout, engine.steps.cache_specs), held([x for layer in engine.runner.cache for x in layer])),
        "temporaries, generating": (
            step_bytes(config, layout, dtype, rows, pool.max_model_len),
            max(one.temp_bytes() for one in generating),
        ),
        "temporaries, scoring": (score_bytes(config, layout, dtype), scoring.temp_bytes()),
    }
    return [{"what": what, "unit": "B", "predicted": a, "actual": b} for what, (a, b) in pairs.items()]


if __name__ == "__main__":
    main()

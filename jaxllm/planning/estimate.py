"""Costs of each layout on some devices, which need not be there: bytes, the batches that fit, seconds a step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import jax.numpy as jnp

from jaxllm.config import ModelConfig
from jaxllm.decoder.moe import products
from jaxllm.planning.plan import CONTEXT, Run, cache_bytes, find_plan, largest, layouts, weight_bytes
from jaxllm.planning.roofline import decode_step, prefill_step, seconds_per_token
from jaxllm.planning.working_memory import score_bytes, step_bytes
from jaxllm.platforms import choices
from sharding.hardware import Hardware
from sharding.layout import Layout, make_layout

BATCHES = (1, 8, 64)
HELLASWAG = 1_758_791  # tokens of its validation set under LLaMA's tokenizer, as one trie in rows of 16,384
PROMPT = 512  # tokens


@dataclass(frozen=True)
class Step:
    """One decode step.

    Attributes:
      batch: sequences, on all devices together.
      flops: FLOPs of one device.
      nbytes: bytes of weights and cache that one device reads.
      seconds: the step's time; `collective_seconds` of it in collectives.
    """

    batch: int
    fits: bool
    flops: float
    nbytes: int
    seconds: float
    collective_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.seconds


@dataclass(frozen=True)
class Estimate:
    """A layout's costs; bytes are those of one device.

    Attributes:
      cache_bytes: bytes of one sequence as long as the model allows.
      generate_bytes, score_bytes: about the bytes a step needs beside weights and cache.
      sequences: most sequences of that length that fit, all devices together; 0 where none does.
      longest: tokens of the longest single sequence that fits.
      scores: whether scoring fits.
      first_token: seconds for a prompt of PROMPT tokens; None without the hardware's rates, as all that follows.
      steps: decode steps with CONTEXT positions in the cache.
      hellaswag: seconds to score HELLASWAG tokens; the model's own tokenizer may give another number.
    """

    layout: str
    data: int
    model: int
    weight_bytes: int
    cache_bytes: int
    generate_bytes: int
    score_bytes: int
    sequences: int
    longest: int
    scores: bool
    first_token: float | None = None
    steps: tuple[Step, ...] = ()
    hellaswag: float | None = None

    @property
    def fits(self) -> bool:
        return self.sequences > 0

    def as_json(self) -> dict[str, Any]:
        steps = [asdict(step) | {"tokens_per_second": step.tokens_per_second} for step in self.steps]
        return asdict(self) | {"fits": self.fits, "steps": steps}


def estimates(config: ModelConfig, devices: list[Any], dtype: str, rates: Hardware | None) -> list[Estimate]:
    """An estimate for every layout over these devices; without `rates` none of their times are known."""
    return [_estimate(config, make_layout(name, devices, config.hidden_size), dtype, rates) for name in layouts(len(devices))]


def _estimate(config: ModelConfig, layout: Layout, dtype: str, rates: Hardware | None) -> Estimate:
    run = Run(config, list(layout.mesh.devices.flat), dtype, layout.name, max_num_seqs=1)
    sequences = largest(lambda n: _fit(run, layout, n * layout.data, config.max_position), MOST_SEQUENCES)
    found = Estimate(
        layout=layout.name,
        data=layout.data,
        model=layout.model,
        weight_bytes=weight_bytes(config, layout, dtype),
        cache_bytes=_sequence_bytes(config, layout, dtype),
        generate_bytes=step_bytes(config, layout, dtype, 1, config.max_position),
        score_bytes=score_bytes(config, layout, dtype),
        sequences=sequences * layout.data,
        longest=largest(lambda n: find_plan(replace(run, max_model_len=n)).fits, config.max_position),
        scores=find_plan(replace(run, workload="score")).fits,
    )
    if rates is None:
        return found
    prompt = prefill_step(config, layout, dtype, rates, min(PROMPT, config.max_position))
    return replace(
        found,
        first_token=prompt.total,
        steps=tuple(_step(run, layout, rates, batch) for batch in BATCHES),
        hellaswag=HELLASWAG * seconds_per_token(config, layout, dtype, rates, choices(layout.platform).scoring_row),
    )


MOST_SEQUENCES = 1 << 12  # on each data shard


def _sequence_bytes(config: ModelConfig, layout: Layout, dtype: str) -> int:
    """Bytes on its devices of another sequence as long as the model allows; the first comes with the page of nobody."""
    one, two = (cache_bytes(config, layout, dtype, n * layout.data, config.max_position) for n in (1, 2))
    return two - one


def _fit(run: Run, layout: Layout, sequences: int, length: int) -> bool:
    """Do so many sequences of this length fit, all at once?"""
    plan = find_plan(replace(run, max_num_seqs=sequences, max_model_len=length))
    cache = cache_bytes(run.config, layout, run.dtype, sequences, length)
    return replace(plan, cache_bytes=cache).fits


def _step(run: Run, layout: Layout, rates: Hardware, batch: int) -> Step:
    config, rows, context = run.config, -(-batch // layout.data), min(CONTEXT, run.config.max_position)
    times = decode_step(config, layout, run.dtype, rates, rows, context)
    fits = _fit(run, layout, batch, context)
    size = jnp.dtype(run.dtype).itemsize
    chosen = products(config.experts, layout.platform, rows)[0] if config.experts else 0
    weights = config.params_read(chosen)
    nbytes = (weights * size + rows * context * config.kv_bytes_per_token(size)) // layout.model
    flops = rows * config.flops_per_token(context) / layout.model
    return Step(batch, fits, flops, nbytes, times.total, times.gathers + times.reduces)

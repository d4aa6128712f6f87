"""The steps' programs by shape, for compiling them without weights or requests."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax.stages import Compiled, Wrapped

from jaxllm.buckets import PAGE
from jaxllm.decoder import kv_cache as kv
from jaxllm.decoder.cache_spec import Pool
from jaxllm.execution.batch import (
    abstract_batch,
    empty_decode_batch,
    empty_packed_batch,
    empty_sampling_batch,
    empty_token_batch,
)
from jaxllm.execution.steps import Steps
from sharding.hlo import analyse
from sharding.targets import compile_for


class StepProgram(NamedTuple):
    """A jitted step and the shapes of what it is given."""

    name: str
    step: Wrapped
    args: tuple[Any, ...]
    static: dict[str, Any]

    def compile(self) -> Compiled:
        return compile_for(self.step, *self.args, **self.static)

    def temp_bytes(self) -> int:
        """Bytes it holds on a device beside its arguments and results, by the compiler's account."""
        memory = analyse(self.compile()).memory
        assert memory is not None, "every compiler here tells"
        return memory.temp


def decode(steps: Steps, rows: int, pool: Pool, *, random: bool = False, width: int | None = None) -> StepProgram:
    """The program that decodes `rows` rows, a multiple of the data axis.

    Args:
      pool: pages of the cache.
      random: some rows sample.
      width: pages that attention reaches; None: those of the longest sequence of the pool.
    """
    sampling = empty_sampling_batch(rows, filters=random)
    batch = empty_decode_batch(rows, len(pool.pages), width or pool.width, sampling)
    args = (steps.abstract_params(), _cache(steps, pool), abstract_batch(steps.layout, batch))
    return StepProgram(f"decode of {rows} rows{_how(random, width)}", steps.decode, args, {})


def prefill(steps: Steps, tokens: int, pool: Pool, *, random: bool = False, width: int | None = None) -> StepProgram:
    """The program that prefills `tokens` of prompts on each data shard; the rest as of `decode`."""
    batch, last = empty_token_batch(steps.layout, tokens, len(pool.pages), width or pool.width)
    batch = abstract_batch(steps.layout, (batch, last, empty_sampling_batch(len(last), filters=random)))
    args = (steps.abstract_params(), _cache(steps, pool), *batch)
    return StepProgram(f"prefill of {tokens} tokens{_how(random, width)}", steps.prefill, args, {})


def _how(random: bool, width: int | None) -> str:
    reach = "" if width is None else f" up to position {width * PAGE}"
    return f"{reach}, sampled" if random else reach


def score(steps: Steps, tokens: int, width: int) -> StepProgram:
    """The program that scores a row of `tokens` on each data shard, all of which may go to the head.

    `width`: see `tree_attention`.
    """
    batch = abstract_batch(steps.layout, empty_packed_batch(steps.layout, tokens, tokens))
    return StepProgram(f"score of {tokens} tokens", steps.score, (steps.abstract_params(), batch), {"width": width})


def empty_cache(steps: Steps, pool: Pool) -> list[StepProgram]:
    """The programs that make the arrays of an empty cache, one for each shape."""
    arrays = dict.fromkeys(x for layer in _cache(steps, pool) for x in layer)
    return [StepProgram("empty cache", kv.zeros(x), (), {}) for x in arrays]


def _cache(steps: Steps, pool: Pool) -> kv.Cache:
    return kv.abstract(steps.cache_specs, steps.layout, pool.pages)

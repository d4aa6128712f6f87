"""The steps' programs by shape, for compiling them without weights or requests."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax.stages import Compiled, Wrapped

from jaxllm.decoder import kv_cache as kv
from jaxllm.decoder.cache_spec import padded_length
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


def decode(steps: Steps, rows: int, length: int, *, random: bool = False) -> StepProgram:
    """The program that decodes `rows` rows over `length` positions.

    `rows` is a multiple of the data axis, `length` of the cache's block. `random`: some rows sample.
    """
    batch = empty_decode_batch(rows, empty_sampling_batch(rows, filters=random))
    length = padded_length(steps.layout, rows, length)
    args = (steps.abstract_params(), _cache(steps, rows, length), abstract_batch(steps.layout, batch))
    return StepProgram(f"decode of {rows} rows, {length} positions", steps.decode, args, {})


def prefill(steps: Steps, tokens: int, rows: int, length: int, *, random: bool = False) -> StepProgram:
    """The program that prefills `tokens` of a prompt on each data shard, into a cache of `rows` and `length`."""
    data = steps.layout.data
    batch = abstract_batch(steps.layout, (*empty_token_batch(data, tokens), empty_sampling_batch(data, filters=random)))
    args = (steps.abstract_params(), _cache(steps, rows, length), *batch)
    return StepProgram(f"prefill of {tokens} tokens, {length} positions", steps.prefill, args, {})


def score(steps: Steps, tokens: int, width: int) -> StepProgram:
    """The program that scores a row of `tokens` on each data shard, all of which may go to the head.

    `width`: see `tree_attention`.
    """
    batch = abstract_batch(steps.layout, empty_packed_batch(steps.layout, tokens, tokens))
    return StepProgram(f"score of {tokens} tokens", steps.score, (steps.abstract_params(), batch), {"width": width})


def empty_cache(steps: Steps, rows: int, length: int) -> list[StepProgram]:
    """The programs that make the arrays of an empty cache, one for each shape."""
    arrays = dict.fromkeys(x for layer in _cache(steps, rows, length) for x in layer)
    return [StepProgram(f"empty cache of {rows} rows, {length} positions", kv.zeros(x), (), {}) for x in arrays]


def grown_cache(steps: Steps, old: tuple[int, int], new: tuple[int, int]) -> list[StepProgram]:
    """The programs that grow a cache from (rows, positions) to others, one for each shape of its arrays."""
    name = f"growing a cache to {new[0]} rows, {new[1]} positions"
    layers = zip(_cache(steps, *old), _cache(steps, *new), strict=True)
    pairs = dict.fromkeys(pair for layer in layers for pair in zip(*layer, strict=True))
    static = {"layout": steps.layout}
    return [StepProgram(name, kv.grow, (x,), static | {"shape": y.shape}) for x, y in pairs if x.shape != y.shape]


def _cache(steps: Steps, rows: int, length: int) -> kv.Cache:
    return kv.abstract(steps.cache_specs, steps.layout, rows, length)

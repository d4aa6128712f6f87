"""The steps' programs by shape, for compiling them without weights or requests."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax.stages import Compiled, Wrapped

from jaxllm.decoder import kv_cache as kv
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


class Program(NamedTuple):
    """A jitted step and the shapes of what it is given."""

    name: str
    step: Wrapped
    args: tuple[Any, ...]
    static: dict[str, Any]

    def compile(self) -> Compiled:
        return compile_for(self.step, *self.args, **self.static)

    def temp_bytes(self) -> int:
        """What it holds on a device beside its arguments and results, as the compiler says."""
        memory = analyse(self.compile()).memory
        assert memory is not None, "every compiler here tells"
        return memory.temp


def decode(steps: Steps, rows: int, length: int, *, random: bool = False) -> Program:
    """Decoding of `rows` rows, a multiple of the data axis, over `length` positions, a multiple of the cache's block.

    `random`: some of them sample.
    """
    batch = empty_decode_batch(rows, empty_sampling_batch(rows, random=random))
    length = kv.positions(steps.layout, rows, length)
    args = (steps.abstract_params(), _cache(steps, rows, length), abstract_batch(steps.layout, batch))
    return Program(f"decode of {rows} rows, {length} positions", steps.decode, args, {})


def prefill(steps: Steps, tokens: int, rows: int, length: int, *, random: bool = False) -> Program:
    """A chunk of `tokens` of a prompt on each part of the data axis, into a cache of `rows` and `length`."""
    data = steps.layout.data
    batch = abstract_batch(steps.layout, (*empty_token_batch(data, tokens), empty_sampling_batch(data, random=random)))
    args = (steps.abstract_params(), _cache(steps, rows, length), *batch)
    return Program(f"prefill of {tokens} tokens, {length} positions", steps.prefill, args, {})


def score(steps: Steps, tokens: int, width: int) -> Program:
    """A row of `tokens` on each part of the data axis, all of which may go to the head; `width`: see `tree_attention`."""
    batch = abstract_batch(steps.layout, empty_packed_batch(steps.layout, tokens, tokens))
    return Program(f"score of {tokens} tokens", steps.score, (steps.abstract_params(), batch), {"width": width})


def empty_cache(steps: Steps, rows: int, length: int) -> list[Program]:
    """What makes the arrays of an empty cache; no two are alike."""
    arrays = dict.fromkeys(x for layer in _cache(steps, rows, length) for x in layer)
    return [Program(f"empty cache of {rows} rows, {length} positions", kv.zeros(x), (), {}) for x in arrays]


def grown_cache(steps: Steps, old: tuple[int, int], new: tuple[int, int]) -> list[Program]:
    """What gives the arrays of a cache other rows and positions."""
    name = f"growing a cache to {new[0]} rows, {new[1]} positions"
    layers = zip(_cache(steps, *old), _cache(steps, *new), strict=True)
    pairs = dict.fromkeys(pair for layer in layers for pair in zip(*layer, strict=True))
    static = {"layout": steps.layout}
    return [Program(name, kv.grow, (x,), static | {"shape": y.shape}) for x, y in pairs if x.shape != y.shape]


def _cache(steps: Steps, rows: int, length: int) -> kv.Cache:
    return kv.abstract(steps.config, steps.layout, rows, length, kv.cache_dtype(steps.dtype, steps.layout.platform))

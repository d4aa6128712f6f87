"""The steps' programs by shape, for compiling them without weights or requests."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.stages import Compiled, Wrapped

from jaxllm.buckets import STOP_ID_WIDTH
from jaxllm.decoder import kv_cache as kv
from jaxllm.decoder.batch import TokenBatch
from jaxllm.execution.batch import DecodeBatch, SamplingBatch, SamplingFilters, abstract_packed_batch
from jaxllm.execution.steps import MAX_STEPS, Steps
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
    ints = np.zeros(rows, np.int32)
    batch = DecodeBatch(ints, ints, np.zeros(rows, bool), ints, _sampling(rows, random), np.int32(MAX_STEPS), np.bool_(False))
    length = kv.padded_length(steps.layout, rows, length)
    args = (steps.abstract_params(), _cache(steps, rows, length), _abstract(steps, batch))
    return StepProgram(f"decode of {rows} rows, {length} positions", steps.decode, args, {})


def prefill(steps: Steps, tokens: int, rows: int, length: int, *, random: bool = False) -> StepProgram:
    """The program that prefills `tokens` of a prompt on each data shard, into a cache of `rows` and `length`."""
    data = steps.layout.data
    ints = np.zeros(data, np.int32)
    valid = None if data == 1 else np.zeros(data, bool)
    batch = TokenBatch(np.zeros((data, tokens), np.int32), ints, ints, ints, valid)
    rest = _abstract(steps, (batch, ints, _sampling(data, random)))
    args = (steps.abstract_params(), _cache(steps, rows, length), *rest)
    return StepProgram(f"prefill of {tokens} tokens, {length} positions", steps.prefill, args, {})


def score(steps: Steps, tokens: int, width: int) -> StepProgram:
    """The program that scores a row of `tokens` on each data shard, all of which may go to the head.

    `width`: see `tree_attention`.
    """
    batch = abstract_packed_batch(steps.layout, tokens, tokens)
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


def _sampling(rows: int, random: bool) -> SamplingBatch:
    def column(dtype: Any) -> np.ndarray:
        return np.zeros(rows, dtype)

    dtypes = (np.float32, np.uint32, np.int32, np.float32, np.float32)
    filters = SamplingFilters(*map(column, dtypes)) if random else None
    return SamplingBatch(column(np.int32), np.zeros((rows, STOP_ID_WIDTH), np.int32), filters)


def _cache(steps: Steps, rows: int, length: int) -> kv.Cache:
    return kv.abstract(steps.config, steps.layout, rows, length, kv.cache_dtype(steps.dtype, steps.layout.platform))


def _abstract(steps: Steps, tree: Any) -> Any:
    """Shapes and shardings, rows split over the data axis."""
    rows, whole = steps.layout.sharding(("rows",)), steps.layout.sharding(())

    def one(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows if x.ndim else whole)

    return jax.tree.map(one, tree)

"""What one layer keeps of a sequence: asked by the cache, the plan, the roofline and warm-up alike. No array is made here.

A layer keeps keys and values of every position, or with a window those of a ring buffer: position p stands at p modulo its
length. A layer that keeps something else is another spec.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.buckets import MAX_CHUNK, power_of_two
from jaxllm.config import ModelConfig
from jaxllm.platforms import choices
from sharding.layout import Layout
from sharding.padding import pad_heads, round_up

AXES = ("rows", "kv_heads", None, None, None)
BLOCK = 128  # positions


class LayerCache(NamedTuple):
    """One layer's keys [R, K, C, H, BLOCK] and values [R, K, C, BLOCK, H]: arrays, or their shapes."""

    keys: Any
    values: Any


@dataclass(frozen=True)
class CacheSpec:
    """Keys and values of one layer.

    Attributes:
      kv_heads: with those that padding adds.
      head_dim: numbers of a head's key, and of its value.
      dtype: of both.
      capacity: positions that a ring buffer keeps; None: all.
    """

    kv_heads: int
    head_dim: int
    dtype: str
    capacity: int | None

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one position's keys and values, all heads together."""
        return 2 * self.kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize

    def length(self, length: int) -> int:
        """Positions kept of a sequence of `length`."""
        return length if self.capacity is None else min(length, self.capacity)

    def abstract(self, layout: Layout, rows: int, length: int) -> LayerCache:
        """Shapes and shardings for `rows` sequences of `length` positions, a multiple of BLOCK."""
        blocks, sharding = (rows, self.kv_heads, self.length(length) // BLOCK), layout.sharding(AXES)
        keys = jax.ShapeDtypeStruct((*blocks, self.head_dim, BLOCK), jnp.dtype(self.dtype), sharding=sharding)
        return LayerCache(keys, jax.ShapeDtypeStruct((*blocks, BLOCK, self.head_dim), jnp.dtype(self.dtype), sharding=sharding))

    def nbytes(self, layout: Layout, rows: int, length: int) -> int:
        """Bytes on each device."""
        arrays = self.abstract(layout, rows, length)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)


def cache_specs(config: ModelConfig, layout: Layout, dtype: str) -> list[CacheSpec]:
    """The spec of each layer of a model of `dtype`."""
    heads = pad_heads(config.num_heads, config.num_kv_heads, layout.divisor).slots
    dtype = cache_dtype(dtype, layout.platform)
    capacities = [window_capacity(layer.window, layout.platform) for layer in config.layers]
    return [CacheSpec(heads, config.head_dim, dtype, capacity) for capacity in capacities]


def cache_dtype(dtype: str, platform: str) -> str:
    """The cache's dtype for a model of `dtype`."""
    return "float32" if choices(platform).float32_cache else dtype


def window_capacity(window: int | None, platform: str) -> int | None:
    """Positions that a layer with this window keeps at most; None: all.

    Before a chunk's first token there are those that it sees, and a chunk never passes the end.
    """
    if window is None:
        return None
    length = round_up(window + MAX_CHUNK - 1, MAX_CHUNK)
    # As many blocks as rows may be to be avoided: rows are powers of two, but for their maximum.
    while not choices(platform).square_caches and length // BLOCK == power_of_two(length // BLOCK):
        length += MAX_CHUNK
    return length


def padded_length(layout: Layout, rows: int, length: int) -> int:
    """Positions of a cache of `rows` for sequences of `length`, a multiple of BLOCK: a block more in place of a square one."""
    square = rows // layout.data == length // BLOCK > 1
    return length + BLOCK if square and not choices(layout.platform).square_caches else length

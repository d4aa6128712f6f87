"""What one layer keeps of a sequence: asked by the cache, the plan, the roofline and warm-up alike. No array is made here.

A layer keeps keys and values in pages of PAGE positions: of every position, or with a window of those that a query may still see.
A layer that keeps something else is another spec. Layers with the same window use the same pages, each in arrays of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.buckets import PAGE, pages_held, pages_of
from jaxllm.config import ModelConfig
from jaxllm.platforms import choices
from sharding.layout import Layout
from sharding.padding import pad_heads

AXES = ("rows", "kv_heads", None, None)


class LayerCache(NamedTuple):
    """One layer's keys [P, K, H, PAGE] and values [P, K, PAGE, H]: arrays, or their shapes."""

    keys: Any
    values: Any


@dataclass(frozen=True)
class CacheSpec:
    """Keys and values of one layer.

    Attributes:
      kv_heads: with those that padding adds.
      head_dim: numbers of a head's key, and of its value.
      dtype: of both.
      window: how many positions a query sees, its own included; None: all before it.
    """

    kv_heads: int
    head_dim: int
    dtype: str
    window: int | None

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one position's keys and values, all heads together."""
        return 2 * self.kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize

    def seen(self, length: int) -> int:
        """Positions that the last query of a sequence of `length` sees."""
        return length if self.window is None else min(length, self.window)

    def abstract(self, layout: Layout, pages: int) -> LayerCache:
        """Shapes and shardings of `pages` pages on each data shard."""
        shape, sharding = (layout.data * pages, self.kv_heads), layout.sharding(AXES)
        keys = jax.ShapeDtypeStruct((*shape, self.head_dim, PAGE), jnp.dtype(self.dtype), sharding=sharding)
        return LayerCache(keys, jax.ShapeDtypeStruct((*shape, PAGE, self.head_dim), jnp.dtype(self.dtype), sharding=sharding))

    def nbytes(self, layout: Layout, pages: int) -> int:
        """Bytes on each device of `pages` pages on each data shard."""
        arrays = self.abstract(layout, pages)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)


def cache_specs(config: ModelConfig, layout: Layout, dtype: str) -> list[CacheSpec]:
    """The spec of each layer of a model of `dtype`."""
    heads = pad_heads(config.num_heads, config.num_kv_heads, layout.divisor).slots
    dtype = cache_dtype(dtype, layout.platform)
    return [CacheSpec(heads, config.head_dim, dtype, layer.window) for layer in config.layers]


def windows(config: ModelConfig) -> tuple[int | None, ...]:
    """The groups of layers that share pages, by their window."""
    return tuple(dict.fromkeys(layer.window for layer in config.layers))


@dataclass(frozen=True)
class Pool:
    """The pages of each data shard.

    Attributes:
      pages: for each group of layers, by their window, one of them belonging to nobody.
      max_model_len: tokens of the longest sequence.
    """

    pages: dict[int | None, int]
    max_model_len: int

    @classmethod
    def of(cls, config: ModelConfig, max_model_len: int, tokens: int, rows: int) -> Pool:
        """For up to `rows` sequences on a data shard, which have `tokens` together."""
        each = {window: pages_held(window, max_model_len) for window in windows(config)}
        whole = {window: pages_of(tokens) if window is None else rows * n for window, n in each.items()}
        return cls({window: 1 + max(each[window], min(n, rows * each[window])) for window, n in whole.items()}, max_model_len)

    @property
    def width(self) -> int:
        """Pages of the longest sequence, those given back included."""
        return pages_of(self.max_model_len)

    @property
    def sequences(self) -> int:
        """The longest sequences that the pages hold at once."""
        return min((n - 1) // pages_held(window, self.max_model_len) for window, n in self.pages.items())

    def nbytes(self, layout: Layout, specs: Iterable[CacheSpec]) -> int:
        """Bytes on each device."""
        return sum(spec.nbytes(layout, self.pages[spec.window]) for spec in specs)


def cache_dtype(dtype: str, platform: str) -> str:
    """The cache's dtype for a model of `dtype`."""
    return "float32" if choices(platform).float32_cache else dtype

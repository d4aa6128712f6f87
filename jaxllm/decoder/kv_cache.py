"""The KV cache: on each data shard P pages of PAGE positions, which the host deals out to sequences.

    layer i:  keys   [P, K, H, PAGE]   pages over `data`, KV heads over `model`
              values [P, K, PAGE, H]

Each is the right operand of a plain matrix product as it lies: with keys as [PAGE, H] XLA transposes them in every decode step on
a CPU. On a CPU the cache is float32 whatever the model's dtype (it holds the same rounded numbers): XLA has no 16-bit update in
place there and would convert all of it, twice, for every token.

Writing and reading run under `shard_map`: each device touches its own pages and heads, no collective can appear, and the donated
buffer is updated in place. Page 0 belongs to nobody: rows without a sequence write there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Wrapped

from jaxllm.buckets import PAGE
from jaxllm.decoder.cache_spec import CacheSpec, LayerCache
from jaxllm.platforms import choices
from sharding.layout import Layout

Cache = list[LayerCache]


def abstract(specs: Sequence[CacheSpec], layout: Layout, pages: dict[int | None, int]) -> Cache:
    """Shapes and shardings of a cache with so many pages on each data shard for the layers of each window."""
    made = {spec: spec.abstract(layout, pages[spec.window]) for spec in set(specs)}
    return [made[spec] for spec in specs]


def init(specs: Sequence[CacheSpec], layout: Layout, pages: dict[int | None, int]) -> Cache:
    """An empty cache on the devices."""
    return [LayerCache(*(zeros(x)() for x in layer)) for layer in abstract(specs, layout, pages)]


@lru_cache(maxsize=16)
def zeros(like: jax.ShapeDtypeStruct) -> Wrapped:
    """A jitted function that makes an empty array of the cache. Cached: a new one would be traced anew for every array."""
    return jax.jit(partial(jnp.zeros, like.shape, like.dtype), out_shardings=like.sharding)


def write_rows(
    cache: LayerCache, keys: jax.Array, values: jax.Array, page: jax.Array, offset: jax.Array, platform: str
) -> LayerCache:
    """Put each row's `keys` [B, K, H, T] and `values` [B, K, T, H] into its `page` [B] from `offset` [B] on; of one device."""
    here, axis = choices(platform), 3
    if here.turned_keys:
        cache, keys, axis = cache._replace(keys=cache.keys.swapaxes(2, 3)), keys.swapaxes(2, 3), 2

    def row(i: jax.Array, cache: LayerCache) -> LayerCache:
        return LayerCache(
            _put(cache.keys, jax.lax.dynamic_slice_in_dim(keys, i, 1), page[i], offset[i], axis),
            _put(cache.values, jax.lax.dynamic_slice_in_dim(values, i, 1), page[i], offset[i], 2),
        )

    if here.loops_over_tiles:
        cache = jax.lax.fori_loop(0, len(keys), row, cache)
    elif here.hides_writes and len(keys) == 1:
        cache = jax.lax.fori_loop(0, (page[0] >= 0).astype(jnp.int32), row, cache)
    else:
        cache = LayerCache(_scatter(cache.keys, keys, page, offset, axis), _scatter(cache.values, values, page, offset, 2))
    return cache._replace(keys=cache.keys.swapaxes(2, 3)) if here.turned_keys else cache


def _put(pool: jax.Array, new: jax.Array, page: jax.Array, offset: jax.Array, axis: int) -> jax.Array:
    """`_scatter` of one row: `new` [1, ...]."""
    at: list[Any] = [page, 0, 0, 0]
    at[axis] = offset
    return jax.lax.dynamic_update_slice(pool, new, at)


def _scatter(pool: jax.Array, new: jax.Array, page: jax.Array, offset: jax.Array, axis: int) -> jax.Array:
    """`new` [B, ...] into `pool` [P, ...], each row at its page and its offset along `axis`.

    Rows of sequences never meet; of those that go to page 0 any may win.
    """
    dims = jax.lax.ScatterDimensionNumbers((1, 2, 3), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, axis))
    at, in_bounds = jnp.stack([page, offset], axis=1), jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return jax.lax.scatter(pool, at, new, dims, unique_indices=True, mode=in_bounds)


def where_rows_go(pages: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Page and offset of each row's first token, from its sequence's pages [B, C] and its position [B]."""
    page = jnp.take_along_axis(pages, (start // PAGE)[:, None], axis=1, mode="clip")[:, 0]
    return page, start % PAGE

"""The KV cache: R rows of C blocks of BLOCK positions, dense.

    layer i:  keys   [R, K, C, H, BLOCK]   rows over `data`, KV heads over `model`
              values [R, K, C, BLOCK, H]

Each is the right operand of a plain batched matrix product as it lies: with keys as [S, H] XLA transposes the whole cache in
every decode step on a CPU. One block's product is the same code in a cache of any length, so a longer cache leaves a row's bits
alone. On a CPU the cache is float32 whatever the model's dtype (it holds the same rounded numbers): XLA has no 16-bit update in
place there and would convert all of it, twice, for every token.

A layer with a window has fewer blocks, those of the window and a chunk, as a ring buffer (see `cache_spec`).

Attention sees `write`, `read` and `read_block` and nothing else of it. They run under `shard_map`: each device touches its own
rows and heads, no collective can appear, and the donated buffer is updated in place. R and C come from ladders; `resize` moves
to a higher rung.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.stages import Wrapped

from jaxllm.decoder.batch import TokenBatch
from jaxllm.decoder.cache_spec import AXES, BLOCK, CacheSpec, LayerCache
from jaxllm.platforms import choices
from sharding.layout import Layout

Cache = list[LayerCache]


def abstract(specs: Sequence[CacheSpec], layout: Layout, rows: int, length: int) -> Cache:
    """Shapes and shardings of a cache of `rows` rows and `length` positions, a multiple of BLOCK."""
    made = {spec: spec.abstract(layout, rows, length) for spec in set(specs)}
    return [made[spec] for spec in specs]


def init(specs: Sequence[CacheSpec], layout: Layout, rows: int, length: int) -> Cache:
    """An empty cache on the devices."""
    return [LayerCache(*(zeros(x)() for x in layer)) for layer in abstract(specs, layout, rows, length)]


@lru_cache(maxsize=16)
def zeros(like: jax.ShapeDtypeStruct) -> Wrapped:
    """A jitted function that makes an empty array of the cache. Cached: a new one would be traced anew for every array."""
    return jax.jit(partial(jnp.zeros, like.shape, like.dtype), out_shardings=like.sharding)


def resize(cache: Cache, layout: Layout, shapes: Cache) -> Cache:
    """The same content with more rows or positions, in these shapes. The old cache is consumed, one array at a time.

    A row keeps its index within its data shard. A ring buffer that has all its positions gets no more.
    """
    grown = []
    for layer in shapes:
        pairs = zip(cache.pop(0), layer, strict=True)
        keys, values = (old if old.shape == new.shape else grow(old, layout, new.shape) for old, new in pairs)
        grown.append(LayerCache(jax.block_until_ready(keys), values))
    return grown


@partial(jax.jit, static_argnames=("layout", "shape"))
def grow(old: jax.Array, layout: Layout, shape: tuple[int, ...]) -> jax.Array:
    """Pad an array of the cache with zeros to `shape`, on each device by itself."""
    spec = layout.spec(AXES)

    def local(x: jax.Array) -> jax.Array:
        target = (shape[0] // layout.data, x.shape[1], *shape[2:])
        return jnp.pad(x, [(0, new - now) for now, new in zip(x.shape, target, strict=True)])

    return jax.shard_map(local, mesh=layout.mesh, in_specs=spec, out_specs=spec)(old)


def write(cache: LayerCache, layout: Layout, keys: jax.Array, values: jax.Array, batch: TokenBatch, *, wraps: bool) -> LayerCache:
    """Put `keys` [B, K, H, T] and `values` [B, K, T, H] of the batch's tokens where they belong; `wraps`: in a ring buffer.

    A chunk of T tokens stands within one block or is whole blocks.
    """
    start = batch.start % (cache.values.shape[2] * BLOCK) if wraps else batch.start
    where = (start, batch.slots, batch.valid)
    b, k, t, h = values.shape
    blocks = -(-t // BLOCK)
    keys = keys.reshape(b, k, h, blocks, -1).swapaxes(2, 3)
    values = values.reshape(b, k, blocks, -1, h)
    return LayerCache(_put(layout, cache.keys, keys, 4, where), _put(layout, cache.values, values, 3, where))


Where = tuple[jax.Array, jax.Array | None, jax.Array | None]


def _put(layout: Layout, cache: jax.Array, new: jax.Array, axis: int, where: Where) -> jax.Array:
    """`new`, whose `axis` counts positions within a block, into `cache`, on each device by itself."""
    spec = layout.spec(AXES)

    def place(position: jax.Array, row: Any = 0) -> list[Any]:
        at = [row, 0, position // BLOCK, 0, 0]
        at[axis] = position % BLOCK
        return at

    def local(cache: jax.Array, new: jax.Array, where: Where) -> jax.Array:
        start, slot, valid = where
        if slot is None and len(cache) == 1 and choices(layout.platform).hides_writes:
            passes = (start[0] >= 0).astype(jnp.int32)
            return jax.lax.fori_loop(0, passes, lambda _, x: jax.lax.dynamic_update_slice(x, new, place(start[0])), cache)
        if slot is None:  # decode: row i of `new`, one token, goes to row i of the cache
            return jax.vmap(lambda row, token, at: jax.lax.dynamic_update_slice(row, token, place(at)[1:]))(cache, new, start)
        at = place(start[0], slot[0])  # prefill: this device's one row goes to the cache row `slot`
        if valid is not None:
            new = jnp.where(valid[0], new, jax.lax.dynamic_slice(cache, at, new.shape))
        return jax.lax.dynamic_update_slice(cache, new, at)

    specs = (spec, spec, jax.tree.map(lambda _: P("data"), where))
    return jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=spec)(cache, new, where)


def read(cache: LayerCache, layout: Layout, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
    """Keys [B, K, C, H, BLOCK] and values [B, K, C, BLOCK, H] of the batch's rows."""
    if batch.slots is None:
        return cache.keys, cache.values
    spec = layout.spec(AXES)

    def local(whole: jax.Array, slot: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(whole, slot[0], 1, axis=0)

    take = jax.shard_map(local, mesh=layout.mesh, in_specs=(spec, P("data")), out_specs=spec)
    return take(cache.keys, batch.slots), take(cache.values, batch.slots)


def read_block(cache: LayerCache, layout: Layout, batch: TokenBatch, block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys [B, K, H, BLOCK] and values [B, K, BLOCK, H] of one block of the batch's rows."""
    spec, part = layout.spec(AXES), layout.spec(("rows", "kv_heads", None, None))

    def local(whole: jax.Array, slots: jax.Array | None, block: jax.Array) -> jax.Array:
        if slots is not None:
            # Or XLA takes the only block of a short cache out of the loop, and fuses this with the write before it: that reads
            # the cache from before the write, which is then copied whole.
            slots, block = jax.lax.optimization_barrier((slots, block))
            whole = jax.lax.dynamic_slice(whole, (slots[0], 0, block, 0, 0), (1, whole.shape[1], 1, *whole.shape[3:]))
            return whole[:, :, 0]
        return jax.lax.dynamic_index_in_dim(whole, block, 2, keepdims=False)

    slots = None if batch.slots is None else P("data")
    take = jax.shard_map(local, mesh=layout.mesh, in_specs=(spec, slots, P()), out_specs=part)
    return take(cache.keys, batch.slots, block), take(cache.values, batch.slots, block)

"""Attention on NVIDIA GPUs as kernels of our own, written in Pallas and compiled by Triton: from Ampere on.

The sums of `paged_attention` and `tree_attention`, read where they lie: a block of queries goes through the pages, or the tiles
of keys, that it sees and no others, keeps a running maximum (Milakov and Gimelshein 2018), and leaves nothing in memory but its
result. In plain XLA every row reads as many pages as the program is compiled for, and each sum is several kernels: a step of 64
rows took six times as long as its matrices (H100, LLaMA-7B).

Few queries over many keys leave most of the GPU idle, so a row's pages are shared out to several blocks, whose sums are put
together afterwards ("flash decoding", Dao et al. 2023).
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxllm.buckets import PAGE
from jaxllm.decoder.attention import LOW, AttentionSpec, Sums, add_keys
from jaxllm.decoder.cache_spec import LayerCache
from jaxllm.decoder.layers import dot
from jaxllm.decoder.paged_attention import folded_queries, unfolded_queries

FEWEST_ROWS = 16  # of a product on the tensor cores
MOST_ROWS = 64  # queries of a block: their sums stay in registers
BLOCKS = 264  # two for each multiprocessor of an H100
WIDE = 256  # bytes of a head up to which all of a tile goes through shared memory at once

PAGES, TILES = (4, 3), (8, 2)  # warps of a block, and keys that are on their way at once


def over_pages(
    spec: AttentionSpec,
    q: jax.Array,
    cache: LayerCache,
    pages: jax.Array,
    start: jax.Array,
    *,
    how: tuple[int, int] = PAGES,
    interpret: bool = False,
) -> jax.Array:
    """q [B, T, N, H] at positions start [B] + t, over the pages [B, C] of each row -> [B, T, N, H] float32; of one device."""
    b, t, n, h = q.shape
    kv_heads, width = cache.keys.shape[1], pages.shape[1]
    group = n // kv_heads
    count = _rows_of_a_block(group * t)
    blocks = pl.cdiv(group * t, count)
    parts = min(pl.cdiv(BLOCKS, b * kv_heads * blocks), width)

    def kernel(q: Any, keys: Any, values: Any, pages: Any, start: Any, top: Any, total: Any, y: Any) -> None:
        first, part = start[0], pl.program_id(2) // blocks
        row = pl.program_id(2) % blocks * count + jnp.arange(count)
        there = row < group * t
        position = (first + row % t)[:, None]
        begin = 0 if spec.window is None else jnp.maximum(first - spec.window + 1, 0) // PAGE
        end = (first + t - 1) // PAGE + 1
        each = (end - begin + parts - 1) // parts
        begin, query = begin + part * each, plgpu.load(q, mask=there[:, None], other=0.0)

        def page(c: jax.Array, sums: Sums) -> Sums:
            at = pages[c]
            seen = spec.mask(position, (c * PAGE + jnp.arange(PAGE))[None, :])
            return _added(spec, sums, query, keys[at], values[at], seen)

        sums = jax.lax.fori_loop(begin, jnp.minimum(begin + each, end), page, _none(count, h))
        for to, numbers in zip((top, total, y), sums, strict=True):
            plgpu.store(to, numbers, mask=there if numbers.ndim == 1 else there[:, None])

    whole = cache.keys.shape[0]
    row = pl.BlockSpec((None, None, None, count), lambda i, k, p: (i, p // blocks, k, p % blocks))
    top, total, y = _call(
        kernel,
        grid=(b, kv_heads, parts * blocks),
        in_specs=[
            pl.BlockSpec((None, None, count, h), lambda i, k, p: (i, k, p % blocks, 0)),
            pl.BlockSpec((whole, None, h, PAGE), lambda i, k, p: (0, k, 0, 0)),
            pl.BlockSpec((whole, None, PAGE, h), lambda i, k, p: (0, k, 0, 0)),
            pl.BlockSpec((None, width), lambda i, k, p: (i, 0)),
            pl.BlockSpec((1,), lambda i, k, p: (i,)),
        ],
        out_specs=[row, row, pl.BlockSpec((None, None, None, count, h), lambda i, k, p: (i, p // blocks, k, p % blocks, 0))],
        out_shape=[jax.ShapeDtypeStruct((b, parts, kv_heads, group * t, *more), jnp.float32) for more in ((), (), (h,))],
        interpret=interpret,
        name="attention_over_pages",
        how=how,
    )(folded_queries(q, kv_heads).astype(cache.keys.dtype), *cache, pages, start)
    return unfolded_queries(_together(spec, top, total, y), t)


def _rows_of_a_block(rows: int) -> int:
    """A power of two that holds all of a row's queries of a KV head, or as many as fit."""
    return min(max(1 << (rows - 1).bit_length(), FEWEST_ROWS), MOST_ROWS)


def _none(rows: int, head_dim: int) -> Sums:
    """The sums before anything was added."""
    return jnp.full((rows,), LOW, jnp.float32), jnp.zeros((rows,), jnp.float32), jnp.zeros((rows, head_dim), jnp.float32)


def _added(spec: AttentionSpec, sums: Sums, query: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array) -> Sums:
    """The sums of queries [M, H] with keys [H, S] and values [S, H] that they see as `seen` [M, S] says."""
    scores = jnp.where(seen, spec.capped(dot("mh,hs->ms", query, keys)), -jnp.inf)
    return add_keys(spec, sums, scores, lambda p: dot("ms,sh->mh", p.astype(values.dtype), values))


def _together(spec: AttentionSpec, top: jax.Array, total: jax.Array, y: jax.Array) -> jax.Array:
    """The parts' sums, [B, parts, K, M] and [B, parts, K, M, H] -> what the queries read, [B, K, M, H]."""
    weight = jnp.exp((top - top.max(axis=1, keepdims=True)) * spec.post_max_scale)
    return (weight[..., None] * y).sum(axis=1) / (weight * total).sum(axis=1)[..., None]


def over_tiles(
    spec: AttentionSpec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    end: jax.Array,
    first: jax.Array,
    key_tiles: jax.Array,
    *,
    tile: int,
    how: tuple[int, int] = TILES,
    interpret: bool = False,
) -> jax.Array:
    """q [T, N, H], k and v [T, K, H] of one row of packed trees -> [T, N, H]; see `tree_attention`."""
    t, n, h = q.shape
    group = n // k.shape[1]
    size = max(tile * WIDE // max(h * q.dtype.itemsize, WIDE), FEWEST_ROWS)  # of a block
    cut = tile // size

    def kernel(q: Any, keys: Any, values: Any, place: Any, places: Any, ends: Any, first: Any, tiles: Any, y: Any) -> None:
        block = pl.program_id(1)
        query, index, position = q[...], (block * size + jnp.arange(size))[:, None], place[...][:, None]

        def keys_of(i: jax.Array, sums: Sums) -> Sums:
            begin = tiles[i // cut] * tile + i % cut * size
            here, column = pl.ds(begin, size), (begin + jnp.arange(size))[None, :]
            seen = (column <= index) & (index < ends[here][None, :])
            if spec.window is not None:
                seen &= spec.mask(position, places[here][None, :])
            return _added(spec, sums, query, keys[here, :].T, values[here, :], seen)

        listed = first[block // cut] * cut, first[block // cut + 1] * cut
        _, total, read = jax.lax.fori_loop(*listed, keys_of, _none(size, h))
        y[...] = (read / total[:, None]).astype(y.dtype)

    whole = pl.BlockSpec((t,), lambda n, i: (0,))
    return _call(
        kernel,
        grid=(n, t // size),
        in_specs=[
            pl.BlockSpec((size, None, h), lambda n, i: (i, n, 0)),
            pl.BlockSpec((t, None, h), lambda n, i: (0, n // group, 0)),
            pl.BlockSpec((t, None, h), lambda n, i: (0, n // group, 0)),
            pl.BlockSpec((size,), lambda n, i: (i,)),
            whole,
            whole,
            pl.BlockSpec(first.shape, lambda n, i: (0,)),
            pl.BlockSpec(key_tiles.shape, lambda n, i: (0,)),
        ],
        out_specs=pl.BlockSpec((size, None, h), lambda n, i: (i, n, 0)),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        interpret=interpret,
        name="attention_over_tiles",
        how=how,
    )(q, k, v, position, position, end, first, key_tiles)


def _call(kernel: Any, *, how: tuple[int, int], **call: Any) -> Any:
    warps, stages = how
    made = pl.pallas_call(kernel, compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages), **call)

    def quietly(*args: jax.Array) -> Any:
        with warnings.catch_warnings():  # jax 0.11 and later say, while they trace it, that this way to Triton will end
            warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
            return made(*args)

    return quietly

"""Attention inside packed trees: query i sees key j where `j <= i < end[j]` (`jaxllm.scoring.trie`).

Three forms of the same sum (`platforms.attention_form`), all in tiles so that the cost follows the trees and not the row: a query
tile sees its own and those before it, often far before it, that hold the path above, and the host lists them. On a CPU a loop
goes over the pairs of tiles, on newer GPUs a kernel of our own. In plain XLA a loop would wait for the host in every pass: each
query tile reads as many tiles as the longest list has, a number that the program is compiled for. (Reading every tile between
the first and its own would be ten times as many: all trees of LLaMA's tokenizer begin with one token.) A tile's result takes the
place of its queries: XLA would make the zeros for the results of all layers at once, before the first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.decoder.attention import Attend, AttentionSpec, Sums, add_keys, no_sums
from jaxllm.decoder.layers import dot
from jaxllm.platforms import KERNELS, LOOPS
from sharding.layout import Layout

TILE = 128


def tile_pairs(end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """end [T] -> (first [T / TILE + 1], key tiles) int32: query tile i sees `key_tiles[first[i] : first[i + 1]]`."""
    reach = (end.reshape(-1, TILE).max(axis=1) - 1) // TILE  # the last query tile that each key tile is seen by
    tiles = np.arange(len(reach))
    query, key = np.nonzero((tiles[None, :] <= tiles[:, None]) & (tiles[:, None] <= reach[None, :]))
    return np.searchsorted(query, np.arange(len(reach) + 1)).astype(np.int32), key.astype(np.int32)


def over_trees(
    layout: Layout,
    form: str,
    width: int,
    spec: AttentionSpec,
    position: jax.Array,
    end: jax.Array,
    first: jax.Array,
    key_tiles: jax.Array,
) -> Attend:
    """Attention in which tokens see their ancestors and themselves; the arrays are a `PackedBatch`'s.

    `form`: see `platforms.attention_form`. `width`: the most key tiles that any query tile sees; for PASSES.
    """
    rows, heads = layout.spec(("rows", None)), layout.spec(("rows", None, "heads", None))

    def local(*arrays: jax.Array) -> jax.Array:
        return jnp.stack([one(*row) for row in zip(*arrays, strict=True)])

    if form == KERNELS:
        from jaxllm.decoder import attention_kernels

        one: Callable[..., jax.Array] = partial(attention_kernels.over_tiles, spec, tile=TILE, interpret=layout.platform == "cpu")
    else:
        one = partial(by_pairs, spec) if form == LOOPS else partial(by_lists, spec, width)

    over = jax.shard_map(local, mesh=layout.mesh, in_specs=(heads,) * 3 + (rows,) * 4, out_specs=heads, check_vma=False)
    return lambda q, k, v: (over(q, k, v, position, end, first, key_tiles), None)


def _tiled(x: jax.Array, heads: int) -> jax.Array:
    """[T, K * G, H] -> [tiles, K, G * TILE, H]."""
    t, n, h = x.shape
    x = x.reshape(t // TILE, TILE, heads, n // heads, h).transpose(0, 2, 3, 1, 4)
    return x.reshape(t // TILE, heads, n // heads * TILE, h)


def _untiled(y: jax.Array) -> jax.Array:
    """[tiles, K, G * TILE, H] -> [T, K * G, H]."""
    tiles, k, rows, h = y.shape
    return y.reshape(tiles, k, rows // TILE, TILE, h).transpose(0, 3, 1, 2, 4).reshape(tiles * TILE, k * rows // TILE, h)


def by_pairs(
    spec: AttentionSpec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    end: jax.Array,
    first: jax.Array,
    key_tiles: jax.Array,
) -> jax.Array:
    """q [T, N, H], k and v [T, K, H] of one row -> [T, N, H], with a running maximum (Milakov and Gimelshein 2018)."""
    heads = k.shape[1]
    q, k, v, end = _tiled(q, heads), _tiled(k, heads).swapaxes(2, 3), _tiled(v, heads), end.reshape(-1, TILE)
    index, position = jnp.arange(TILE), position.reshape(-1, TILE)

    def query_tile(i: jax.Array, q: jax.Array) -> jax.Array:
        def key_tile(pair: jax.Array, sums: Sums) -> Sums:
            j = key_tiles[pair]
            scores = spec.capped(dot("kqh,khs->kqs", q[i], k[j]))
            row, column = i * TILE + index[:, None], j * TILE + index[None, :]
            seen = (column <= row) & (row < end[j][None, :]) & _near(spec, position[i], position[j])
            scores = jnp.where(seen[None, None], scores.reshape(heads, -1, TILE, TILE), -jnp.inf).reshape(scores.shape)
            return add_keys(spec, sums, scores, lambda p: dot("kqs,ksh->kqh", p.astype(v.dtype), v[j]))

        _, total, y = jax.lax.fori_loop(first[i], first[i + 1], key_tile, no_sums(q.shape[1:]))
        return q.at[i].set((y / total[..., None]).astype(q.dtype))

    return _untiled(jax.lax.fori_loop(0, len(q), query_tile, q))


def _near(spec: AttentionSpec, query: jax.Array, key: jax.Array) -> jax.Array | bool:
    """Mask [T, S]: the key position [S] is in the window of the query position [T]; True without a window."""
    return True if spec.window is None else spec.mask(query[:, None], key[None, :])


def by_lists(
    spec: AttentionSpec,
    width: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    end: jax.Array,
    first: jax.Array,
    key_tiles: jax.Array,
) -> jax.Array:
    """`by_pairs` for a GPU: every query tile reads `width` key tiles, those past its list masked."""
    heads = k.shape[1]
    q, end, position = _tiled(q, heads), end.reshape(-1, TILE), position.reshape(-1, TILE)
    k, v = (x.reshape(-1, TILE, *x.shape[1:]).transpose(2, 0, 1, 3) for x in (k, v))  # K tiles TILE H
    index = jnp.arange(TILE)

    def query_tile(i: jax.Array, q: jax.Array) -> jax.Array:
        pair = first[i] + jnp.arange(width)
        j = jnp.take(key_tiles, pair, mode="clip")  # M
        key, value = (jnp.take(x, j, axis=1, mode="clip").reshape(heads, width * TILE, -1) for x in (k, v))
        scores = spec.capped(dot("kqh,ksh->kqs", q[i], key))
        column = (j[:, None] * TILE + index[None, :]).reshape(1, -1)
        expiry = jnp.where((pair < first[i + 1])[:, None], jnp.take(end, j, axis=0, mode="clip"), 0).reshape(1, -1)
        row = (i * TILE + index)[:, None]
        seen = (column <= row) & (row < expiry)
        seen &= _near(spec, position[i], jnp.take(position, j, axis=0, mode="clip").reshape(-1))
        scores = jnp.where(seen[None, None], scores.reshape(heads, -1, *seen.shape), -jnp.inf).reshape(scores.shape)
        p = jnp.exp((scores - scores.max(axis=-1, keepdims=True)) * spec.post_max_scale)
        y = dot("kqs,ksh->kqh", p.astype(v.dtype), value) / p.sum(axis=-1, keepdims=True)
        return q.at[i].set(y.astype(q.dtype))

    return _untiled(jax.lax.fori_loop(0, len(q), query_tile, q))

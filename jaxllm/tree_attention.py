"""Attention inside packed trees: query i sees key j where `j <= i < end[j]` (`jaxllm.trie`).

Two forms of the same sum, both in tiles so that the cost follows the trees and not the row. On a CPU a loop goes over the pairs
of tiles that have anything to see, which the host lists. On a GPU such a loop would wait for the host in every turn: each query
tile reads a window of the tiles before it, whose width the program is compiled for. A tile's result takes the place of its
queries: XLA would make the zeros for the results of all layers at once, before the first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.attention import Attend
from jaxllm.batch import PackedBatch
from jaxllm.layers import dot
from sharding.layout import Layout

TILE = 128
LOW = -1e30  # below every score; of -inf, the difference to itself is no number


def tile_pairs(end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """end [T] -> (first [T / TILE + 1], key tiles) int32: query tile i sees `key_tiles[first[i] : first[i + 1]]`."""
    reach = (end.reshape(-1, TILE).max(axis=1) - 1) // TILE  # the last query tile that each key tile is seen by
    tiles = np.arange(len(reach))
    query, key = np.nonzero((tiles[None, :] <= tiles[:, None]) & (tiles[:, None] <= reach[None, :]))
    return np.searchsorted(query, np.arange(len(reach) + 1)).astype(np.int32), key.astype(np.int32)


def window(first: np.ndarray, key_tiles: np.ndarray) -> int:
    """How many tiles before its own a query tile must read, at most, where `tile_pairs` are these."""
    return int((np.arange(len(first) - 1) - key_tiles[first[:-1]]).max())


def over_trees(layout: Layout, batch: PackedBatch, window: int) -> Attend:
    """Tokens see their ancestors and themselves. `window`: tiles before its own that a query tile may need."""
    rows, heads = layout.spec(("rows", None)), layout.spec(("rows", None, "heads", None))

    def local(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, first: jax.Array, key_tiles: jax.Array) -> jax.Array:
        if layout.platform == "cpu":
            return jnp.stack([by_pairs(*row) for row in zip(q, k, v, end, first, key_tiles, strict=True)])
        return jnp.stack([by_windows(*row, window) for row in zip(q, k, v, end, strict=True)])

    over = jax.shard_map(
        local, mesh=layout.mesh, in_specs=(heads, heads, heads, rows, rows, rows), out_specs=heads, check_vma=False
    )
    return lambda q, k, v: (over(q, k, v, batch.end, batch.first, batch.key_tiles), None)


def _tiled(x: jax.Array, heads: int) -> jax.Array:
    """[T, K * G, H] -> [tiles, K, G * TILE, H]."""
    t, n, h = x.shape
    x = x.reshape(t // TILE, TILE, heads, n // heads, h).transpose(0, 2, 3, 1, 4)
    return x.reshape(t // TILE, heads, n // heads * TILE, h)


def _untiled(y: jax.Array) -> jax.Array:
    """[tiles, K, G * TILE, H] -> [T, K * G, H]."""
    tiles, k, rows, h = y.shape
    return y.reshape(tiles, k, rows // TILE, TILE, h).transpose(0, 3, 1, 2, 4).reshape(tiles * TILE, k * rows // TILE, h)


def by_pairs(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, first: jax.Array, key_tiles: jax.Array) -> jax.Array:
    """q [T, N, H], k and v [T, K, H] of one row -> [T, N, H], with a running maximum (Milakov and Gimelshein 2018)."""
    heads, scale = k.shape[1], q.shape[-1] ** -0.5
    q, k, v, end = _tiled(q, heads), _tiled(k, heads).swapaxes(2, 3), _tiled(v, heads), end.reshape(-1, TILE)
    index = jnp.arange(TILE)

    def query_tile(i: jax.Array, q: jax.Array) -> jax.Array:
        def key_tile(pair: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            top, total, y = state
            j = key_tiles[pair]
            scores = dot("kqh,khs->kqs", q[i], k[j])
            row, column = i * TILE + index[:, None], j * TILE + index[None, :]
            seen = (column <= row) & (row < end[j][None, :])
            scores = jnp.where(seen[None, None], scores.reshape(heads, -1, TILE, TILE), -jnp.inf).reshape(scores.shape)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            p = jnp.exp((scores - new_top[..., None]) * scale)
            fade = jnp.exp((top - new_top) * scale)
            new = dot("kqs,ksh->kqh", p.astype(v.dtype), v[j])
            return new_top, total * fade + p.sum(axis=-1), y * fade[..., None] + new

        zeros = jnp.zeros(q.shape[1:], jnp.float32)
        state = (zeros[..., 0] + LOW, zeros[..., 0], zeros)
        _, total, y = jax.lax.fori_loop(first[i], first[i + 1], key_tile, state)
        return q.at[i].set((y / total[..., None]).astype(q.dtype))

    return _untiled(jax.lax.fori_loop(0, len(q), query_tile, q))


def by_windows(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, window: int) -> jax.Array:
    """`by_pairs` for a GPU: every query tile reads its own and `window` tiles before."""
    heads, scale = k.shape[1], q.shape[-1] ** -0.5
    before, span = window * TILE, (window + 1) * TILE
    q = _tiled(q, heads)
    k, v = (jnp.pad(x.swapaxes(0, 1), ((0, 0), (before, 0), (0, 0))) for x in (k, v))
    end = jnp.pad(end, (before, 0))  # padding has expired before anything

    def query_tile(i: jax.Array, q: jax.Array) -> jax.Array:
        key, value = (jax.lax.dynamic_slice_in_dim(x, i * TILE, span, axis=1) for x in (k, v))
        scores = dot("kqh,ksh->kqs", q[i], key)
        row, column = i * TILE + jnp.arange(TILE)[:, None], i * TILE - before + jnp.arange(span)[None, :]
        seen = (column <= row) & (row < jax.lax.dynamic_slice_in_dim(end, i * TILE, span)[None, :])
        scores = jnp.where(seen[None, None], scores.reshape(heads, -1, TILE, span), -jnp.inf).reshape(scores.shape)
        p = jnp.exp((scores - scores.max(axis=-1, keepdims=True)) * scale)
        y = dot("kqs,ksh->kqh", p.astype(v.dtype), value) / p.sum(axis=-1, keepdims=True)
        return q.at[i].set(y.astype(q.dtype))

    return _untiled(jax.lax.fori_loop(0, len(q), query_tile, q))

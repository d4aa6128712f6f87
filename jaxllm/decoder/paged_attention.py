"""Attention over the pages of the KV cache: new tokens see those of their sequence that it holds, and each other causally.

A row is T tokens of one sequence, in consecutive positions of one page. Its keys and values are written before any row reads, so
that rows of one sequence may stand in one batch. Three forms of the same sum (`platforms.attention_form`): on a CPU a loop goes
over a row's pages, as many as there are, and reads each where it lies; elsewhere such a loop would wait for the host in every
pass, and all rows read as many pages as the program is compiled for, a few at a time; or a kernel of our own does as the loop.

Each page's products are the same code wherever it stands, and pages that a row does not see add exact zeros: its bits do not
depend on how many pages its neighbours have.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxllm.buckets import PAGE, pages_of
from jaxllm.decoder.attention import LOW, Attend, AttentionSpec, Sums, add_keys, no_sums
from jaxllm.decoder.cache_spec import AXES, LayerCache
from jaxllm.decoder.kv_cache import where_rows_go, write_rows
from jaxllm.decoder.layers import add_in_order, dot
from jaxllm.platforms import KERNELS, LOOPS, choices
from sharding.layout import Layout

PASS_BYTES = 32 << 20  # keys and values of a pass: they stay in a GPU's second cache


def over_pages(layout: Layout, form: str, spec: AttentionSpec, cache: LayerCache, start: jax.Array, pages: jax.Array) -> Attend:
    """Attention over a layer's cache, into which it puts rows of tokens that begin at positions `start` [B].

    `pages` [B, C] are those of the layer's group.
    """
    read = partial(read_pages(layout.platform, form), spec)

    def local(
        cache: LayerCache, q: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, start: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        keys, values = k.astype(cache.keys.dtype), v.astype(cache.values.dtype)
        page, offset = where_rows_go(pages, start)
        cache = write_rows(cache, keys.transpose(0, 2, 3, 1), values.swapaxes(1, 2), page, offset, layout.platform)
        return read(q, cache, pages, start), cache

    lies, heads, rows = layout.spec(AXES), layout.spec(("rows", None, "heads", None)), P("data")
    specs = (LayerCache(lies, lies), heads, heads, heads, rows, rows)
    over = jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=(heads, LayerCache(lies, lies)), check_vma=False)
    return lambda q, k, v: over(cache, q, k, v, pages, start)


def read_pages(platform: str, form: str) -> Callable[[AttentionSpec, jax.Array, LayerCache, jax.Array, jax.Array], jax.Array]:
    """A form of the sum, on one device."""
    if form == KERNELS:
        from jaxllm.decoder import attention_kernels  # Pallas takes a third of a second to import

        return partial(attention_kernels.over_pages, interpret=platform == "cpu")
    return by_rows if form == LOOPS else partial(by_passes, turned=choices(platform).turned_keys)


def by_rows(spec: AttentionSpec, q: jax.Array, cache: LayerCache, pages: jax.Array, start: jax.Array) -> jax.Array:
    """q [B, T, N, H] at positions start [B] + t -> [B, T, N, H] float32, with a running maximum (Milakov and Gimelshein 2018)."""
    b, t = q.shape[:2]
    kv_heads = cache.keys.shape[1]
    q = folded_queries(q, kv_heads).astype(cache.keys.dtype)

    def row(i: jax.Array, out: jax.Array) -> jax.Array:
        position, query = start[i] + jnp.arange(t)[:, None], q[i]

        def page(c: jax.Array, sums: Sums) -> Sums:
            at = pages[i, c]
            scores = spec.capped(dot("kqh,khs->kqs", query, cache.keys[at]))
            visible = spec.mask(position, c * PAGE + jnp.arange(PAGE)[None, :])
            scores = jnp.where(visible, scores.reshape(kv_heads, -1, t, PAGE), -jnp.inf).reshape(scores.shape)
            return add_keys(spec, sums, scores, lambda p: dot("kqs,ksh->kqh", p, cache.values[at]))

        begin = 0 if spec.window is None else jnp.maximum(start[i] - spec.window + 1, 0) // PAGE
        _, total, y = jax.lax.fori_loop(begin, (start[i] + t - 1) // PAGE + 1, page, no_sums(query.shape))
        return jax.lax.dynamic_update_index_in_dim(out, y / total[..., None], i, 0)

    # In the place of the queries: XLA would make the zeros for the results of all layers at once, before the first.
    return unfolded_queries(jax.lax.fori_loop(0, b, row, q.astype(jnp.float32)), t)


def by_passes(
    spec: AttentionSpec, q: jax.Array, cache: LayerCache, pages: jax.Array, start: jax.Array, *, turned: bool = False
) -> jax.Array:
    """`by_rows` for a GPU: all rows at once, over all their pages or, with a window, as many as one reaches.

    `turned`: keys are read as [PAGE, H].
    """
    b, t, _, h = q.shape
    kv_heads, reach = cache.keys.shape[1], pages.shape[1]
    begin = jnp.zeros_like(start)
    if spec.window is not None:
        reach = min(reach, pages_of(spec.window - 1 + t) + 1)
        begin = jnp.maximum(start - spec.window + 1, 0) // PAGE
    folded = folded_queries(q, kv_heads).astype(cache.keys.dtype)
    lie, products = (cache.keys.swapaxes(2, 3), "bwkqh,bwksh->bwkqs") if turned else (cache.keys, "bwkqh,bwkhs->bwkqs")
    page_bytes = 2 * b * kv_heads * h * PAGE * cache.keys.dtype.itemsize
    width = max(min(PASS_BYTES // page_bytes, reach), 1)
    position = (start[:, None] + jnp.arange(t)[None, :])[:, None, :, None]  # b w t s

    def over(i: jax.Array | int, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, y = state
        c = begin[:, None] + i * width + jnp.arange(width)[None, :]  # b w
        at = jnp.take_along_axis(pages, c, axis=1, mode="fill", fill_value=0)
        keys, values = (x.at[at].get(mode="promise_in_bounds") for x in (lie, cache.values))
        query = jnp.broadcast_to(folded[:, None], (b, width, *folded.shape[1:]))
        scores = spec.capped(dot(products, query, keys))
        visible = spec.mask(position, (c[:, :, None] * PAGE + jnp.arange(PAGE)[None, None, :])[:, :, None, :])  # b w t s
        by_token = (b, width, kv_heads, -1, t, PAGE)
        scores = jnp.where(visible[:, :, None, None], scores.reshape(by_token), -jnp.inf).reshape(scores.shape)
        new_top = jnp.maximum(top, scores.max(axis=(1, 4)))
        p = jnp.exp((scores - new_top[:, None, ..., None]) * spec.post_max_scale)
        fade = jnp.exp((top - new_top) * spec.post_max_scale)
        new = add_in_order(dot("bwkqs,bwksh->bwkqh", p.astype(values.dtype), values), 1)
        return new_top, total * fade + add_in_order(p.sum(axis=-1), 1), y * fade[..., None] + new

    # Of the queries: XLA would make plain zeros for all layers at once, before the first, 7 MB each in LLaMA-30B's prefill.
    zeros = folded.astype(jnp.float32) * 0
    state = (zeros[..., 0] + LOW, zeros[..., 0], zeros)
    passes = -(-reach // width)
    _, total, y = over(0, state) if passes == 1 else jax.lax.fori_loop(0, passes, over, state)
    return unfolded_queries(y / total[..., None], t)


def folded_queries(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, K * G, H] -> [B, K, G * T, H]."""
    b, t, n, h = q.shape
    return q.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, n // kv_heads * t, h)


def unfolded_queries(y: jax.Array, t: int) -> jax.Array:
    """[B, K, G * T, H] -> [B, T, K * G, H]."""
    b, k, rows, h = y.shape
    return y.reshape(b, k, rows // t, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, k * rows // t, h)

"""Grouped-query attention over the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import Layer, ModelConfig
from jaxllm.decoder import kv_cache as kv
from jaxllm.decoder.batch import TokenBatch
from jaxllm.decoder.cache_spec import LayerCache
from jaxllm.decoder.layers import add_in_order, dot
from jaxllm.decoder.linear import Linear
from jaxllm.decoder.norm import Norm, NormOfAllHeads
from jaxllm.decoder.rope import rotate
from jaxllm.platforms import choices
from sharding.layout import Layout
from sharding.padding import PaddedHeads

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, LayerCache | None]]
"""q [B, T, N, H], k and v [B, T, K, H] -> what each query reads, [B, T, N, H]; and the layer's cache, if there is one."""
Angles = tuple[jax.Array, jax.Array]
"""Cosines and sines of `jaxllm.decoder.rope.rope_angles`."""
BlockReader = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""Index of a block -> its keys [B, K, H, BLOCK] and values [B, K, BLOCK, H]."""


LOW = -1e30  # below every score; of -inf, the difference to itself is no number


class AttentionSpec(NamedTuple):
    """Scale and soft cap of a layer's scores, and the keys that its queries see.

    Attributes:
      scale: factor of the products.
      softcap: c: a scaled product x becomes c * tanh(x / c) (Gemma 2); 0: it stays.
      window: how many positions a query sees, its own included; None: all before it.
    """

    scale: float
    softcap: float
    window: int | None

    @classmethod
    def of(cls, config: ModelConfig, layer: Layer) -> AttentionSpec:
        return cls(layer.attention_scale, config.attention_cap, layer.window)

    def capped(self, products: jax.Array) -> jax.Array:
        """Products of queries and keys with the soft cap, if any; still to be multiplied by `post_max_scale`."""
        return self.softcap * jnp.tanh(products * (self.scale / self.softcap)) if self.softcap else products

    @property
    def post_max_scale(self) -> float:
        """Factor applied after the row's maximum is subtracted: applied before, XLA may fuse it there, to other bits."""
        return 1.0 if self.softcap else self.scale

    def mask(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """True where the query at a position sees the key at another: causal, within the window; positions broadcast."""
        seen = key <= query
        return seen if self.window is None else seen & (key > query - self.window)


class Attention(nnx.Module):
    """Multi-head attention with N query heads in groups of G around each of K KV heads, all sizes padded."""

    def __init__(self, config: ModelConfig, heads: PaddedHeads, layout: Layout, dtype: str):
        n, k, h, d = heads.slots * heads.group, heads.slots, config.head_dim, config.hidden_size
        self.head_dim = h
        embed, heads_axis, kv_axis = (d, "embed"), (n * h, "heads"), (k * h, "kv_heads")
        self.query = Linear(layout, embed, heads_axis, dtype, bias=config.qkv_bias)
        self.key = Linear(layout, embed, kv_axis, dtype, bias=config.qkv_bias)
        self.value = Linear(layout, embed, kv_axis, dtype, bias=config.qkv_bias)
        self.out = Linear(layout, heads_axis, embed, dtype, bias=config.out_bias)
        self.query_norm = _norm_of_heads(config, dtype, "heads", heads.query_index)
        self.key_norm = _norm_of_heads(config, dtype, "kv_heads", heads.kv_index)

    def __call__(self, x: jax.Array, angles: Angles | None, attend: Attend) -> tuple[jax.Array, LayerCache | None]:
        """x [B, T, D] -> [B, T, D] float32, and the cache with these tokens in it. `attend` knows which tokens see which."""
        q = self._norm_and_rope(self._project(x, self.query), self.query_norm, angles, x.dtype)
        k = self._norm_and_rope(self._project(x, self.key), self.key_norm, angles, x.dtype)
        v = self._project(x, self.value).astype(x.dtype)
        y, cache = attend(q, k, v)
        return self.out(y.astype(x.dtype).reshape(*x.shape[:2], -1)), cache

    def _project(self, x: jax.Array, projection: Linear) -> jax.Array:
        """x [B, T, D] -> [B, T, heads, H] float32, rounded to the model's dtype as a linear layer of the reference is."""
        y = projection(x).astype(x.dtype).astype(jnp.float32)
        return y.reshape(*x.shape[:2], -1, self.head_dim)

    def _norm_and_rope(
        self, x: jax.Array, norm: Norm | NormOfAllHeads | None, angles: Angles | None, dtype: jnp.dtype
    ) -> jax.Array:
        """Queries or keys [B, T, heads, H] float32 with norm and position, in the model's dtype."""
        if norm is not None:
            x = norm(x.astype(dtype)).astype(jnp.float32)
        return (x if angles is None else rotate(x, *angles)).astype(dtype)


def _norm_of_heads(config: ModelConfig, dtype: str, axis: str, index: tuple[int, ...]) -> Norm | NormOfAllHeads | None:
    """The norm of queries or keys that the config asks for. `index`: the source of each padded head."""
    if config.qk_norm == "all":
        return NormOfAllHeads(config, dtype, axis, index)
    return Norm(config, dtype, config.head_dim) if config.qk_norm else None


def over_cache(layout: Layout, cache: LayerCache, batch: TokenBatch, spec: AttentionSpec) -> Attend:
    """Attention in which new tokens see those of their row that the cache holds, and each other causally."""

    def over(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, LayerCache]:
        keys, values = k.astype(cache.keys.dtype), v.astype(cache.values.dtype)
        wraps = spec.window is not None
        new = kv.write(cache, layout, keys.transpose(0, 2, 3, 1), values.swapaxes(1, 2), batch, wraps=wraps)
        if q.shape[1] > 1 and choices(layout.platform).loops_over_tiles:
            blocks = new.values.shape[2]
            read = partial(kv.read_block, new, layout, batch)
            return attend_by_blocks(q, (lambda i: read(i % blocks)) if wraps else read, batch.start, spec), new
        return attend(q, *kv.read(new, layout, batch), batch.start, spec, layout.platform), new

    return over


def attend(q: jax.Array, keys: jax.Array, values: jax.Array, start: jax.Array, spec: AttentionSpec, platform: str) -> jax.Array:
    """Causal attention: q [B, T, N, H] at positions start [B] + t over keys [B, K, C, H, BLOCK] and values [B, K, C, BLOCK, H].

    Returns [B, T, N, H] float32.

    Every block's products and sums are those of any other, and the blocks are added in order. A longer cache, which a neighbour
    in the batch may have caused, then adds exact zeros at the end and leaves a row's bits alone.
    """
    b, t, n, h = q.shape
    _, k, c, size, _ = values.shape
    # The cache may be wider than the model. One query reads it as it lies; many are worth narrowing it for.
    dtype = keys.dtype if t == 1 else q.dtype
    q, keys, values = q.astype(dtype), keys.astype(dtype), values.astype(dtype)
    q = q.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)  # b k g t h
    q = jnp.broadcast_to(q[:, :, None], (b, k, c, *q.shape[2:]))
    scores = spec.capped(dot("bkcgth,bkchs->bkcgts", q, keys))
    position = start[:, None] + jnp.arange(t)[None, :]
    visible = spec.mask(position[:, None, :, None], _stored(spec, c, size, start + t - 1))  # b c t s
    scores = jnp.where(visible[:, None, :, None], scores, -jnp.inf)
    p = jnp.exp((scores - jnp.max(scores, axis=(2, 5), keepdims=True)) * spec.post_max_scale)
    # Where XLA reads the values as they lie.
    axis, order = (0, "cbkgth") if choices(platform).blocks_first and n // k * t == 1 else (2, "bkcgth")
    out = dot(f"bkcgts,bkcsh->{order}", p.astype(dtype), values)
    y = add_in_order(out, axis) / add_in_order(p.sum(axis=-1), 2)[..., None]  # b k g t h
    return y.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def _stored(spec: AttentionSpec, blocks: int, size: int, last: jax.Array) -> jax.Array:
    """Position stored at each index of a cache of C blocks once those up to `last` [B] are in: [B or 1, C, 1, BLOCK]."""
    at = jnp.arange(blocks * size).reshape(1, blocks, 1, size)
    if spec.window is None:
        return at
    last = last[:, None, None, None]
    position = last - (last - at) % (blocks * size)
    return jnp.where(position < 0, last + 1, position)  # of none yet, what no query sees


def attend_by_blocks(q: jax.Array, read: BlockReader, start: jax.Array, spec: AttentionSpec) -> jax.Array:
    """`attend` in a loop over the blocks that any query sees, with a running maximum (Milakov and Gimelshein 2018)."""
    b, t, n, h = q.shape
    _, k, size, _ = jax.eval_shape(read, jnp.int32(0))[1].shape
    dtype = q.dtype
    q = q.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)  # b k g t h
    position = start[:, None] + jnp.arange(t)[None, :]

    def block(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, y = state
        key, value = (x.astype(dtype) for x in read(i))
        scores = spec.capped(dot("bkgth,bkhs->bkgts", q, key))
        visible = spec.mask(position[:, :, None], (i * size + jnp.arange(size))[None, None, :])  # b t s
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        p = jnp.exp((scores - new_top[..., None]) * spec.post_max_scale)
        fade = jnp.exp((top - new_top) * spec.post_max_scale)
        new = dot("bkgts,bksh->bkgth", p.astype(dtype), value)
        return new_top, total * fade + p.sum(axis=-1), y * fade[..., None] + new

    blocks = (jnp.max(start) + t + size - 1) // size
    begin = 0 if spec.window is None else jnp.maximum(jnp.min(start) - spec.window + 1, 0) // size
    # Made of this layer's queries: of constants XLA makes those of all layers first, and holds them.
    zeros = 0 * q.astype(jnp.float32)
    first = (zeros[..., 0] + LOW, zeros[..., 0], zeros)
    _, total, y = jax.lax.fori_loop(begin, blocks, block, first)
    return (y / total[..., None]).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)

"""Grouped-query attention: projections, and what a layer's scores see. `paged_attention` and `tree_attention` do the sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import Layer, ModelConfig
from jaxllm.decoder.cache_spec import LayerCache
from jaxllm.decoder.linear import Joint, Linear, Segment
from jaxllm.decoder.norm import Norm, NormOfAllHeads
from jaxllm.decoder.rope import rotate
from sharding.layout import Layout
from sharding.padding import PaddedHeads

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, LayerCache | None]]
"""q [B, T, N, H], k and v [B, T, K, H] -> what each query reads, [B, T, N, H]; and the layer's cache, if there is one."""
Angles = tuple[jax.Array, jax.Array]
"""Cosines and sines of `jaxllm.decoder.rope.rope_angles`."""

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


Sums = tuple[jax.Array, jax.Array, jax.Array]
"""Of each query the maximum of its scores [...], the sum of their exponentials [...], and that of the values [..., H]."""


def no_sums(shape: tuple[int, ...]) -> Sums:
    """The sums of queries [..., H] before anything was added."""
    zeros = jnp.zeros(shape, jnp.float32)
    return zeros[..., 0] + LOW, zeros[..., 0], zeros


def add_keys(spec: AttentionSpec, sums: Sums, scores: jax.Array, read: Callable[[jax.Array], jax.Array]) -> Sums:
    """The sums with further scores [..., S], -inf where a key is not seen (Milakov and Gimelshein 2018).

    `read`: exponentials [..., S] -> their sum of the values [..., H].
    """
    top, total, y = sums
    new_top = jnp.maximum(top, scores.max(axis=-1))
    p = jnp.exp((scores - new_top[..., None]) * spec.post_max_scale)
    fade = jnp.exp((top - new_top) * spec.post_max_scale)
    return new_top, total * fade + p.sum(axis=-1), y * fade[..., None] + read(p)


class Attention(nnx.Module):
    """Multi-head attention with N query heads in groups of G around each of K KV heads, all sizes padded."""

    def __init__(self, config: ModelConfig, heads: PaddedHeads, layout: Layout, dtype: str):
        n, k, h, d = heads.slots * heads.group, heads.slots, config.head_dim, config.hidden_size
        self.head_dim = h
        segments = (Segment("query", n * h, "heads"), Segment("key", k * h, "kv_heads"), Segment("value", k * h, "kv_heads"))
        self.query_key_value = Joint(layout, (d, "embed"), segments, dtype, bias=config.qkv_bias)
        self.out = Linear(layout, (n * h, "heads"), (d, "embed"), dtype, bias=config.out_bias)
        self.query_norm = _norm_of_heads(config, dtype, "heads", heads.query_index)
        self.key_norm = _norm_of_heads(config, dtype, "kv_heads", heads.kv_index)

    def __call__(self, x: jax.Array, angles: Angles | None, attend: Attend) -> tuple[jax.Array, LayerCache | None]:
        """x [B, T, D] -> [B, T, D] float32, and the cache with these tokens in it. `attend` knows which tokens see which."""
        q, k, v = (y.reshape(*x.shape[:2], -1, self.head_dim) for y in self.query_key_value.each(x))
        q = self._norm_and_rope(q, self.query_norm, angles)
        k = self._norm_and_rope(k, self.key_norm, angles)
        y, cache = attend(q, k, v)
        return self.out(y.astype(x.dtype).reshape(*x.shape[:2], -1)), cache

    def _norm_and_rope(self, x: jax.Array, norm: Norm | NormOfAllHeads | None, angles: Angles | None) -> jax.Array:
        """Queries or keys [B, T, heads, H] with norm and position."""
        y = x if norm is None else norm(x)
        return y if angles is None else rotate(y.astype(jnp.float32), *angles).astype(x.dtype)


def _norm_of_heads(config: ModelConfig, dtype: str, axis: str, index: tuple[int, ...]) -> Norm | NormOfAllHeads | None:
    """The norm of queries or keys that the config asks for. `index`: the source of each padded head."""
    if config.qk_norm == "all":
        return NormOfAllHeads(config, dtype, axis, index)
    return Norm(config, dtype, config.head_dim) if config.qk_norm else None

"""The decoder: embedding, a list of blocks, a head.

The blocks are unrolled in the program, not scanned: stacked layers under `scan` copy every weight slice in every step on a GPU.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.attention import Attend, Attention, over_cache
from jaxllm.batch import PackedBatch, TokenBatch
from jaxllm.cache import Cache, LayerCache
from jaxllm.config import ModelConfig
from jaxllm.layers import RMSNorm, dot, fill_rows, param, weight
from jaxllm.mlp import MLP
from jaxllm.rope import rope_angles
from jaxllm.tree_attention import over_trees
from sharding.layout import Layout
from sharding.padding import PaddedHeads, pad_heads, round_up


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, heads: PaddedHeads, layout: Layout, dtype: str):
        self.layout = layout
        self.attention_norm = RMSNorm(config, dtype)
        self.attention = Attention(config, heads, layout, dtype)
        self.mlp_norm = RMSNorm(config, dtype)
        self.mlp = MLP(config, layout, dtype)

    def __call__(self, x: jax.Array, angles: tuple[jax.Array, jax.Array], attend: Attend) -> tuple[jax.Array, LayerCache | None]:
        """x [B, T, D] -> [B, T, D], and the layer's cache with these tokens in it."""
        y, cache = self.attention(self.attention_norm(x), angles, attend)
        x = self._add(x, y)
        return self._add(x, self.mlp(self.mlp_norm(x))), cache

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        # Constrained here so that each half ends in one all-reduce and never in a scattered residual.
        x = x + self.layout.constrain(y.astype(x.dtype), "rows", None, None)
        # Many tokens' sums are written down: XLA would rather add the halves' results anew wherever they are read, and keep
        # those of all layers until the end.
        return x if x.shape[1] == 1 else jax.lax.optimization_barrier(x)


class Decoder(nnx.Module):
    """A decoder-only transformer for `config`, laid out by `layout`, with parameters of `dtype` and no values yet."""

    def __init__(self, config: ModelConfig, layout: Layout, dtype: str):
        heads = pad_heads(config.num_heads, config.num_kv_heads, layout.parts)
        vocab = round_up(config.vocab_size, layout.parts)
        self.config = config
        self.layout = layout
        self.embedding = param((vocab, config.hidden_size), ("vocab", "embed"), dtype)
        self.blocks = nnx.List([Block(config, heads, layout, dtype) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config, dtype)
        self.head = None if config.tied_head else param((vocab, config.hidden_size), ("vocab", "embed"), dtype)

    def __call__(self, batch: TokenBatch, cache: Cache) -> tuple[jax.Array, Cache]:
        """The batch's tokens -> their last hidden states [B, T, D], before the final norm, and the cache with them in it."""
        positions = batch.start[:, None] + jnp.arange(batch.tokens.shape[1])[None, :]
        attends = [over_cache(self.layout, layer, batch) for layer in cache]
        return self._run(batch.tokens, positions, batch.lengths, attends, few=True)

    def packed(self, batch: PackedBatch, width: int) -> jax.Array:
        """Packed trees of tokens -> their last hidden states [B, T, D]; nothing is kept."""
        attend = over_trees(self.layout, batch, width)
        lengths = jnp.zeros(batch.tokens.shape[0], jnp.int32)
        return self._run(batch.tokens, batch.position, lengths, [attend] * len(self.blocks), few=False)[0]

    def _run(self, tokens: Any, positions: Any, lengths: Any, attends: list[Attend], few: bool) -> tuple[jax.Array, Any]:
        x = self._embed(jnp.asarray(tokens))
        angles = rope_angles(self.config.rope, self.config.head_dim, positions, lengths)
        # Computed once: XLA would fuse sines and cosines into every use, for every head of every layer.
        angles = jax.lax.optimization_barrier(angles)
        layers, blocks = [], list(self.blocks)
        for i, attend in enumerate(attends):
            if few and self.layout.gathered and i + 1 < len(blocks):
                x, blocks[i + 1] = _after(x, blocks[i + 1])
            x, layer = blocks[i](x, angles, attend)
            layers.append(layer)
        return x, layers

    def _embed(self, tokens: jax.Array) -> jax.Array:
        """Rows of the embedding, [B, T, D].

        Each device looks up the tokens of its part of the vocabulary and the parts are summed; left to itself, XLA gathers the
        whole table for a single token.
        """
        axes = self.embedding.get_metadata()["axes"]
        spec, rows = self.layout.spec(axes), self.layout.spec(("rows", None))

        def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
            own = tokens - jax.lax.axis_index("model") * table.shape[0]
            # Looked up as integers: of a 16-bit float table XLA's CPU compiler makes a float32 copy in every call. And behind a
            # barrier, or decode's loop has the integers copied before it begins.
            bits = table
            if table.dtype.itemsize == 2:
                table, own = jax.lax.optimization_barrier((table, own))
                bits = table.view(jnp.uint16)
            found = bits.at[own].get(mode="fill", fill_value=0, wrap_negative_indices=False)
            return jax.lax.psum(found.view(table.dtype), "model")

        out = self.layout.spec(("rows", None, None))
        look_up = jax.shard_map(local, mesh=self.layout.mesh, in_specs=(spec, rows), out_specs=out)
        return look_up(weight(self.layout, self.embedding), tokens)

    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden states [B, D] -> logits [B, V] float32, whole on every device; of padded vocabulary nothing is left."""
        table = self.embedding if self.head is None else self.head
        rows = fill_rows(self.layout, self.norm(x)[:, None, :])
        y = dot("md,vd->mv", rows.reshape(-1, rows.shape[-1]), weight(self.layout, table))
        y = y.reshape(*rows.shape[:2], -1)[:, 0]
        # In two steps: straight to the whole, XLA may gather the table and not the logits.
        y = self.layout.constrain(y, "rows", "vocab")
        return self.layout.constrain(y, "rows", None)[:, : self.config.vocab_size]


def _after(x: jax.Array, block: Block) -> tuple[jax.Array, Block]:
    """`x`, and `block` with weights that are gathered only when `x` is there.

    With few tokens to hide gathers behind, XLA for Hopper begins those of all layers at once, and holds the whole model.
    """
    graph, state = nnx.split(block)
    x, state = jax.lax.optimization_barrier((x, state))
    return x, nnx.merge(graph, state)

"""The decoder: embedding, a list of blocks, a head.

The blocks are unrolled in the program, not scanned: stacked layers under `scan` copy every weight slice in every step on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import Layer, ModelConfig, RopeConfig
from jaxllm.decoder.attention import Angles, Attend, Attention, AttentionSpec
from jaxllm.decoder.batch import PackedBatch, TokenBatch
from jaxllm.decoder.cache_spec import LayerCache, windows
from jaxllm.decoder.kv_cache import Cache
from jaxllm.decoder.layers import dot, param, weight
from jaxllm.decoder.linear import Linear, Table
from jaxllm.decoder.mlp import MLP
from jaxllm.decoder.moe import MixtureOfExperts
from jaxllm.decoder.norm import Norm
from jaxllm.decoder.paged_attention import over_pages
from jaxllm.decoder.rope import rope_angles
from jaxllm.decoder.tree_attention import over_trees
from jaxllm.platforms import PASSES, choices
from sharding.layout import Layout
from sharding.padding import PaddedHeads, pad_heads, round_up


class Block(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); or with norms elsewhere, or both halves of the same x (`ModelConfig`)."""

    def __init__(self, config: ModelConfig, layer: Layer, heads: PaddedHeads, layout: Layout, dtype: str):
        self.layout = layout
        self.scale, self.parallel = config.residual_scale, config.parallel
        self.of_sum = config.norm_place == "sum"
        first, after = config.norm_place != "after", config.norm_place in ("after", "around")
        self.attention_norm = Norm(config, dtype) if first else None
        self.attention = Attention(config, heads, layout, dtype)
        self.attention_post_norm = Norm(config, dtype) if after else None
        self.mlp_norm = Norm(config, dtype) if first else None
        self.mlp = None if layer.routed else MLP(config, layout, dtype)
        self.experts = MixtureOfExperts(config, layout, dtype) if layer.routed else None
        self.mlp_post_norm = Norm(config, dtype) if after else None

    def __call__(self, x: jax.Array, angles: Angles | None, attend: Attend) -> tuple[jax.Array, LayerCache | None]:
        """x [B, T, D] -> [B, T, D], and the layer's cache with these tokens in it."""
        y, cache = self.attention(self._before(self.attention_norm, x), angles, attend)
        if self.parallel:
            return self._add(x, y + self._ffn(x), None, None), cache
        x = self._add(x, y, self.attention_norm, self.attention_post_norm)
        return self._add(x, self._ffn(x), self.mlp_norm, self.mlp_post_norm), cache

    def _before(self, norm: Norm | None, x: jax.Array) -> jax.Array:
        return x if self.of_sum else _normed(norm, x)

    def _ffn(self, x: jax.Array) -> jax.Array:
        half = self.experts if self.mlp is None else self.mlp
        assert half is not None, "a block has one or the other"
        return half(self._before(self.mlp_norm, x))

    def _add(self, x: jax.Array, y: jax.Array, norm: Norm | None, post: Norm | None) -> jax.Array:
        # Constrained here so that each half ends in one all-reduce and never in a scattered residual.
        y = _normed(post, self.layout.constrain(y.astype(x.dtype), "rows", None, None))
        if self.scale != 1:
            y = (y.astype(jnp.float32) * self.scale).astype(x.dtype)
        x = x + y
        if self.of_sum:
            x = _normed(norm, x)
        # Many tokens' sums are written down: XLA would rather add the halves' results anew wherever they are read, and keep
        # those of all layers until the end.
        return x if x.shape[1] == 1 else jax.lax.optimization_barrier(x)


def _normed(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


class Decoder(nnx.Module):
    """A decoder-only transformer for `config`, laid out by `layout`, with parameters of `dtype` and no values yet."""

    def __init__(self, config: ModelConfig, layout: Layout, dtype: str, attention: str = PASSES):
        """`attention`: its form, see `attention_form`."""
        self.attention = attention
        heads = pad_heads(config.num_heads, config.num_kv_heads, layout.divisor)
        vocab, table, d = round_up(config.vocab_size, layout.divisor), config.table_size, config.hidden_size
        self.config = config
        self.layout = layout
        self.embedding = Table(layout, vocab, table, dtype)
        self.positions = param((config.learned_positions, d), (None, None), dtype) if config.learned_positions else None
        self.project_in = Linear(layout, (table, None), (d, None), dtype) if config.embed_size else None
        self.blocks = nnx.List([Block(config, layer, heads, layout, dtype) for layer in config.layers])
        self.norm = Norm(config, dtype) if config.final_norm else None
        self.project_out = Linear(layout, (d, None), (table, None), dtype) if config.embed_size else None
        self.head = None if config.tied_head else Table(layout, vocab, table, dtype)
        self.classifier = Linear(layout, (table, None), (config.labels, None), dtype) if config.labels else None

    def __call__(self, batch: TokenBatch, cache: Cache) -> tuple[jax.Array, Cache]:
        """The batch's tokens -> their last hidden states [B, T, D], before the final norm, and the cache with them in it."""
        positions = batch.start[:, None] + jnp.arange(batch.tokens.shape[1])[None, :]
        pages = dict(zip(windows(self.config), batch.pages, strict=True))
        given = [(own, batch.start, pages[layer.window]) for own, layer in zip(cache, self.config.layers, strict=True)]
        over = partial(over_pages, self.layout, self.attention)
        return self._run(batch.tokens, positions, batch.lengths, over, given, defer_gathers=True)

    def packed(self, batch: PackedBatch, width: int) -> jax.Array:
        """Packed trees of tokens -> their last hidden states [B, T, D]; nothing is kept."""
        given = [(batch.position, batch.end, batch.first, batch.key_tiles)] * self.config.num_layers
        lengths = jnp.zeros(batch.tokens.shape[0], jnp.int32)
        over = partial(over_trees, self.layout, self.attention, width)
        return self._run(batch.tokens, batch.position, lengths, over, given, defer_gathers=False)[0]

    def _run(
        self, tokens: Any, positions: Any, lengths: Any, over: Callable[..., Attend], given: list[Any], defer_gathers: bool
    ) -> tuple[jax.Array, Any]:
        """`over(spec, *given[i])` is layer i's attention.

        `defer_gathers`: each layer's weights are gathered when the one before is done; with experts always.
        """
        x, layers = self._embed(jnp.asarray(tokens), positions), self.config.layers
        ropes = [rope for rope in dict.fromkeys(layer.rope for layer in layers) if rope is not None]
        angles = {rope: self._angles(rope, jnp.asarray(positions), jnp.asarray(lengths)) for rope in ropes}
        weights, caches = [nnx.state(block) for block in self.blocks], []
        run = {layer: self._layer(over, layer) for layer in dict.fromkeys(layers)}
        for i, layer in enumerate(layers):
            if (defer_gathers or self.config.experts) and self.layout.gathered and i + 1 < len(weights):
                # The next layer's are gathered when `x` is there: with few tokens to hide gathers behind, or where experts run
                # in loops, XLA for Hopper begins those of all layers at once, and holds the whole model.
                x, weights[i + 1] = jax.lax.optimization_barrier((x, weights[i + 1]))
            x, own = run[layer](weights[i], x, None if layer.rope is None else angles[layer.rope], given[i])
            caches.append(own)
        return x, caches

    def _layer(self, over: Callable[..., Attend], layer: Layer) -> Callable[..., tuple[jax.Array, LayerCache | None]]:
        """What all layers of one kind do, under a `jit` of its own: traced for the first of them, and inlined by XLA in all."""
        graph = nnx.graphdef(self.blocks[self.config.layers.index(layer)])
        spec = AttentionSpec.of(self.config, layer)

        def run_layer(weights: Any, x: jax.Array, angles: Angles | None, given: Any) -> tuple[jax.Array, LayerCache | None]:
            block: Block = nnx.merge(graph, weights)
            return block(x, angles, over(spec, *given))

        return jax.jit(run_layer)

    def _angles(self, rope: RopeConfig, positions: jax.Array, lengths: jax.Array) -> Angles:
        """Computed once: XLA would fuse sines and cosines into every use, for every head of every layer."""
        make = partial(rope_angles, rope, self.config.head_dim)
        if not choices(self.layout.platform).drops_barriers:
            return jax.lax.optimization_barrier(make(positions, lengths))

        def local(positions: jax.Array, lengths: jax.Array) -> Angles:
            none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make, positions, lengths))
            always = positions[0, 0] > jnp.iinfo(positions.dtype).min  # but XLA cannot tell
            return jax.lax.cond(always, make, lambda *_: none, positions, lengths)

        rows = [self.layout.spec(("rows", *axes)) for axes in ((None,), (), (None, None))]
        over = jax.shard_map(local, mesh=self.layout.mesh, in_specs=tuple(rows[:2]), out_specs=rows[2], check_vma=False)
        return over(positions, lengths)

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Tokens [B, T] -> input of the first block, [B, T, D]."""
        config = self.config
        x = self.embedding.look_up(tokens)
        if config.embedding_scale != 1:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)  # rounded, as the reference does
        if self.project_in is not None:
            x = dot("btw,wd->btd", x, self.project_in.matrix()).astype(x.dtype)
        if self.positions is not None:
            table = weight(self.layout, self.positions)
            x = x + jnp.take(table, positions + config.position_offset, axis=0, mode="clip")
        return x

    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden states [B, D] -> logits [B, V] float32, whole on every device; of padded vocabulary nothing is left."""
        y = self.table.products(self.final(x))
        # In two steps: straight to the whole, XLA may gather the table and not the logits.
        y = self.layout.constrain(y, "rows", "vocab")
        y = self.layout.constrain(y, "rows", None)[:, : self.config.vocab_size]
        return self.capped(y)

    def classes(self, x: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] after `final` -> a classifier's logits [B, T, labels] float32."""
        assert self.classifier is not None, "only a classifier has labels"
        return self.classifier(x)

    def final(self, x: jax.Array) -> jax.Array:
        """Last hidden states [..., D] as the head's table is multiplied with."""
        x = _normed(self.norm, x)
        if self.project_out is not None:
            x = dot("...d,dw->...w", x, self.project_out.matrix()).astype(x.dtype)
        return x

    @property
    def table(self) -> Table:
        """The head's, which may be the embedding."""
        return self.embedding if self.head is None else self.head

    def capped(self, products: jax.Array) -> jax.Array:
        """Products with the head's table -> logits."""
        scale, cap = self.config.logit_scale, self.config.logit_cap
        y = products if scale == 1 else products * scale
        return cap * jnp.tanh(y / cap) if cap else y

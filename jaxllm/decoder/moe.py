"""Feed-forward blocks of which a router chooses a few for each token (Shazeer et al. 2017, Jiang et al. 2024).

Every expert is split over `model` as a dense block's ffn is: each device has the same work whatever the router chooses, and one
all-reduce ends the block. No token is dropped. A pair is a token and one of its experts:

- Few pairs, as in decoding of a few rows: each reads the weights of its expert.
- Many, on TPUs: grouped products (`jax.lax.ragged_dot`), sorted by expert.
- Many, elsewhere, where XLA would multiply every token by every expert: rounds, in each of which every expert takes its next
  `capacity` pairs, all of them in one batched product, until the expert with most pairs has had its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import Experts, ModelConfig
from jaxllm.decoder.layers import dot
from jaxllm.decoder.linear import Joint, Linear
from jaxllm.decoder.mlp import MLP, activate, gate_and_up
from jaxllm.platforms import choices
from sharding.layout import Layout
from sharding.padding import round_up

SPARE = 1.25  # capacity of an expert in a round, over the mean


class MixtureOfExperts(nnx.Module):
    """The sum of a token's experts, weighted by the router, and of one that all tokens share."""

    def __init__(self, config: ModelConfig, layout: Layout, dtype: str):
        experts = config.experts
        assert experts is not None, "the layer is a dense one"
        e, d, f = experts.count, config.hidden_size, round_up(experts.size, layout.divisor)
        self.layout, self.experts, self.activation = layout, experts, config.activation
        embed = (d, "embed")
        self.router = Linear(layout, embed, (e, None), dtype)
        self.gate_up = Joint(layout, embed, gate_and_up(config, f, "expert_ffn"), dtype, experts=e)
        self.down = Linear(layout, (f, "expert_ffn"), embed, dtype, experts=e)
        self.shared = MLP(config, layout, dtype, experts.shared_size) if experts.shared_size else None
        self.shared_gate = Linear(layout, embed, (1, None), dtype) if experts.shared_size else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D] float32."""
        shares = jax.nn.softmax(dot("btd,de->bte", x, self.router.matrix()), axis=-1)
        matrices, specs = [self.gate_up.matrix(), self.down.matrix()], [self.gate_up.spec, self.down.spec]
        rows = self.layout.spec(("rows", None, None))
        run = partial(_chosen, self.experts, self.activation, self.layout.platform)
        over = jax.shard_map(run, mesh=self.layout.mesh, in_specs=(rows, rows, specs), out_specs=rows, check_vma=False)
        y = over(x, shares, matrices)
        if self.shared is not None and self.shared_gate is not None:
            share = jax.nn.sigmoid(dot("btd,do->bto", x, self.shared_gate.matrix()))
            y = y + share * self.shared(x)
        return y


Matrices = Sequence[Any]
"""Gate, if there is one, and up, side by side, [E, D, 2 * F], and down [E, F, D] of all experts, this device's shard of F."""


def _chosen(config: Experts, activation: str, platform: str, x: jax.Array, shares: jax.Array, matrices: Matrices) -> jax.Array:
    """x [B, T, D] and the router's shares [B, T, E] -> [B, T, D] float32, summed over `model`. Runs on each device.

    The choice is made here too: left to itself, XLA gathers the shares of all rows for it.
    """
    gates, chosen = jax.lax.top_k(shares, config.top_k)
    if config.normalised:
        gates = gates / gates.sum(axis=-1, keepdims=True)
    k, d, experts = config.top_k, x.shape[-1], config.count
    tokens, expert = x.reshape(-1, d), chosen.reshape(-1)
    run: Form
    if 2 * len(expert) <= experts:
        run = _one_by_one if choices(platform).few_experts == "one by one" else _with_own_weights
    elif choices(platform).grouped_products:
        run = _ragged
    else:
        run = partial(_in_rounds, capacity=capacity(config, platform, len(tokens)))
    y = run(partial(_ffn, activation), tokens, expert, matrices)  # [pairs, D]
    y = jnp.sum(y.reshape(-1, k, d).astype(jnp.float32) * gates.reshape(-1, k, 1), axis=1)
    return jax.lax.psum(y, "model").reshape(x.shape)


def capacity(config: Experts, platform: str, tokens: int) -> int:
    """Pairs that an expert takes in a round of so many tokens."""
    if tokens <= choices(platform).one_round:
        return tokens
    return min(round_up(int(SPARE * tokens * config.top_k / config.count) + 1, 8), tokens)


def products(config: Experts, platform: str, tokens: int) -> tuple[int, int]:
    """(experts whose weights are read, rows that each is multiplied with) for so many tokens."""
    if 2 * tokens * config.top_k <= config.count:
        return tokens * config.top_k, 1
    return config.count, capacity(config, platform, tokens)


def _ffn(activation: str, product: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, matrices: Matrices) -> jax.Array:
    """A block with `product` for its products."""
    gate_up, down = matrices
    y = product(x, gate_up).astype(x.dtype)
    *gate, up = jnp.split(y, gate_up.shape[-1] // down.shape[-2], axis=-1)
    return product(activate(activation, gate[0] if gate else None, up), down).astype(x.dtype)


Ffn = Callable[[Callable[[jax.Array, jax.Array], jax.Array], jax.Array, Matrices], jax.Array]
"""`_ffn` but for the activation's name."""
Form = Callable[[Ffn, jax.Array, jax.Array, Matrices], jax.Array]
"""Tokens [n, D] and the expert of each pair [n * k], those of a token together -> each expert's output, [n * k, D]."""


def _one_by_one(ffn: Ffn, tokens: jax.Array, expert: jax.Array, matrices: Matrices) -> jax.Array:
    """A loop over the pairs."""
    k = len(expert) // len(tokens)

    def pair(i: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, expert[i], keepdims=False), matrices)
        return ffn(partial(dot, "ti,io->to"), jax.lax.dynamic_slice_in_dim(tokens, i // k, 1), own)[0]

    return jax.lax.map(pair, jnp.arange(len(expert)))


def _with_own_weights(ffn: Ffn, tokens: jax.Array, expert: jax.Array, matrices: Matrices) -> jax.Array:
    """All pairs at once, as sums of products: XLA for GPUs reads the weights there, and would copy them for matrix products."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        terms = x[:, :, None].astype(jnp.float32) * jnp.take(w, expert, axis=0, mode="clip").astype(jnp.float32)
        return jnp.sum(terms, axis=1)

    return ffn(product, jnp.repeat(tokens, len(expert) // len(tokens), axis=0), matrices)


def _ragged(ffn: Ffn, tokens: jax.Array, expert: jax.Array, matrices: Matrices) -> jax.Array:
    """Grouped products over the pairs, sorted by expert."""
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=matrices[1].shape[0])
    precision = jax.lax.Precision.HIGHEST if tokens.dtype == jnp.float32 else None  # as `dot`
    product = partial(jax.lax.ragged_dot, group_sizes=sizes, preferred_element_type=jnp.float32, precision=precision)
    y = ffn(product, tokens[order // (len(expert) // len(tokens))], matrices)
    return jnp.zeros_like(y).at[order].set(y, unique_indices=True)


def _in_rounds(ffn: Ffn, tokens: jax.Array, expert: jax.Array, matrices: Matrices, *, capacity: int) -> jax.Array:
    """Batched products, in each of which every expert takes up to `capacity` pairs."""
    pairs, count = len(expert), matrices[1].shape[0]
    k = pairs // len(tokens)
    of = expert[:, None] == jnp.arange(count)[None, :]
    before = jnp.cumsum(of.astype(jnp.int32), axis=0)
    rank = jnp.take_along_axis(before, expert[:, None], axis=1)[:, 0] - 1  # which of its expert's pairs each is
    rounds = (jnp.max(before[-1]) + capacity - 1) // capacity

    def one_round(i: jax.Array, done: jax.Array) -> jax.Array:
        seat = rank - i * capacity
        now = (seat >= 0) & (seat < capacity)
        at = jnp.where(now, expert * capacity + seat, count * capacity)
        seated = jnp.full(count * capacity, pairs, jnp.int32).at[at].set(jnp.arange(pairs), mode="drop")
        x = tokens.at[seated // k].get(mode="fill", fill_value=0).reshape(count, capacity, -1)
        y = ffn(partial(dot, "eci,eio->eco"), x, matrices).reshape(count * capacity, -1)
        return jnp.where(now[:, None], y.at[at].get(mode="clip"), done)

    # All of it is written over. Of zeros, XLA for GPUs would make those of all layers first.
    done = jnp.repeat(tokens, k, axis=0)
    # A token chooses an expert once: with a seat for every token one round is enough.
    return one_round(jnp.int32(0), done) if capacity == len(tokens) else jax.lax.fori_loop(0, rounds, one_round, done)

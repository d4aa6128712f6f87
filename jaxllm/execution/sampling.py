"""Choosing the next token on the device.

Logits are changed in vLLM's order: bias, minimum length, repetition penalty, temperature, min-p, top-k, top-p. Filters find their
threshold by bisection over the bits of a float32, which is exact, keeps ties, and needs no sort of the vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.execution.batch import LogitsPenalties, Logprobs, Sampled, SamplingBatch, SamplingFilters


def sample(logits: jax.Array, batch: SamplingBatch, top_logprobs: int | None) -> Sampled:
    """logits [B, V] float32 -> a token for each row, and log-probabilities with so many alternatives, unless None."""
    adjusted = logits if batch.penalties is None else adjust(logits, batch.penalties, batch)
    token = _argmax(adjusted)
    if batch.filters is not None:
        token = jnp.where(batch.filters.temperature > 0, _draw(adjusted, batch.filters, batch.count), token)
    return Sampled(token, None if top_logprobs is None else _logprobs(logits, token, top_logprobs))


def _argmax(x: jax.Array) -> jax.Array:
    """The first index [B] of the maximum, as two plain reductions: XLA's own argmax is slow on a CPU."""
    best = x == jnp.max(x, axis=-1, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    # A row of NaN has no maximum; it gives the last index, and stays in range.
    return jnp.min(jnp.where(best, index, x.shape[-1] - 1), axis=-1)


def _logprobs(logits: jax.Array, token: jax.Array, top: int) -> Logprobs:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=-1)
    rank = 1 + jnp.sum(logprobs > chosen, axis=-1, dtype=jnp.int32)
    values, ids = jax.lax.top_k(logprobs, top)
    return Logprobs(chosen[:, 0], rank, ids, values)


def adjust(logits: jax.Array, penalties: LogitsPenalties, batch: SamplingBatch) -> jax.Array:
    """Logits [B, V] after bias, minimum length and repetition penalty (Keskar et al. 2019)."""
    logits = logits + penalties.bias
    row = jnp.arange(logits.shape[0])[:, None]
    stop_ids = jnp.where(batch.stop_ids < 0, logits.shape[-1], batch.stop_ids)  # padding falls off the end
    unstoppable = logits.at[row, stop_ids].set(-jnp.inf, mode="drop")
    logits = jnp.where((batch.count < penalties.min_tokens)[:, None], unstoppable, logits)
    penalty = penalties.penalty[:, None]
    return jnp.where(penalties.seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _draw(logits: jax.Array, filters: SamplingFilters, count: jax.Array) -> jax.Array:
    """A token [B] by the row's temperature, filters and own random stream."""
    # From the maximum, so that a temperature near 0 overflows to -inf alone and the likeliest token stays.
    scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = scaled / jnp.where(filters.temperature > 0, filters.temperature, 1)[:, None]
    filtered = jnp.any(filters.top_k > 0) | jnp.any(filters.top_p < 1) | jnp.any(filters.min_p > 0)
    scaled = jax.lax.cond(filtered, lambda x: _filter(x, filters), lambda x: x, scaled)

    def noise(seed: jax.Array, count: jax.Array) -> jax.Array:
        # The stream is the request's own: its seed and how far it has come, never its slot or its neighbours.
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), count), logits.shape[1:], jnp.float32)

    return _argmax(scaled + jax.vmap(noise)(filters.seed, count))


def _filter(logits: jax.Array, filters: SamplingFilters) -> jax.Array:
    """-inf wherever min-p, top-k and then top-p drop a token."""
    floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(filters.min_p)[:, None]
    logits = jnp.where(logits >= floor, logits, -jnp.inf)
    k = jnp.where(filters.top_k > 0, filters.top_k, logits.shape[-1]).astype(jnp.float32)
    logits = _keep(logits, jnp.ones_like(logits), k)
    return _keep(logits, jax.nn.softmax(logits, axis=-1), jnp.where(filters.top_p < 1, filters.top_p, 2.0))


def _keep(logits: jax.Array, mass: jax.Array, target: jax.Array) -> jax.Array:
    """-inf below the highest threshold at which the tokens kept weigh at least `target` [B]; all stay if none does."""
    keys = _sortable(logits)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        # The mean of two int32 without overflow, rounded up.
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        enough = jnp.sum(jnp.where(keys >= middle[:, None], mass, 0), axis=-1) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    limits = jnp.iinfo(jnp.int32)
    low = jnp.full(target.shape, limits.min, jnp.int32)
    low, _ = jax.lax.fori_loop(0, 32, halve, (low, jnp.full(target.shape, limits.max, jnp.int32)))
    return jnp.where(keys >= low[:, None], logits, -jnp.inf)


def _sortable(x: jax.Array) -> jax.Array:
    """int32 keys in the order of the float32 values."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)

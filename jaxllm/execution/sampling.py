"""Choosing the next token on the device.

Logits are changed in vLLM's order: a grammar's tokens, allowed tokens and bias, bad words, minimum length, penalties of
repetition, frequency and presence, temperature, min-p, top-k, top-p. Filters find their threshold by bisection over the bits of a
float32, which is exact, keeps ties, and needs no sort of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.execution.batch import ALL_LOGPROBS, LogitsPenalties, Logprobs, Sampled, SamplingBatch, SamplingFilters
from jaxllm.execution.penalties import adjust


class LogprobsMode(NamedTuple):
    """What is reported of tokens: from logits as the model gives them or as tokens are drawn from; with or without a softmax."""

    processed: bool = False
    logits: bool = False


LOGPROBS_MODES = {
    "raw_logprobs": LogprobsMode(),
    "processed_logprobs": LogprobsMode(processed=True),
    "raw_logits": LogprobsMode(logits=True),
    "processed_logits": LogprobsMode(processed=True, logits=True),
}
RAW_LOGPROBS = LOGPROBS_MODES["raw_logprobs"]


def sample(logits: jax.Array, batch: SamplingBatch, top_logprobs: int | None, mode: LogprobsMode = RAW_LOGPROBS) -> Sampled:
    """logits [B, V] float32 -> a token for each row, and log-probabilities with so many alternatives, unless None."""
    adjusted = logits if batch.allowed is None else _allowed(logits, jnp.asarray(batch.allowed))
    if isinstance(batch.penalties, LogitsPenalties):
        adjusted = adjust(adjusted, batch.penalties, batch)
    token, drawn_from = _argmax(adjusted), adjusted
    if batch.filters is not None:
        random = batch.filters.temperature > 0
        filtered = _filtered(adjusted, batch.filters)
        token = jnp.where(random, _draw(filtered, batch.filters, batch.count), token)
        drawn_from = jnp.where(random[:, None], filtered, adjusted)
        if mode.logits:  # `filtered` has its maximum at 0
            kept = jnp.isfinite(filtered) | ~random[:, None]
            drawn_from = jnp.where(kept, adjusted / _temperature(batch.filters), -jnp.inf)
    if top_logprobs is None:
        return Sampled(token, None)
    reported = drawn_from if mode.processed else logits
    return Sampled(token, logprobs_of(reported if mode.logits else jax.nn.log_softmax(reported, axis=-1), token, top_logprobs))


def _allowed(logits: jax.Array, bits: jax.Array) -> jax.Array:
    """Logits [B, V], -inf where the token's bit is not set."""
    each = (bits[:, :, None] >> jnp.arange(32)[None, None, :]) & 1
    return jnp.where(each.reshape(len(bits), -1)[:, : logits.shape[1]] > 0, logits, -jnp.inf)


def _argmax(x: jax.Array) -> jax.Array:
    """The first index [B] of the maximum, as two plain reductions: XLA's own argmax is slow on a CPU."""
    best = x == jnp.max(x, axis=-1, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    # A row of NaN has no maximum; it gives the last index, and stays in range.
    return jnp.min(jnp.where(best, index, x.shape[-1] - 1), axis=-1)


def logprobs_of(logprobs: jax.Array, token: jax.Array, top: int) -> Logprobs:
    """logprobs [B, V] -> those of `token` [B] and of the `top` likeliest."""
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=-1)
    rank = 1 + jnp.sum(logprobs > chosen, axis=-1, dtype=jnp.int32)
    if top == ALL_LOGPROBS:
        return Logprobs(chosen[:, 0], rank, jnp.zeros((token.shape[0], 0), jnp.int32), logprobs)
    values, ids = jax.lax.top_k(logprobs, top)
    return Logprobs(chosen[:, 0], rank, ids, values)


def _temperature(filters: SamplingFilters) -> jax.Array:
    """[B, 1], 1 in greedy rows."""
    return jnp.where(filters.temperature > 0, filters.temperature, 1)[:, None]


def _filtered(logits: jax.Array, filters: SamplingFilters) -> jax.Array:
    """Logits [B, V] after temperature and filters, their maximum at 0."""
    # From the maximum, so that a temperature near 0 overflows to -inf alone and the likeliest token stays.
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / _temperature(filters)
    filtered = jnp.any(filters.top_k > 0) | jnp.any(filters.top_p < 1) | jnp.any(filters.min_p > 0)
    return jax.lax.cond(filtered, lambda x: _filter(x, filters), lambda x: x, scaled)


def _draw(logits: jax.Array, filters: SamplingFilters, count: jax.Array) -> jax.Array:
    """A token [B] by the row's own random stream, from logits after temperature and filters."""

    def noise(seed: jax.Array, count: jax.Array) -> jax.Array:
        # The stream is the request's own: its seed and how far it has come, never its row or its neighbours.
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), count), logits.shape[1:], jnp.float32)

    return _argmax(logits + jax.vmap(noise)(filters.seed, count))


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

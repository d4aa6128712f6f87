"""What changes a row's logits before the temperature: biases, bad words, minimum length, and penalties of what was generated.

The host sends lists of tokens; a step makes its tables over the vocabulary of them once, and a decode call goes on with those.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.decoder.batch import Array
from jaxllm.execution.batch import History, ListedPenalties, LogitsPenalties, SamplingBatch


def with_tables(batch: SamplingBatch, vocab_size: int) -> SamplingBatch:
    """The batch as `adjust` takes it."""
    if not isinstance(batch.penalties, ListedPenalties):
        return batch
    return batch._replace(penalties=tables(batch.penalties, jnp.asarray(batch.count), vocab_size))


def tables(listed: ListedPenalties, count: Array, vocab_size: int) -> LogitsPenalties:
    """Penalties over a vocabulary, of rows that have generated `count` [B] tokens."""
    rows, size = listed.tokens.shape
    row, place = jnp.arange(rows)[:, None], jnp.arange(size)[None, :]
    prompt, end = listed.prompt[:, None], listed.prompt[:, None] + count[:, None]

    def where(here: jax.Array, ids: Array) -> jax.Array:
        return jnp.where(here, ids, vocab_size)  # the others fall off the end

    of_prompt, generated = (where(here, listed.tokens) for here in (place < prompt, (place >= prompt) & (place < end)))
    seen = jnp.zeros((rows, vocab_size), bool).at[row, of_prompt].set(True, mode="drop")
    counts = jnp.zeros((rows, vocab_size), jnp.int32).at[row, generated].add(1, mode="drop")
    bias = jnp.broadcast_to(listed.other_bias[:, None], (rows, vocab_size))
    bias = bias.at[row, where(listed.bias_ids >= 0, listed.bias_ids)].set(listed.bias, mode="drop")
    recent = None
    if listed.bad_words is not None:
        at = end - listed.bad_words.shape[2] + 1 + jnp.arange(listed.bad_words.shape[2] - 1)[None, :]
        last = jnp.take_along_axis(jnp.asarray(listed.tokens), jnp.maximum(at, 0), axis=1, mode="clip")
        recent = jnp.where(at >= prompt, last, -1)
    of_all = (listed.min_tokens, listed.repetition, listed.presence, listed.frequency)
    return LogitsPenalties(*of_all, seen, bias, History(counts, recent), listed.bad_words)


def adjust(logits: jax.Array, penalties: LogitsPenalties, batch: SamplingBatch) -> jax.Array:
    """Logits [B, V] after all that comes before the temperature. The penalty of repetition is that of Keskar et al. 2019."""
    logits = logits + penalties.bias
    if penalties.bad_words is not None:
        logits = _forbid(logits, penalties.bad_words, penalties.history)
    row = jnp.arange(logits.shape[0])[:, None]
    stop_ids = jnp.where(batch.stop_ids < 0, logits.shape[-1], batch.stop_ids)  # padding falls off the end
    unstoppable = logits.at[row, stop_ids].set(-jnp.inf, mode="drop")
    logits = jnp.where((batch.count < penalties.min_tokens)[:, None], unstoppable, logits)
    counts = penalties.history.counts
    generated = counts > 0
    repetition, frequency, presence = (x[:, None] for x in (penalties.repetition, penalties.frequency, penalties.presence))
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(penalties.prompt | generated, repeated, logits)
    return logits - frequency * counts - presence * generated


def _forbid(logits: jax.Array, words: jax.Array, history: History) -> jax.Array:
    """Logits without the last token of each bad word [B, W, L] whose other tokens were generated last."""
    assert history.recent is not None
    before, last = words[:, :, :-1], words[:, :, -1]
    follows = jnp.all((before < 0) | (before == history.recent[:, None, :]), axis=-1)
    nowhere = logits.shape[-1]  # falls off the end
    return logits.at[jnp.arange(len(last))[:, None], jnp.where(follows & (last >= 0), last, nowhere)].set(-jnp.inf, mode="drop")


def extended(history: History, token: jax.Array) -> History:
    """The history with one more token [B] in each row."""
    counts = history.counts.at[jnp.arange(token.shape[0]), token].add(1)
    if history.recent is None:
        return History(counts)
    return History(counts, jnp.concatenate([history.recent[:, 1:], token[:, None]], axis=1))

"""What a step is given and gives back, as arrays, and the empty batch of each kind of step.

The empty batches are filled for a step that runs, and say the shapes to a program that is compiled ahead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.buckets import STOP_ID_WIDTH, TILE, power_of_two
from jaxllm.decoder.batch import Array, PackedBatch, TokenBatch
from jaxllm.decoder.tree_attention import TILE as TREE_TILE
from jaxllm.decoder.tree_attention import tile_pairs
from sharding.layout import Layout

ALL_LOGPROBS = -1  # as the number of log-probabilities that are asked for
TARGETS = 4  # ids that can be asked for at one token of a scoring step; more of them take the token to the head again


class SamplingFilters(NamedTuple):
    """Temperature, filters and seed of the rows that sample.

    Attributes:
      temperature: [B] float32, 0 is greedy.
      seed: [B] uint32, of the row's own random stream.
      top_k: [B] int32, 0 is off.
      top_p: [B] float32, 1 is off.
      min_p: [B] float32, 0 is off.
    """

    temperature: Array
    seed: Array
    top_k: Array
    top_p: Array
    min_p: Array


class History(NamedTuple):
    """What rows have generated so far, as penalties look at it; the decode loop goes on with it on the device.

    Attributes:
      counts: [B, V] int32, how often each token was generated.
      recent: [B, L-1] int32, the last tokens generated, the newest last, -1 where there is none; None without bad words.
    """

    counts: Array
    recent: Array | None = None


class LogitsPenalties(NamedTuple):
    """Changes to a row's logits before a token is chosen.

    Attributes:
      min_tokens: [B] int32, stop ids cannot be chosen before so many tokens.
      repetition, presence, frequency: [B] float32, penalties, off at 1, 0 and 0.
      prompt: [B, V] bool, tokens of the prompt.
      bias: [B, V] float32, added to the logits; -inf forbids a token.
      history: what was generated.
      bad_words: [B, W, L] int32, W runs of up to L tokens of which the last must not follow the others; they end at L, and -1
        fills the rest. None: no row has any. Those of one token are in `bias`.
    """

    min_tokens: Array
    repetition: Array
    presence: Array
    frequency: Array
    prompt: Array
    bias: Array
    history: History
    bad_words: Array | None = None


class ListedPenalties(NamedTuple):
    """`LogitsPenalties` as the host sends them: lists of tokens, of which the device makes what is as wide as the vocabulary.

    Attributes:
      min_tokens, repetition, presence, frequency, bad_words: as there.
      other_bias: [B] float32, added to the logits of tokens without a bias of their own: 0, or -inf where no other is allowed.
      bias_ids, bias: [B, K] int32 and float32, tokens with a bias of their own, and that; -1 fills the ids.
      prompt: [B] int32, tokens of the prompt.
      tokens: [B, S] int32, the prompt and, from `prompt` on, what was generated after it.
    """

    min_tokens: Array
    repetition: Array
    presence: Array
    frequency: Array
    other_bias: Array
    bias_ids: Array
    bias: Array
    prompt: Array
    tokens: Array
    bad_words: Array | None = None


class SamplingBatch(NamedTuple):
    """The choice of each of B rows' next token. `filters` and `penalties` are None, and cost nothing, when no row needs them.

    Attributes:
      count: [B] int32, how many tokens the row has generated; the counter of its random stream.
      stop_ids: [B, E] int32, ids that end the row, padded with -1.
      penalties: as the host sends them; within a step with their tables.
      allowed: [B, V / 32] int32, a bit for each token that may be chosen, the first in the lowest; None: all may.
    """

    count: Array
    stop_ids: Array
    filters: SamplingFilters | None = None
    penalties: ListedPenalties | LogitsPenalties | None = None
    allowed: Array | None = None


class DecodeRows(NamedTuple):
    """Where R rows stand that decode. A call gives it back, and the next one for these rows need not wait for the host.

    Attributes:
      tokens: [R] int32, each row's last token, not yet in the cache.
      position: [R] int32, where it will stand.
      live: [R] bool, rows that decode; the others are carried along.
      remaining: [R] int32, how many tokens the row may still generate.
      count: [R] int32, how many it has generated.
      listed: [R, S] int32, the row's tokens, see `ListedPenalties`; None without penalties.
    """

    tokens: Array
    position: Array
    live: Array
    remaining: Array
    count: Array
    listed: Array | None = None


class DecodeBatch(NamedTuple):
    """R rows that decode several tokens in one call.

    Attributes:
      rows: where they stand.
      pages: of each group of layers [R, C] int32, see `TokenBatch`; with room for what the call adds.
      sampling: the choice of each row's tokens; how many it has and which, `rows` tells.
      limit: [] int32, most steps in this call.
      until_stopped: [] int32, return as soon as so many rows have stopped (someone waits for their place).
    """

    rows: DecodeRows
    pages: tuple[Array, ...]
    sampling: SamplingBatch
    limit: Array
    until_stopped: Array


class Logprobs(NamedTuple):
    """Log-probabilities of tokens, or what else a `LogprobsMode` reports.

    Attributes, each with a leading [steps] axis when it comes from a decode call:
      chosen: [B] float32, of the chosen token.
      rank: [B] int32, its rank, 1 for the likeliest.
      top_ids, top: [B, n], the n likeliest, likeliest first; of ALL_LOGPROBS no ids, and `top` [B, V] in the vocabulary's order.
    """

    chosen: Array
    rank: Array
    top_ids: Array
    top: Array


class Sampled(NamedTuple):
    """Chosen tokens [B] int32 ([steps, B] from a decode call), and their log-probabilities if asked for.

    `prompt`: of a prefill step that was given targets, the log-probabilities of those, as of so many chosen tokens.
    """

    token: Array
    logprobs: Logprobs | None
    prompt: Logprobs | None = None


class Scored(NamedTuple):
    """Log-probabilities [B, P, M] float32 of the targets; the likeliest id in their place [B, P] int32, and its own, float32.

    Of several equally likely ids it is the first, as argmax has it.
    """

    logprob: Array
    likeliest: Array
    top_logprob: Array


def empty_token_batch(layout: Layout, tokens: int, groups: int, width: int) -> tuple[TokenBatch, np.ndarray]:
    """A prefill step of `tokens` on each data shard with nothing in it, and room for the tokens to sample after.

    Args:
      groups: of layers that share pages.
      width: pages that its attention reaches.
    """
    rows = layout.data * tokens // TILE
    start, lengths = np.zeros((2, rows), np.int32)
    return TokenBatch(np.zeros((rows, TILE), np.int32), start, lengths, _no_pages(rows, groups, width)), np.zeros(rows, np.int32)


def empty_decode_batch(rows: int, groups: int, width: int, sampling: SamplingBatch) -> DecodeBatch:
    """A decode call in which none of `rows` decodes."""
    tokens, position, remaining = np.zeros((3, rows), np.int32)
    listed, penalties = None, sampling.penalties
    if isinstance(penalties, ListedPenalties):  # sent once
        listed, sampling = penalties.tokens, sampling._replace(penalties=penalties._replace(tokens=np.zeros((rows, 0), np.int32)))
    stand = DecodeRows(tokens, position, np.zeros(rows, bool), remaining, sampling.count, listed)
    return DecodeBatch(stand, _no_pages(rows, groups, width), sampling, np.int32(0), np.int32(rows + 1))


def _no_pages(rows: int, groups: int, width: int) -> tuple[np.ndarray, ...]:
    return tuple(np.zeros((groups, rows, width), np.int32))


def empty_sampling_batch(
    rows: int,
    stop_ids: int = 0,
    *,
    filters: bool = False,
    listed: int = 0,
    biases: int = 0,
    bad_words: tuple[int, int] = (0, 0),
) -> SamplingBatch:
    """Greedy choices in `rows` rows that nothing stops; with `filters` and penalties the arrays that change that, at rest.

    Args:
      stop_ids: room for so many in a row, at least.
      listed: room for so many tokens of a row in penalties; 0: there are none.
      biases: room for so many in a row, at least.
      bad_words: room for so many in a row, each of so many tokens, at least.
    """

    def column(dtype: Any, value: Any = 0) -> np.ndarray:
        return np.full(rows, value, dtype)

    width = max(STOP_ID_WIDTH, power_of_two(stop_ids))
    how = what = None
    if filters:
        how = SamplingFilters(column(np.float32), column(np.uint32), column(np.int32), column(np.float32, 1), column(np.float32))
    if listed:
        count, length = (power_of_two(size) for size in bad_words)
        words = np.full((rows, count, length), -1, np.int32) if all(bad_words) else None
        own = max(STOP_ID_WIDTH, power_of_two(biases))
        what = ListedPenalties(
            min_tokens=column(np.int32),
            repetition=column(np.float32, 1),
            presence=column(np.float32),
            frequency=column(np.float32),
            other_bias=column(np.float32),
            bias_ids=np.full((rows, own), -1, np.int32),
            bias=np.zeros((rows, own), np.float32),
            prompt=column(np.int32),
            tokens=np.zeros((rows, listed), np.int32),
            bad_words=words,
        )
    return SamplingBatch(column(np.int32), np.full((rows, width), -1, np.int32), how, what)


def batch_shardings(layout: Layout, batch: Any) -> Any:
    """Shardings of a batch: rows over the `data` axis, numbers on every device."""
    rows, whole = layout.sharding(("rows",)), layout.sharding(())
    return jax.tree.map(lambda x: rows if np.ndim(x) else whole, batch)


def abstract_batch(layout: Layout, batch: Any) -> Any:
    """Shapes, dtypes and shardings of a batch."""
    shardings = batch_shardings(layout, batch)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch, shardings)


def empty_packed_batch(layout: Layout, length: int, scored: int) -> PackedBatch:
    """A scoring step's batch with nothing in it.

    Args:
      length: tokens of the row on each data shard.
      scored: most of them that go to the head.
    """
    data, tiles = layout.data, length // TREE_TILE

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((data, *shape), np.int32)

    end = np.arange(1, length + 1, dtype=np.int32)
    key_tiles = zeros(tiles * (tiles + 1) // 2)
    first, key_tiles[:, :tiles] = tile_pairs(end)
    return PackedBatch(
        zeros(length),
        zeros(length),
        np.tile(end, (data, 1)),
        np.tile(first, (data, 1)),
        key_tiles,
        zeros(scored),
        zeros(scored, TARGETS),
        np.zeros((), np.int32),
    )

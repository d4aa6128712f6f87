"""A step's inputs beside its tokens, and its outputs, as arrays; and the empty batch of a scoring step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from jaxllm.decoder.batch import Array, PackedBatch
from jaxllm.decoder.tree_attention import TILE, tile_pairs
from sharding.layout import Layout

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


class LogitsPenalties(NamedTuple):
    """Changes to a row's logits before a token is chosen.

    Attributes:
      min_tokens: [B] int32, stop ids cannot be chosen before so many tokens.
      penalty: [B] float32, repetition penalty, 1 is off.
      seen: [B, V] bool, tokens of the prompt and the output so far.
      bias: [B, V] float32, added to the logits.
    """

    min_tokens: Array
    penalty: Array
    seen: Array
    bias: Array


class SamplingBatch(NamedTuple):
    """The choice of each of B rows' next token. `filters` and `penalties` are None, and cost nothing, when no row needs them.

    Attributes:
      count: [B] int32, how many tokens the row has generated; the counter of its random stream.
      stop_ids: [B, E] int32, ids that end the row, padded with -1.
    """

    count: Array
    stop_ids: Array
    filters: SamplingFilters | None = None
    penalties: LogitsPenalties | None = None


class DecodeBatch(NamedTuple):
    """R rows, all of the cache, that decode several tokens in one call.

    Attributes:
      tokens: [R] int32, each row's last token, not yet in the cache.
      position: [R] int32, where it will stand.
      live: [R] bool, rows that decode; the others are carried along.
      remaining: [R] int32, how many tokens the row may still generate.
      sampling: the choice of each row's tokens.
      limit: [] int32, most steps in this call.
      until_any: [] bool, return as soon as any row has stopped (someone waits for its slot).
    """

    tokens: Array
    position: Array
    live: Array
    remaining: Array
    sampling: SamplingBatch
    limit: Array
    until_any: Array


class Logprobs(NamedTuple):
    """Log-probabilities under the raw logits.

    Attributes, each with a leading [steps] axis when it comes from a decode call:
      chosen: [B] float32, of the chosen token.
      rank: [B] int32, its rank, 1 for the likeliest.
      top_ids, top: [B, n], the n likeliest, likeliest first.
    """

    chosen: Array
    rank: Array
    top_ids: Array
    top: Array


class Sampled(NamedTuple):
    """Chosen tokens [B] int32 ([steps, B] from a decode call), and their log-probabilities if asked for."""

    token: Array
    logprobs: Logprobs | None


class Scored(NamedTuple):
    """Log-probabilities [B, P, M] float32 of the targets, and whether each is the likeliest id, [B, P, M] bool."""

    logprob: Array
    greedy: Array


def empty_packed_batch(layout: Layout, length: int, scored: int) -> tuple[PackedBatch, PackedBatch]:
    """A scoring step's batch with nothing in it, and its shardings.

    Args:
      length: tokens of the row on each data shard.
      scored: most of them that go to the head.
    """
    data, tiles = layout.data, length // TILE

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((data, *shape), np.int32)

    end = np.arange(1, length + 1, dtype=np.int32)
    key_tiles = zeros(tiles * (tiles + 1) // 2)
    first, key_tiles[:, :tiles] = tile_pairs(end)
    batch = PackedBatch(
        zeros(length),
        zeros(length),
        np.tile(end, (data, 1)),
        np.tile(first, (data, 1)),
        key_tiles,
        zeros(scored),
        zeros(scored, TARGETS),
        np.zeros((), np.int32),
    )
    rows, whole = layout.sharding(("rows",)), layout.sharding(())
    return batch, jax.tree.map(lambda x: rows if np.ndim(x) else whole, batch)


def abstract_packed_batch(layout: Layout, length: int, scored: int) -> PackedBatch:
    """Shapes and shardings of a scoring step's batch, without values; arguments as in `empty_packed_batch`."""
    batch, shardings = empty_packed_batch(layout, length, scored)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch, shardings)

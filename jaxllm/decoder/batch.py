"""What a step is given, as arrays; built on the host, one transfer a step."""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # numpy's on the host, jax's in a jitted program


class TokenBatch(NamedTuple):
    """B rows of T new tokens.

    Attributes:
      tokens: [B, T] int32; past a row's own tokens anything.
      start: [B] int32, position of each row's first new token: how many tokens of it the cache holds.
      lengths: [B] int32, tokens of the row once these are in, those of later chunks of its prompt included.
      slots: [B] int32, the cache row of each batch row, counted within its share of the `data` axis; None: row i is cache row i.
      valid: [B] bool, rows that may be written; None: all.
    """

    tokens: Array
    start: Array
    lengths: Array
    slots: Array | None = None
    valid: Array | None = None


class Randomness(NamedTuple):
    """How rows that sample do so.

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


class Controls(NamedTuple):
    """What changes a row's logits before a token is chosen.

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
    """How each of B rows chooses its next token. `random` and `controls` are None when no row needs them, and cost nothing then.

    Attributes:
      count: [B] int32, how many tokens the row has generated; the counter of its random stream.
      stop_ids: [B, E] int32, ids that end the row, padded with -1.
    """

    count: Array
    stop_ids: Array
    random: Randomness | None = None
    controls: Controls | None = None


class DecodeBatch(NamedTuple):
    """R rows, all of the cache, that decode several tokens in one call.

    Attributes:
      tokens: [R] int32, each row's last token, not yet in the cache.
      position: [R] int32, where it will stand.
      live: [R] bool, rows that decode; the others are carried along.
      remaining: [R] int32, how many tokens the row may still generate.
      sampling: how they are chosen.
      limit: [] int32, at most so many steps in this call.
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


class PackedBatch(NamedTuple):
    """B rows of T tokens in packed trees (`jaxllm.scoring.trie`), and what is asked of them.

    Attributes:
      tokens, position, end: [B, T] int32.
      first: [B, T / TILE + 1] int32 and
      key_tiles: [B, n] int32: query tile i sees the key tiles `key_tiles[first[i] : first[i + 1]]` of its row.
      scored: [B, P] int32, tokens of the row whose logits are asked for; P is a multiple of the head's chunk.
      targets: [B, P, M] int32, ids whose log-probabilities are wanted there; past those that are, anything.
      chunks: [] int32, how many chunks of the head hold scored tokens, in the row that has most.
    """

    tokens: Array
    position: Array
    end: Array
    first: Array
    key_tiles: Array
    scored: Array
    targets: Array
    chunks: Array


class Scored(NamedTuple):
    """Log-probabilities [B, P, M] float32 of the targets, and whether each is the likeliest id, [B, P, M] bool."""

    logprob: Array
    greedy: Array

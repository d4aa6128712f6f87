"""The tokens that a step takes through the decoder, as arrays; built on the host, one transfer a step."""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # numpy's on the host, jax's in a jitted program


class TokenBatch(NamedTuple):
    """B rows of T new tokens.

    Attributes:
      tokens: [B, T] int32; past a row's own tokens anything.
      start: [B] int32, position of each row's first new token: how many tokens of it the cache holds.
      lengths: [B] int32, tokens of the row once these are in, those of later chunks of its prompt included.
      slots: [B] int32, the cache row of each batch row, counted within its data shard; None: row i is cache row i.
      valid: [B] bool, rows that may be written; None: all.
    """

    tokens: Array
    start: Array
    lengths: Array
    slots: Array | None = None
    valid: Array | None = None


class PackedBatch(NamedTuple):
    """B rows of T tokens in packed trees (`jaxllm.scoring.trie`), and the tokens and ids to score.

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

"""The tokens that a step takes through the decoder, as arrays; built on the host, one transfer a step."""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # numpy's on the host, jax's in a jitted program


class TokenBatch(NamedTuple):
    """B rows of T new tokens of one sequence each: single ones, or tiles of which several may follow each other in a sequence.

    Attributes:
      tokens: [B, T] int32; past a row's own tokens anything.
      start: [B] int32, position of each row's first new token. The row stands within one page.
      lengths: [B] int32, tokens of the row's sequence once these are in, those of later steps of its prompt included.
      pages: for each group of layers (`cache_spec.windows`) [B, C] int32, the pages of the row's sequence in order, counted
        within its data shard; a row without a sequence has page 0, which belongs to nobody.
    """

    tokens: Array
    start: Array
    lengths: Array
    pages: tuple[Array, ...]


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

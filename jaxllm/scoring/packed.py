"""Rows of trees on their way to a step: what scoring and embedding do alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from jaxllm.buckets import power_of_two
from jaxllm.decoder.batch import PackedBatch
from jaxllm.decoder.tree_attention import TILE, tile_pairs
from jaxllm.execution.steps import Steps
from jaxllm.platforms import PASSES
from jaxllm.scoring.trie import Row, Trie, pack
from sharding.padding import round_up


class PackedRow:
    """A row, and which of its tiles see which (`jaxllm.decoder.tree_attention`).

    Attributes:
      first, key_tiles: as `PackedBatch` has them.
      width: tiles that one sees, at most.
    """

    def __init__(self, row: Row):
        self.row = row
        self.first, self.key_tiles = tile_pairs(row.end)
        self.width = int(np.diff(self.first).max())

    def put(self, batch: PackedBatch, i: int) -> None:
        """Write its tokens and tiles down as the batch's row i."""
        batch.tokens[i], batch.position[i], batch.end[i] = self.row.tokens, self.row.position, self.row.end
        batch.first[i], batch.key_tiles[i, : len(self.key_tiles)] = self.first, self.key_tiles


R = TypeVar("R", bound=PackedRow)


def pack_rows(sequences: Sequence[Sequence[int]], data: int, max_step_tokens: int) -> tuple[list[Row], int]:
    """Rows that hold every sequence, one of them a step for each of `data` shards, and their length.

    A step of a shard takes `max_step_tokens` at most; a longer sequence has rows of its own length.
    """
    trie = Trie(sequences)
    longest = max(map(len, sequences), default=1)
    share = -(-trie.tokens // data)
    length = max(min(power_of_two(share), max_step_tokens), power_of_two(longest), TILE)
    return pack(trie, length, max(length // 2, TILE)), length


def in_order(rows: list[R], attention: str) -> list[R]:
    """The rows as they follow each other: few programs, and neighbours in need of the same one."""
    return sorted(rows, key=lambda one: one.width) if attention == PASSES else rows


def in_steps(rows: list[R], data: int) -> list[list[R]]:
    """The rows of each step, one for each of `data` shards."""
    return [rows[at : at + data] for at in range(0, len(rows), data)]


def attention_width(rows: Sequence[PackedRow], length: int, steps: Steps) -> int:
    """Of the program for a step of these rows."""
    return min(round_up(max(one.width for one in rows), 2), length // TILE) if steps.attention == PASSES else 0

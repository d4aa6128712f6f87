"""The shapes that a cache may have, and the way from one to a larger one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxllm.buckets import cache_length, length_bucket, row_bucket
from jaxllm.decoder.cache_spec import BLOCK, padded_length
from sharding.layout import Layout
from sharding.padding import round_up

Shape = tuple[int, int]
"""Rows and positions of a cache."""


@dataclass(frozen=True)
class CacheLadder:
    """The shapes up to `max_rows`, a multiple of the data axis, and `max_length`, one of the cache's block."""

    layout: Layout
    max_rows: int
    max_length: int

    @classmethod
    def of(cls, layout: Layout, max_num_seqs: int, max_model_len: int) -> CacheLadder:
        return cls(layout, round_up(max_num_seqs, layout.data), cache_length(max_model_len, BLOCK))

    def shape(self, slots: int, length: int) -> Shape:
        """The smallest shape with so many rows and positions."""
        rows = row_bucket(slots, self.max_rows, self.layout.data)
        return rows, padded_length(self.layout, rows, length_bucket(length, self.max_length, BLOCK))

    def climb(self, now: Shape, slots: int, length: int) -> Iterator[Shape]:
        """The shapes on the way from `now` to one that has as much too: rung by rung, for there to be few programs."""
        rows, positions = now
        while rows < slots:
            rows = row_bucket(rows + 1, self.max_rows, self.layout.data)
            positions = padded_length(self.layout, rows, positions)
            yield rows, positions
        while positions < length:
            positions = padded_length(self.layout, rows, length_bucket(positions + 1, self.max_length, BLOCK))
            yield rows, positions

    def reachable(self) -> dict[Shape, list[Shape]]:
        """Every shape that a cache may have, the smallest first, and those of the next rungs."""
        found: dict[Shape, list[Shape]] = {}
        pending = [self.shape(rows, length) for rows in self._rows() for length in self._lengths()]
        while pending:
            shape = pending.pop()
            if shape not in found:
                rows, length = shape
                steps = [*self.climb(shape, rows + 1, length)] if rows < self.max_rows else []
                steps += [*self.climb(shape, rows, length + 1)] if length < self.max_length else []
                found[shape] = steps
                pending += steps
        return dict(sorted(found.items()))

    def _rows(self) -> list[int]:
        return _rungs(self.max_rows, lambda rows: row_bucket(rows, self.max_rows, self.layout.data))

    def _lengths(self) -> list[int]:
        return _rungs(self.max_length, lambda length: length_bucket(length, self.max_length, BLOCK))


def _rungs(most: int, bucket: Callable[[int], int]) -> list[int]:
    """Every value of `bucket`, up to `most`."""
    rungs = [bucket(1)]
    while rungs[-1] < most:
        rungs.append(bucket(rungs[-1] + 1))
    return rungs

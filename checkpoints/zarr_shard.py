"""An array as one file that can be read in parts: a shard of Zarr 3.

Format: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed. The array's chunks one after the other, then where
each begins and how long it is. Chunk by chunk, from a slice of the source into the file, nothing waits for a whole array.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.copying import packed
from checkpoints.target import Entry, Piece
from checkpoints.view import SLICE

_PARTS = 8
_SMALL = 1 << 16  # bytes: chunks below are not worth it
_NARROW = 256  # positions: chunks are no narrower for being read together, as of a vocabulary they never are
_PLACE = 16  # bytes for a chunk in the index: two integers


@dataclass(frozen=True)
class Shard:
    """The layout of an array in its file."""

    entry: Entry

    @cached_property
    def chunk(self) -> tuple[int, ...]:
        """Shape of a chunk: an eighth of a matrix, or the next divisor below, along each dimension; of a stack each has its own.

        Fewer parts where that would be tiny; more where all chunks along one dimension would be more than is read at a time.
        """
        shape, itemsize = [1] * len(self.entry.shape[:-2]) + [*self.entry.shape[-2:]], self.entry.dtype.itemsize
        for i in range(len(shape))[-2:] if len(shape) > 1 else ():
            others = math.prod(self.entry.shape[-2:]) // max(shape[i], 1)
            parts = _PARTS
            while shape[i] // parts * others > SLICE and shape[i] // parts >= 2 * _NARROW:
                parts *= 2
            fewer = ([*shape[:i], _part(shape[i], parts >> less), *shape[i + 1 :]] for less in range(3))
            shape = next((one for one in fewer if math.prod(one) * itemsize >= _SMALL), shape)
        return tuple(shape)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Chunks along each dimension."""
        return self._counts(self.entry.shape)

    def _counts(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(-(-size // step) for size, step in zip(shape, self.chunk, strict=True))

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * self.entry.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return math.prod(self.counts) * (self.chunk_bytes + _PLACE)

    @property
    def name(self) -> str:
        """Name of the file in the array's folder: Zarr's key of the first shard, here the only one."""
        return "/".join(["c", *"0" * len(self.counts)])

    def metadata(self) -> dict[str, Any]:
        """The array's metadata for zarr.json."""
        codec = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {"chunk_shape": self.chunk, "codecs": [codec], "index_codecs": [codec], "index_location": "end"}
        whole = [count * step for count, step in zip(self.counts, self.chunk, strict=True)]
        return {
            "shape": self.entry.shape,
            "data_type": self.entry.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": whole}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }

    def write(self, path: Path, pieces: Iterator[Piece]) -> None:
        """Write the file. `pieces` are multiples of a chunk, but at the array's edges. Raises OSError."""
        written = 0
        with open(path, "wb") as file, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for piece in pieces:

                def put(at: tuple[int, ...], piece: Piece = piece) -> None:
                    place = [first // step + i for first, step, i in zip(piece.first, self.chunk, at, strict=True)]
                    number = np.ravel_multi_index(place, self.counts)
                    _write_at(file.fileno(), self._cut(piece.numbers, at), int(number) * self.chunk_bytes)

                for _ in pool.map(put, np.ndindex(self._counts(piece.numbers.shape))):
                    pass
                written += piece.numbers.size
            places = [(number * self.chunk_bytes, self.chunk_bytes) for number in range(math.prod(self.counts))]
            _write_at(file.fileno(), np.array(places, "<u8"), len(places) * self.chunk_bytes)
        assert written == math.prod(self.entry.shape), f"{self.entry.name}: {written} numbers of {self.entry.shape}"

    def _cut(self, piece: np.ndarray, at: tuple[int, ...]) -> np.ndarray:
        """Chunk `at` of the piece, contiguous. Those at the edge are as large as the others, with zeros."""
        box = piece[tuple(slice(i * step, (i + 1) * step) for i, step in zip(at, self.chunk, strict=True))]
        missing = [(0, step - size) for size, step in zip(box.shape, self.chunk, strict=True)]
        return packed(np.pad(box, missing) if box.shape != self.chunk else box)


def _part(size: int, parts: int) -> int:
    most = max(size // parts, 1)
    return next((part for part in range(most, most // 2, -1) if size % part == 0), most)


def _write_at(file: int, x: np.ndarray, at: int) -> None:
    data = memoryview(x.reshape(-1).view(np.uint8).data)
    while data:  # where a disk is nearly full, a part may still fit
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written

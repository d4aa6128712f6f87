"""The interface of file formats to the conversion."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Piece(NamedTuple):
    """Numbers of a tensor, a box that begins at `first`; which is empty where pieces are rows in order."""

    first: tuple[int, ...]
    numbers: np.ndarray


class Target:
    """Tensors in groups, each of which is written whole or not at all. Every method but `chunk` raises OSError.

    Attributes:
      groups: name -> its tensors, in order.
    """

    def __init__(self, groups: dict[str, list[Entry]]):
        self.groups = groups

    def chunk(self, entry: Entry) -> tuple[int, ...] | None:
        """Pieces of a tensor are multiples of such a box, but at its edges, in any order; None: rows, in order."""
        return None

    def begin(self, folder: Path) -> None:
        """Called before anything is written to the folder, or after an interruption."""

    def is_whole(self, folder: Path, name: str) -> bool:
        """Whether `write` has finished this group."""
        raise NotImplementedError

    def write(self, folder: Path, name: str, pieces: Iterator[Piece]) -> None:
        """Write a group; `pieces` are the numbers of one tensor after the other."""
        raise NotImplementedError

    def end(self, folder: Path) -> None:
        """Called after all groups."""

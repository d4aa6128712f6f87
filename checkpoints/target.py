"""What a file format offers to the conversion."""

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


class Target:
    """Tensors in groups, each of which is written whole or not at all. Every method but `rows` raises OSError.

    Attributes:
      groups: name -> its tensors, in order.
    """

    def __init__(self, groups: dict[str, list[Entry]]):
        self.groups = groups

    def rows(self, entry: Entry) -> int:
        """Pieces of a tensor have a multiple of so many, but for the last."""
        return 1

    def begin(self, folder: Path) -> None:
        """Before anything is written to the folder, or after an interruption."""

    def is_whole(self, folder: Path, name: str) -> bool:
        """Whether `write` has finished this group."""
        raise NotImplementedError

    def write(self, folder: Path, name: str, pieces: Iterator[np.ndarray]) -> None:
        """`pieces` are the tensors' numbers, slices along the first dimension in order, each within one tensor."""
        raise NotImplementedError

    def end(self, folder: Path) -> None:
        """After all groups."""

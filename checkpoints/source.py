"""What a file format offers to the loader."""

from __future__ import annotations

import threading
from typing import NamedTuple, Protocol

import numpy as np


class TensorInfo(NamedTuple):
    """A tensor as stored: its shape, its dtype by the format's own name (`BF16`, `Q4_1`), its bytes in the file."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class Source(Protocol):
    """Named tensors of which slices can be read, from several threads at once.

    Attributes:
      where: the file or folder, for messages.
      tensors: every tensor there is.
    """

    where: str
    tensors: dict[str, TensorInfo]

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read from the file so far."""
        ...

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """A box of a tensor as a float array of its own; raises CheckpointError."""
        ...


class Counter:
    """A sum that several threads add to."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self, amount: int) -> None:
        with self._lock:
            self.total += amount

"""The interface of file formats to the loader."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from checkpoints.errors import CheckpointError

ORBAX = "params"  # the folder of Orbax's arrays, beside config.json
T = TypeVar("T")


class TensorInfo(NamedTuple):
    """A tensor as stored: its shape, its dtype by the format's own name (`BF16`, `Q4_1`), its bytes in the file."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


_MOST_AXES = 8
_MOST_NUMBERS = 1 << 48  # of which numpy can count the bytes, whatever they are stored as


def check_shape(where: str | Path, name: str, shape: tuple[int, ...]) -> None:
    """Raises CheckpointError for a shape that no array can have, as one of 0 by 2**64, which takes no bytes."""
    if len(shape) > _MOST_AXES or math.prod(max(size, 1) for size in shape) > _MOST_NUMBERS:
        raise CheckpointError(f"{where}: tensor {name} has the shape {shape}, which no array can have; fetch it again")


class Source:
    """Named tensors of which slices can be read, from several threads at once.

    Attributes:
      where: the file or folder, for messages.
      tensors: every tensor there is.
      unusable: tensor -> the reason why its numbers cannot be read; the model may have no use for it.
      version: identifies weights that the files do not hold; empty where they hold them.
      bytes_read: bytes of tensor data read from the files so far.
      if_lacking, if_superfluous: what to do where tensors are missing, or are there that nobody wants; for messages.
    """

    if_lacking = "fetch it again if it is incomplete, or correct its config"
    if_superfluous = "correct the config"

    def __init__(self, where: Path):
        self.where = str(where)
        self.tensors: dict[str, TensorInfo] = {}
        self.unusable: dict[str, str] = {}
        self.version = ""
        self.bytes_read = 0
        self._counting = threading.Lock()

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """A box of a tensor as a float array, read-only where it is a view of the file. Raises CheckpointError."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.where} has no tensor {name}; fetch it again if it is incomplete")
        self.require_usable(name)
        box, nbytes = self._box(name, slices)
        with self._counting:
            self.bytes_read += nbytes
        return box

    def require_usable(self, name: str) -> None:
        """Raises CheckpointError where a tensor holds no numbers that can be read."""
        if name in self.unusable:
            raise CheckpointError(self.unusable[name])

    def origin(self, name: str) -> str:
        """The name that a tensor has where it comes from."""
        return name

    def _box(self, name: str, slices: tuple[slice, ...]) -> tuple[np.ndarray, int]:
        """The box, and how many bytes of the file it took."""
        raise NotImplementedError


RENEW = 1 << 28  # bytes


class Mappings:
    """Files of one source, mapped into memory. Every `RENEW` bytes read, all are let go and mapped anew when next needed.

    Otherwise whoever reads a whole checkpoint would hold all of it.
    """

    def __init__(self) -> None:
        self._files: list[Mapped[Any]] = []
        self._read = 0
        self._lock = threading.Lock()

    def add(self, file: Mapped[Any]) -> None:
        self._files.append(file)

    def get(self, file: Mapped[T], nbytes: int) -> T:
        with self._lock:
            self._read += nbytes
            if self._read > RENEW:
                self._read = nbytes
                for other in self._files:
                    other.mapping = None
            if file.mapping is None:
                file.mapping = file.open()
            return file.mapping


class Mapped(Generic[T]):
    """One of them. `open` maps it; what is in use elsewhere when it is let go stays until that ends."""

    def __init__(self, mappings: Mappings, open: Callable[[], T]):
        self.open = open
        self.mapping: T | None = None
        self._mappings = mappings
        mappings.add(self)

    def get(self, nbytes: int = 0) -> T:
        """The mapping, from which so many bytes will be read."""
        return self._mappings.get(self, nbytes)


def box_bytes(info: TensorInfo, slices: tuple[slice, ...]) -> int:
    """Bytes of a box of a tensor, whose numbers have whole bytes."""
    lengths = [len(range(size)[part]) for size, part in zip(info.shape, slices, strict=True)]
    return info.nbytes // max(math.prod(info.shape), 1) * math.prod(lengths)

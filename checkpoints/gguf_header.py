"""The header of a GGUF file: metadata and the table of tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's reader makes several numpy
objects for every string of the vocabulary and takes seconds to open a file; this one takes a tenth of a second.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from checkpoints.errors import CheckpointError
from checkpoints.source import check_shape

VERSIONS = (2, 3)
# Counts are believed up to these, some ten times what models have: Python's objects are larger than what they are read from.
_MOST_BYTES = 1 << 26
_MOST_KEYS = _MOST_TENSORS = 1 << 16
_MOST_ITEMS = 1 << 21  # of all arrays together
_DEEPEST = 8  # arrays in arrays
_MOST_AXES = 4  # as ggml has it
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


class TensorEntry(NamedTuple):
    """Where a tensor lies: shape (rows first, as numpy counts), type, first byte, number of bytes."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    first: int
    size: int


class Header(NamedTuple):
    """Everything in a GGUF file but the weights."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]


def read_header(data: np.ndarray, path: Path) -> Header:
    """Parse the header of the file mapped at `data` [bytes] uint8. Raises CheckpointError if it is not whole."""
    if data[:4].tobytes() != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it does not start with GGUF; fetch it again")
    try:
        return _parse(_Cursor(memoryview(data[:_MOST_BYTES])), len(data), path)  # type: ignore[arg-type]
    except (struct.error, KeyError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} has a truncated or corrupt header ({error}); fetch it again") from error


class _Cursor:
    """Reader of values one after the other."""

    def __init__(self, data: memoryview):
        self.data = data
        self.at = 4
        self.items = 0

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        size = self.scalar("<Q")
        text = self.data[self.at : self.at + size]
        if len(text) != size:
            raise ValueError("string past the end of the file")
        self.at += size
        return str(text, "utf-8")

    def count(self, most: int) -> int:
        """The number of items that follow. Raises ValueError where it exceeds `most`."""
        count = self.scalar("<Q")
        if count > most:
            raise ValueError(f"a count of {count}")
        return int(count)

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.scalar("<I"), self.count(_MOST_ITEMS - self.items), depth + 1)
        return self.scalar(_SCALARS[kind])

    def array(self, kind: int, count: int, depth: int) -> list[Any]:
        self.items += count
        if depth > _DEEPEST:
            raise ValueError(f"arrays nested more than {_DEEPEST} deep")
        if kind in (_STRING, _ARRAY):
            return [self.value(kind, depth) for _ in range(count)]
        items = struct.unpack_from(f"<{count}{_SCALARS[kind][1]}", self.data, self.at)
        self.at += count * struct.calcsize(_SCALARS[kind])
        return list(items)


def _parse(cursor: _Cursor, size: int, path: Path) -> Header:
    version = cursor.scalar("<I")
    if version not in VERSIONS:
        raise CheckpointError(f"{path} is GGUF version {version}, not little-endian of {VERSIONS}; convert it again")
    num_tensors, num_keys = cursor.count(_MOST_TENSORS), cursor.count(_MOST_KEYS)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = _new(cursor.string(), metadata)
        metadata[key] = cursor.value(cursor.scalar("<I"))
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        name = _new(cursor.string(), entries)
        axes = cursor.scalar("<I")
        if not 1 <= axes <= _MOST_AXES:
            raise CheckpointError(f"{path}: tensor {name} has {axes} axes, not 1 to {_MOST_AXES}; fetch it again")
        shape = tuple(reversed([cursor.scalar("<Q") for _ in range(axes)]))
        entries[name] = (shape, cursor.scalar("<I"), cursor.scalar("<Q"))
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1:
        raise ValueError("alignment")
    start = -(-cursor.at // align) * align
    tensors = {name: _entry(path, name, start, *entry) for name, entry in entries.items()}
    for name, tensor in tensors.items():
        if tensor.first + tensor.size > size:
            raise CheckpointError(f"{path} ends before tensor {name} does: it is truncated; fetch it again")
    return Header(metadata, tensors)


def _new(name: str, known: Mapping[str, Any]) -> str:
    """The name, if it is new. Raises ValueError: of two of a name, readers take whichever they like."""
    if name in known:
        raise ValueError(f"{name} is there twice")
    return name


def _entry(path: Path, name: str, start: int, shape: tuple[int, ...], code: int, offset: int) -> TensorEntry:
    check_shape(path, name, shape)
    kind = GGMLQuantizationType(code)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block:
        raise CheckpointError(f"{path}: tensor {name} has rows of {shape[-1]}, which {kind.name} does not divide; fetch it again")
    return TensorEntry(shape, kind, start + offset, math.prod(shape) // block * block_bytes)

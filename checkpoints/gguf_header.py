"""The header of a GGUF file: metadata and the table of tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's reader makes several numpy
objects for every string of the vocabulary and takes seconds to open a file; this one takes a tenth of a second.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from checkpoints.errors import CheckpointError

VERSIONS = (2, 3)
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
        return _parse(_Cursor(memoryview(data)), path)  # type: ignore[arg-type]
    except (struct.error, UnicodeDecodeError, KeyError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} has a truncated or corrupt header; fetch it again") from error


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, data: memoryview):
        self.data = data
        self.at = 4

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

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.scalar("<I"), self.scalar("<Q"))
        return self.scalar(_SCALARS[kind])

    def array(self, kind: int, count: int) -> list[Any]:
        if kind in (_STRING, _ARRAY):
            return [self.value(kind) for _ in range(count)]
        items = struct.unpack_from(f"<{count}{_SCALARS[kind][1]}", self.data, self.at)
        self.at += count * struct.calcsize(_SCALARS[kind])
        return list(items)


def _parse(cursor: _Cursor, path: Path) -> Header:
    version = cursor.scalar("<I")
    if version not in VERSIONS:
        raise CheckpointError(f"{path} is GGUF version {version}, not little-endian of {VERSIONS}; convert it again")
    num_tensors, num_keys = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("<I"))
    entries = {}
    for _ in range(num_tensors):
        name = cursor.string()
        shape = tuple(reversed([cursor.scalar("<Q") for _ in range(cursor.scalar("<I"))]))
        entries[name] = (shape, cursor.scalar("<I"), cursor.scalar("<Q"))
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1:
        raise ValueError("alignment")
    start = -(-cursor.at // align) * align
    tensors = {name: _entry(path, name, start, *entry) for name, entry in entries.items()}
    for name, tensor in tensors.items():
        if tensor.first + tensor.size > len(cursor.data):
            raise CheckpointError(f"{path} ends before tensor {name} does: it is truncated; fetch it again")
    return Header(metadata, tensors)


def _entry(path: Path, name: str, start: int, shape: tuple[int, ...], code: int, offset: int) -> TensorEntry:
    kind = GGMLQuantizationType(code)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block:
        raise CheckpointError(f"{path}: tensor {name} has rows of {shape[-1]}, which {kind.name} does not divide; fetch it again")
    return TensorEntry(shape, kind, start + offset, math.prod(shape) // block * block_bytes)

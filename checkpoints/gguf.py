"""Weights of a GGUF file, dequantised a slice at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from checkpoints.errors import CheckpointError
from checkpoints.gguf_header import TensorEntry, read_header
from checkpoints.source import Mapped, Mappings, Source, TensorInfo

PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
QUANTISED = (
    GGMLQuantizationType.Q2_K,
    GGMLQuantizationType.Q3_K,
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q4_K,
    GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q5_K,
    GGMLQuantizationType.Q6_K,
    GGMLQuantizationType.Q8_0,
)
_GROUP = 16  # rows that `gguf.quants` dequantises in one go
_CHUNK = 1 << 16  # values in one go that measure fastest: fewer calls, still in the cache


class GGUFSource(Source):
    """One `.gguf` file, memory-mapped. Raises CheckpointError if it is corrupt, truncated or of unknown types."""

    def __init__(self, path: Path):
        super().__init__(path)
        if path.stat().st_size < 8:
            raise CheckpointError(f"{path} is not a GGUF file: it is shorter than a header; fetch it again")
        self._data = Mapped(Mappings(), lambda: np.asarray(np.memmap(path, mode="r", dtype=np.uint8)))
        header = read_header(self._data.get(), path)
        self.metadata: dict[str, Any] = header.metadata
        self._entries = header.tensors
        self.tensors = {name: TensorInfo(entry.shape, entry.type.name, entry.size) for name, entry in header.tensors.items()}
        for name, entry in self._entries.items():
            if entry.type not in PLAIN and entry.type not in QUANTISED:
                known = ", ".join(kind.name for kind in (*PLAIN, *QUANTISED))
                raise CheckpointError(f"{path}: tensor {name} is {entry.type.name}; use a file of {known}")

    def _box(self, name: str, slices: tuple[slice, ...]) -> tuple[np.ndarray, int]:
        """The box in its own dtype if that is a plain one, else float32."""
        entry = self._entries[name]
        if entry.type in PLAIN:
            box = self._raw(entry).view(PLAIN[entry.type]).reshape(entry.shape)[slices]
            return box, box.nbytes
        return self._dequantised(entry, slices)

    def _raw(self, entry: TensorEntry) -> np.ndarray:
        return self._data.get(entry.size)[entry.first : entry.first + entry.size]

    def _dequantised(self, entry: TensorEntry, slices: tuple[slice, ...]) -> tuple[np.ndarray, int]:
        """The box, read by the blocks that it touches: rows are exact, columns are rounded out to blocks and trimmed."""
        block, block_bytes = GGML_QUANT_SIZES[entry.type]
        first, last, _ = slices[-1].indices(entry.shape[-1])
        blocks = slice(first // block, -(-last // block))
        raw = self._raw(entry).reshape(*entry.shape[:-1], entry.shape[-1] // block, block_bytes)[(*slices[:-1], blocks)]
        values = _dequantise_blocks(raw.reshape(-1, block_bytes), entry.type)
        values = values.reshape(*raw.shape[:-2], raw.shape[-2] * block)
        return values[..., first - blocks.start * block : last - blocks.start * block], raw.nbytes


def _dequantise_blocks(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Blocks [N, bytes] uint8 -> values [N * block] float32, in groups of a good size."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not len(raw):
        return np.empty(0, np.float32)
    per_row = _CHUNK // _GROUP // block
    whole = len(raw) // per_row * per_row
    grouped = (raw[:whole].reshape(-1, per_row * block_bytes), raw[whole:])
    parts = [dequantize(part, kind).ravel() for part in grouped if len(part)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

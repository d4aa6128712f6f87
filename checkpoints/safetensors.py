"""Weights of a folder of safetensors files, read a slice at a time.

Format: https://huggingface.co/docs/safetensors. One file `model.safetensors`, or several named by
`model.safetensors.index.json`. The library judges a header; tensors are then views of the mapped file, which it would copy.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from checkpoints.config_reader import LARGEST_JSON
from checkpoints.errors import CheckpointError, listed
from checkpoints.source import Mapped, Mappings, Source, TensorInfo, box_bytes, check_shape

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype.name: name for name, dtype in DTYPES.items()}


class _Place(NamedTuple):
    """Where a tensor lies: its file and its first byte there."""

    data: Mapped[np.ndarray]
    first: int


class SafetensorsSource(Source):
    """The tensors of a folder. Raises CheckpointError when a file is missing, corrupt, or not what the index says."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._places: dict[str, _Place] = {}
        self._mappings = Mappings()
        if (folder / SINGLE).exists():
            self._add(folder / SINGLE, None)
        elif (folder / INDEX).exists():
            for file, names in read_index(folder / INDEX).items():
                self._add(file, names)
        else:
            raise CheckpointError(
                f"{folder} holds neither {SINGLE} nor {INDEX}; convert its weights to safetensors, or fetch it again"
            )

    def _add(self, file: Path, expected: list[str] | None) -> None:
        entries = read_header(file)
        if expected is not None and (missing := sorted(set(expected) - set(entries))):
            raise CheckpointError(f"{file} lacks {listed(missing)}, which {INDEX} says it holds; fetch both again")
        data = Mapped(self._mappings, lambda: np.asarray(np.memmap(file, mode="r", dtype=np.uint8)))
        for name in entries if expected is None else expected:
            info, first = entries[name]
            if info.dtype not in DTYPES:
                self.unusable[name] = (
                    f"{file}: tensor {name} is {info.dtype}; supported are {', '.join(DTYPES)}; use the original weights"
                )
            self.tensors[name], self._places[name] = info, _Place(data, first)

    def _box(self, name: str, slices: tuple[slice, ...]) -> tuple[np.ndarray, int]:
        """The box in its own dtype, a view of the file."""
        info, (data, first) = self.tensors[name], self._places[name]
        nbytes = box_bytes(info, slices)
        try:
            raw = data.get(nbytes)[first : first + info.nbytes]
        except OSError as error:
            raise CheckpointError(f"{self.where}: {name} cannot be read any more ({error}); fetch it again") from error
        return raw.view(DTYPES[info.dtype]).reshape(info.shape)[slices], nbytes


def read_header(file: Path) -> dict[str, tuple[TensorInfo, int]]:
    """Each tensor of a file, and its first byte there. Raises CheckpointError for a header that is not true of the file."""
    try:
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if size > LARGEST_JSON:
                raise ValueError(f"a header of {size} bytes")
            with safe_open(file, framework="np"):
                pairs = json.loads(opened.read(size), object_pairs_hook=_once)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}): correct that, or fetch it again") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is truncated or corrupt ({error}); fetch it again") from error
    entries = {}
    for name, entry in pairs.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            check_shape(file, name, tuple(entry["shape"]))
            entries[name] = TensorInfo(tuple(entry["shape"]), entry["dtype"], last - first), 8 + size + first
    return entries


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names occur once. Raises ValueError: of two, readers take whichever they like."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{listed(twice)} is there twice")
    return values


def read_index(index: Path) -> dict[Path, list[str]]:
    """model.safetensors.index.json -> the tensors of each file, which must exist inside the index's folder."""
    try:
        if index.stat().st_size > LARGEST_JSON:
            raise ValueError("too large")
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_once)["weight_map"]
        pairs = sorted((file, name) for name, file in weight_map.items())
        if not all(isinstance(file, str) for file, _ in pairs):
            raise TypeError("files that are not names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"{index} is not an index: it needs a `weight_map` from tensors to files; fetch it again"
        ) from error
    if not pairs:
        raise CheckpointError(f"{index} has an empty `weight_map`; fetch it again")
    files: dict[Path, list[str]] = {}
    for file, name in pairs:
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{index}: tensor {name} is said to be in {file!r}, outside the folder; put its file beside the index"
            )
        files.setdefault(index.parent / file, []).append(name)
    there = {file.name for file in index.parent.iterdir()}  # to ask for each fails if a name is none a file can have
    if missing := [file.name for file in files if file.name not in there]:
        raise CheckpointError(f"{index} names files that are not there: {listed(missing)}; fetch them again")
    return files

"""Weights of a folder of safetensors files, read a slice at a time.

Format: https://huggingface.co/docs/safetensors. One file `model.safetensors`, or several named by
`model.safetensors.index.json`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 from it)
import numpy as np
from safetensors import SafetensorError, safe_open

from checkpoints.errors import CheckpointError, listed
from checkpoints.source import Counter, Mapped, Mappings, TensorInfo, box_bytes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class SafetensorsSource:
    """The tensors of a folder. Raises CheckpointError when a file is missing, corrupt, or not what the index says."""

    def __init__(self, folder: Path):
        self.where = str(folder)
        self._files: dict[str, Mapped[Any]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._count = Counter()
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

    @property
    def bytes_read(self) -> int:
        return self._count.total

    def _add(self, file: Path, expected: list[str] | None) -> None:
        try:
            mapped: Mapped[Any] = Mapped(self._mappings, lambda: safe_open(file, framework="np"))
            opened = mapped.get()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or corrupt ({error}); fetch it again") from error
        names = list(opened.keys())
        if expected is not None and (missing := sorted(set(expected) - set(names))):
            raise CheckpointError(f"{file} lacks {listed(missing)}, which {INDEX} says it holds; fetch both again")
        for name in names if expected is None else expected:
            view = opened.get_slice(name)
            dtype = view.get_dtype()
            if dtype not in ITEMSIZE:
                raise CheckpointError(
                    f"{file}: tensor {name} is {dtype}; supported are {', '.join(ITEMSIZE)}; use the original weights"
                )
            shape = tuple(view.get_shape())
            self.tensors[name] = TensorInfo(shape, dtype, math.prod(shape) * ITEMSIZE[dtype])
            self._files[name] = mapped

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """A box of a tensor in its own dtype."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.where} has no tensor {name}; fetch the checkpoint again if it is incomplete")
        nbytes = box_bytes(self.tensors[name], slices)
        try:
            box = self._files[name].get(nbytes).get_slice(name)[slices]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.where}: {name} cannot be read any more ({error}); fetch it again") from error
        self._count.add(nbytes)
        return box


def read_index(index: Path) -> dict[Path, list[str]]:
    """model.safetensors.index.json -> the tensors of each file, which must exist inside the index's folder."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        pairs = sorted((str(file), str(name)) for name, file in weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{index} names files that are not there: {listed(missing)}; fetch them again")
    return files

"""Orbax checkpoints: the decoder's parameters, unpadded, each an array that any mesh reads its own shard of.

In the folder `params` beside config.json; `orbax.checkpoint.StandardCheckpointer().restore` opens it too. Whatever Orbax writes
is read: Zarr 2 and 3, an OCDBT database or folders.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from orbax.checkpoint import type_handlers

from checkpoints.config_reader import parse_json, read_json
from checkpoints.copying import empty
from checkpoints.errors import CheckpointError
from checkpoints.safetensors import NAMES
from checkpoints.source import ORBAX, Source, TensorInfo, check_shape

METADATA = "_METADATA"
_MOST_COMPRESSED = 1000  # times: weights hardly are, but what is not trained yet may be zeros
_CONTEXT = {"cache_pool": {"total_bytes_limit": 0}}  # nothing is read twice


class OrbaxSource(Source):
    """The arrays of a folder's `params`. Raises CheckpointError for what is no Orbax checkpoint of such arrays."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        path = (folder / ORBAX).resolve()
        metadata = read_json(path / METADATA)
        zarr3 = bool(metadata.get("use_zarr3"))
        try:
            ocdbt = bool(type_handlers.is_ocdbt_checkpoint(path))
            names = _names(metadata)
            if outside := [name for name in names if "/" in name or name in ("", ".", "..") or not name.isprintable()]:
                raise ValueError(f"{outside[0]!r} is no name of an array")
            for file, reading in [_read_metadata(path, name, ocdbt, zarr3) for name in names]:
                parse_json(reading.result().value, file)
            opening = [_open(path, name, ocdbt, zarr3) for name in names]
            self._arrays = {name: array.result() for name, array in zip(names, opening, strict=True)}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f"{path} is no whole Orbax checkpoint ({_first_line(error)}); convert it again") from error
        for name, array in self._arrays.items():
            if array.dtype.name not in NAMES:
                raise CheckpointError(f"{path}: {name} is {array.dtype.name}; supported are {', '.join(NAMES)}")
            check_shape(path, name, tuple(array.shape))
            # A shard of Zarr 3 is its chunks' multiple, the last one cut off by the array.
            chunks = array.chunk_layout.write_chunk.shape or ()  # None of an array without axes
            if any(chunk >= 2 * max(size, 1) for chunk, size in zip(chunks, array.shape, strict=True)):
                raise CheckpointError(f"{path}: {name} is {array.shape}, and its chunks are larger; convert it again")
            size = math.prod(array.shape) * array.dtype.numpy_dtype.itemsize
            self.tensors[name] = TensorInfo(tuple(array.shape), NAMES[array.dtype.name], size)
        size, stored = sum(info.nbytes for info in self.tensors.values()), _size(path)
        if size > _MOST_COMPRESSED * stored:
            raise CheckpointError(f"{path}: its arrays would have {size} bytes, and its files have {stored}; convert it again")

    def _box(self, name: str, slices: tuple[slice, ...]) -> tuple[np.ndarray, int]:
        """The box in its own dtype. Whole chunks are read, and counted."""
        array = self._arrays[name]
        ranges = [range(size)[part] for size, part in zip(array.shape, slices, strict=True)]
        box = empty(tuple(map(len, ranges)), array.dtype.numpy_dtype)
        if not box.size:
            return box, 0
        try:
            ts.array(box).write(array[slices].translate_to[(0,) * array.rank]).result()
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self.where}: {name} cannot be read ({_first_line(error)}); convert it again") from error
        spans = [
            min(-(-one.stop // chunk) * chunk, size) - one.start // chunk * chunk
            for one, chunk, size in zip(ranges, array.chunk_layout.read_chunk.shape or (), array.shape, strict=True)
        ]
        return box, math.prod(spans) * box.itemsize


def _names(metadata: dict[str, Any]) -> list[str]:
    """Names of the arrays, as Orbax joins their keys. Orbax itself would open them all to tell."""
    leaves = metadata["tree_metadata"].values()
    arrays = [leaf["key_metadata"] for leaf in leaves if leaf["value_metadata"]["value_type"] != "None"]
    return [".".join(str(key["key"]) for key in keys) for keys in arrays]


def _read_metadata(path: Path, name: str, ocdbt: bool, zarr3: bool) -> tuple[Path, Any]:
    """The metadata of an array, to be judged first: of values nested deep TensorStore would die."""
    file = "zarr.json" if zarr3 else ".zarray"
    return path / name / file, ts.KvStore.open(_store(path, name, ocdbt)).result().read(file)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _store(path: Path, name: str, ocdbt: bool) -> dict[str, Any]:
    if ocdbt:
        return {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{name}/"}
    return {"driver": "file", "path": f"{path}/{name}/"}


def _open(path: Path, name: str, ocdbt: bool, zarr3: bool) -> Any:
    store = _store(path, name, ocdbt)
    driver = "zarr3" if zarr3 else "zarr"
    # A chunk that is missing is an error, not zeros.
    spec = {"driver": driver, "kvstore": store, "fill_missing_data_reads": False}
    return ts.open(spec, open=True, context=ts.Context(_CONTEXT))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

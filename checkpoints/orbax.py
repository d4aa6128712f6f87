"""Orbax checkpoints: the decoder's parameters, unpadded, each an array that any mesh reads its own part of.

In the folder `params` beside config.json; `orbax.checkpoint.StandardCheckpointer().restore` opens it too. Whatever Orbax writes
is read: Zarr 2 and 3, an OCDBT database or folders.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from checkpoints.config_reader import read_json
from checkpoints.copying import empty
from checkpoints.errors import CheckpointError
from checkpoints.safetensors import NAMES
from checkpoints.source import Source, TensorInfo

ITEM, METADATA = "params", "_METADATA"
_CONTEXT = {"cache_pool": {"total_bytes_limit": 0}}  # nothing is read twice


class OrbaxSource(Source):
    """The arrays of a folder's `params`. Raises CheckpointError for what is no Orbax checkpoint of such arrays."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        path = (folder / ITEM).resolve()
        zarr3 = bool(read_json(path / METADATA).get("use_zarr3"))
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                tree = checkpointer.metadata(path).item_metadata.tree
            ocdbt = bool(type_handlers.is_ocdbt_checkpoint(path))
            leaves = jax.tree_util.tree_leaves_with_path(tree)
            names = [".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys) for keys, _ in leaves]
            opening = [_open(path, name, ocdbt, zarr3) for name in names]
            self._arrays = {name: array.result() for name, array in zip(names, opening, strict=True)}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f"{path} is no whole Orbax checkpoint ({_first_line(error)}); convert it again") from error
        for name, array in self._arrays.items():
            if array.dtype.name not in NAMES:
                raise CheckpointError(f"{path}: {name} is {array.dtype.name}; supported are {', '.join(NAMES)}")
            size = math.prod(array.shape) * array.dtype.numpy_dtype.itemsize
            self.tensors[name] = TensorInfo(tuple(array.shape), NAMES[array.dtype.name], size)

    def _box(self, name: str, slices: tuple[slice, ...]) -> tuple[np.ndarray, int]:
        """In its own dtype. Whole chunks are read, and counted."""
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
            for one, chunk, size in zip(ranges, array.chunk_layout.read_chunk.shape, array.shape, strict=True)
        ]
        return box, math.prod(spans) * box.itemsize


def _open(path: Path, name: str, ocdbt: bool, zarr3: bool) -> Any:
    store: dict[str, Any] = {"driver": "file", "path": f"{path}/{name}/"}
    if ocdbt:
        store = {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{name}/"}
    driver = "zarr3" if zarr3 else "zarr"
    # A chunk that is missing is an error, not zeros.
    spec = {"driver": driver, "kvstore": store, "fill_missing_data_reads": False}
    return ts.open(spec, open=True, context=ts.Context(_CONTEXT))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

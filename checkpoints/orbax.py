"""Orbax checkpoints: the decoder's parameters, unpadded, each an array that any mesh reads its own part of.

In the folder `params` beside config.json; `orbax.checkpoint.StandardCheckpointer().restore` opens it. To write it, Orbax makes a
tree of empty arrays, which are then filled through its own storage, TensorStore, a parameter in each transaction. Arrays are
Zarr 3 in one OCDBT database, cut in eight along what layouts split, so that a device reads little more than its part.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import future, type_handlers

from checkpoints.config_reader import read_json
from checkpoints.copying import empty, owned
from checkpoints.errors import CheckpointError
from checkpoints.safetensors import NAMES
from checkpoints.source import Source, TensorInfo
from checkpoints.target import Entry, Target

ITEM, METADATA = "params", "_METADATA"
_PARTS = 8
_SMALL = 1 << 16  # bytes: pieces below are not worth it
_DATA_FILE = 1 << 28  # bytes
# The conversion flushes its files itself, all at the end.
_CONTEXT = {"file_io_sync": False, "cache_pool": {"total_bytes_limit": 0}}


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
        store = _database(path) | {"path": f"{name}/"}
    driver = "zarr3" if zarr3 else "zarr"
    # A chunk that is missing is an error, not zeros; one of zeros is written like any other.
    spec = {"driver": driver, "kvstore": store, "fill_missing_data_reads": False, "store_data_equal_to_fill_value": True}
    return ts.open(spec, open=True, context=ts.Context(_CONTEXT))


def _database(path: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": f"file://{path}/", "target_data_file_size": _DATA_FILE}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class OrbaxArrays(Target):
    """An array for each parameter, named by its path."""

    def __init__(self, entries: Iterable[Entry]):
        super().__init__({entry.name: [entry] for entry in entries})
        self._counts: dict[str, int] = {}  # chunks of each array when `begin` looked: to list a database takes long

    def rows(self, entry: Entry) -> int:
        return chunk_shape(entry)[0]

    def begin(self, folder: Path) -> None:
        counts = self._chunks(folder)
        self._counts = counts or {}
        if counts is not None:
            return
        for left in folder.glob(f"{ITEM}*"):  # of a run that was stopped while it made the arrays
            shutil.rmtree(left)
        tree: dict[str, Any] = {}
        for name, (entry,) in self.groups.items():
            *parents, last = name.split(".")
            at = tree
            for parent in parents:
                at = at.setdefault(parent, {})
            at[last] = _Empty(entry)
        registry = type_handlers.create_type_handler_registry((_Empty, _Maker()), (jax.Array, type_handlers.ArrayHandler()))
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=True, use_zarr3=True)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save((folder / ITEM).resolve(), tree)

    def is_whole(self, folder: Path, name: str) -> bool:
        (entry,) = self.groups[name]
        chunks = math.prod(-(-size // chunk) for size, chunk in zip(entry.shape, chunk_shape(entry), strict=True))
        return self._counts.get(name) == chunks

    def write(self, folder: Path, name: str, pieces: Iterator[np.ndarray]) -> None:
        (entry,) = self.groups[name]
        rows, *others = chunk_shape(entry)
        transaction = ts.Transaction()
        array = _open((folder / ITEM).resolve(), name, ocdbt=True, zarr3=True).result().with_transaction(transaction)
        first = 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for piece in pieces:
                boxes = _boxes(piece.shape, (rows, *others))

                def put(box: tuple[slice, ...], piece: np.ndarray = piece, first: int = first) -> Any:
                    there = (slice(box[0].start + first, box[0].stop + first), *box[1:])
                    return array[there].write(owned(piece[box], entry.dtype), can_reference_source_data_indefinitely=True)

                for writing in pool.map(put, boxes):
                    writing.copy.result()
                first += len(piece)
        assert first == entry.shape[0], f"{name}: {first} rows of {entry.shape[0]}"
        try:
            transaction.commit_async().result()
        except ValueError as error:  # TensorStore's word for every failure of the disk
            raise OSError(f"{folder / ITEM}: {_first_line(error)}") from error

    def _chunks(self, folder: Path) -> dict[str, int] | None:
        """How many of each array are there; None where there is no database yet, or a broken one."""
        path = (folder / ITEM).resolve()
        if not (path / METADATA).exists():
            return None
        counts: dict[str, int] = {}
        try:
            for key in ts.KvStore.open(_database(path)).result().list().result():
                name, _, rest = key.decode().partition("/")
                counts[name] = counts.get(name, 0) + rest.startswith("c/")
        except (ValueError, OSError):
            return None
        return counts if counts.keys() == self.groups.keys() else None


def chunk_shape(entry: Entry) -> tuple[int, ...]:
    """An eighth, or the next divisor below, of each of the first two dimensions, unless that makes tiny pieces."""
    shape, itemsize = list(entry.shape), entry.dtype.itemsize
    for i in range(2 if len(shape) > 1 else 0):
        smaller = [*shape[:i], _part(entry.shape[i]), *shape[i + 1 :]]
        if math.prod(smaller) * itemsize >= _SMALL:
            shape = smaller
    return tuple(shape)


def _part(size: int) -> int:
    most = max(size // _PARTS, 1)
    return next((part for part in range(most, most // 2, -1) if size % part == 0), most)


def _boxes(shape: tuple[int, ...], chunk: tuple[int, ...]) -> list[tuple[slice, ...]]:
    counts = [-(-size // step) for size, step in zip(shape, chunk, strict=True)]
    return [
        tuple(slice(i * step, min((i + 1) * step, size)) for i, step, size in zip(at, chunk, shape, strict=True))
        for at in np.ndindex(*counts)
    ]


class _Empty:
    """Stands for an array in the tree that Orbax saves."""

    def __init__(self, entry: Entry):
        self.entry = entry


class _Maker(type_handlers.TypeHandler):
    """Makes the arrays and writes nothing into them."""

    def typestr(self) -> str:
        return "np.ndarray"

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        raise NotImplementedError

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
        raise NotImplementedError

    async def serialize(self, values: Sequence[_Empty], infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
        async def make() -> None:
            for value, info in zip(values, infos, strict=True):
                await info.await_path_creation()
                # Orbax merges what each process has made; there is one.
                store = _database(Path(info.parent_dir) / "ocdbt.process_0") | {"path": f"{info.name}/"}
                grid = {"name": "regular", "configuration": {"chunk_shape": chunk_shape(value.entry)}}
                metadata = {
                    "shape": value.entry.shape,
                    "data_type": value.entry.dtype.name,
                    "chunk_grid": grid,
                    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                }
                spec = {"driver": "zarr3", "kvstore": store, "metadata": metadata}
                await ts.open(spec, create=True, context=ts.Context(_CONTEXT))

        return [future.CommitFutureAwaitingContractedSignals(make(), name="empty_arrays")]

"""Parameters -> an Orbax checkpoint, as `checkpoints.orbax` reads it.

Orbax makes a tree of arrays without numbers, each of which then gets its file. Its own storage would hold a whole array before it
writes it, and what it had written of one when it was killed would stay, named by nothing.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import future, type_handlers

from checkpoints.orbax import METADATA
from checkpoints.source import ORBAX
from checkpoints.target import Entry, Piece, Target
from checkpoints.zarr_shard import Shard


class OrbaxArrays(Target):
    """An array for each parameter, named by its path: zarr.json and one shard."""

    def __init__(self, entries: Iterable[Entry]):
        super().__init__({entry.name: [entry] for entry in entries})

    def chunk(self, entry: Entry) -> tuple[int, ...]:
        return Shard(entry).chunk

    def begin(self, folder: Path) -> None:
        if (folder / ORBAX / METADATA).exists():  # Orbax gives the folder its name when everything is in it
            return
        for left in folder.glob(f"{ORBAX}*"):  # of a run that was stopped while it made the arrays
            shutil.rmtree(left)
        tree: dict[str, Any] = {}
        for name, (entry,) in self.groups.items():
            *parents, last = name.split(".")
            at = tree
            for parent in parents:
                at = at.setdefault(parent, {})
            at[last] = _Empty(entry)
        registry = type_handlers.create_type_handler_registry((_Empty, _Maker()), (jax.Array, type_handlers.ArrayHandler()))
        # Of several processes this one writes, and waits for none.
        this = jax.process_index()
        how: dict[str, Any] = {}
        if jax.process_count() > 1:
            how["multiprocessing_options"] = ocp.options.MultiprocessingOptions(this, {this}, "jaxllm")
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=False, use_zarr3=True, **how)
        with _no_warnings(), ocp.Checkpointer(handler, **how) as checkpointer:
            checkpointer.save((folder / ORBAX).resolve(), tree)

    def is_whole(self, folder: Path, name: str) -> bool:
        file, shard = self._file(folder, name)
        return file.is_file() and file.stat().st_size == shard.nbytes

    def write(self, folder: Path, name: str, pieces: Iterator[Piece]) -> None:
        file, shard = self._file(folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        shard.write(part, pieces)
        part.replace(file)

    def _file(self, folder: Path, name: str) -> tuple[Path, Shard]:
        (entry,) = self.groups[name]
        shard = Shard(entry)
        return folder / ORBAX / name / shard.name, shard


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence absl's warnings: Orbax warns that there is no OCDBT database, after it was told to make none."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Empty:
    """A stand-in for an array in the tree that Orbax saves."""

    def __init__(self, entry: Entry):
        self.entry = entry


class _Maker(type_handlers.TypeHandler):
    """A handler that makes the arrays and writes nothing into them."""

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
                store = {"driver": "file", "path": f"{info.parent_dir}/{info.name}/", "file_io_sync": False}
                await ts.open({"driver": "zarr3", "kvstore": store, "metadata": Shard(value.entry).metadata()}, create=True)

        return [future.CommitFutureAwaitingContractedSignals(make(), name="empty_arrays")]

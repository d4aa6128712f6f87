"""A checkpoint of any format -> a folder of safetensors or Orbax, in bounded memory, whole or absent.

Tensors go slice by slice from the source's files to the target's, through the parameters that both name. The target grows in a
sibling, `NAME.partial`, and takes its name when it is complete, flushed and compared with the source. A run that was stopped goes
on there: files that are whole stay.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

from checkpoints.checkpoint import CONFIG, GENERATION, Checkpoint, open_checkpoint
from checkpoints.errors import CheckpointError, listed
from checkpoints.families import FAMILIES
from checkpoints.load import require_tied_head
from checkpoints.names import Rules, axis_sizes
from checkpoints.parameters import names_of_parameters
from checkpoints.pattern import Pattern
from checkpoints.safetensors import DTYPES
from checkpoints.safetensors_writer import SafetensorsFiles
from checkpoints.source import ORBAX
from checkpoints.target import Entry, Piece, Target
from checkpoints.verify import compare, differing_config
from checkpoints.view import SLICE, View
from jaxllm.config import ModelConfig

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""

# Beside weights and config.json: tokenizer, chat template, generation config.
SIDECAR_FILES = ("*.model", "*.jinja", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
                 "added_tokens.json", "chat_template*", GENERATION)  # fmt: skip
WRITING, PUBLISHING = "writing", "publishing"  # what a run that was stopped was doing
PEAK_BYTES = 16 * 4 * SLICE  # a few slices in float32, read, rearranged, rounded and compared, and some for their buffers
FORMATS = ("safetensors", "orbax")
T = TypeVar("T")


class Content(NamedTuple):
    """A parameter that a tensor holds, or the part of it within `bounds`."""

    path: str
    pattern: Pattern
    bounds: dict[str, tuple[int, int]]

    def first(self, sizes: dict[str, int]) -> int:
        """Index of its first position along the axis that the tensor's parameters share; 0 for all of a tensor."""
        return self.pattern.tensor_slice.first(sizes) if self.pattern.tensor_slice else 0


def contents(rules: Rules, config: ModelConfig) -> dict[str, list[Content]]:
    """The contents of each tensor, in the order of the rules."""
    found: dict[str, list[Content]] = {}
    sizes = axis_sizes(config)
    for path, (tensors, pattern) in rules.by_parameter(config).items():
        for i, tensor in enumerate(tensors):
            bounds = {pattern.stacked: (i, i + 1)} if pattern.stacked else {}
            found.setdefault(tensor, []).append(Content(path, pattern, bounds))
    return {tensor: sorted(held, key=lambda content: content.first(sizes)) for tensor, held in found.items()}


@dataclass(frozen=True)
class Job:
    """A conversion: the source, and the tensors to be written."""

    source: Checkpoint
    target: Path
    dtype: str | None
    rules: Rules
    format: Target

    @property
    def groups(self) -> dict[str, list[Entry]]:
        """The units that are written whole or not at all, files or arrays, and the tensors in each."""
        return self.format.groups

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entries in self.groups.values() for entry in entries)

    def contents(self) -> dict[str, list[Content]]:
        """The contents of each tensor that is written."""
        return contents(self.rules, self.source.config)

    @property
    def work(self) -> Path:
        """The folder in which the target grows."""
        return self.target.with_name(self.target.name + ".partial")

    def beside(self, what: str) -> Path:
        """A file of the conversion's own beside the target: its state, its lock, the target's predecessor."""
        return self.target.with_name(f".{self.target.name}.jaxllm-convert.{what}")

    def identity(self) -> dict[str, Any]:
        """Values that tell this conversion from another into the same folder."""
        stat = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _source_files(self.source.path)]
        groups = {name: [(e.name, list(e.shape), str(e.dtype)) for e in entries] for name, entries in self.groups.items()}
        weights = self.source.source.version
        return json.loads(json.dumps({"source": stat, "weights": weights, "dtype": self.dtype, "groups": groups}))


def prepare(
    source: Checkpoint, target: Path, *, to: str = "safetensors", dtype: str | None = None, max_shard_bytes: int = 5 * 10**9
) -> Job:
    """Prepare a conversion to one of FORMATS. `dtype`: round to it; None keeps each tensor's own, float32 if quantised.

    Raises CheckpointError for tensors that are missing, misshapen or have no place. Of the weights only a tied head is read.
    """
    view, rules = View(source), FAMILIES[source.family].rules
    if to == "orbax":
        rules = rules.of_parameters()
    declared = set(names_of_parameters(source.config))
    mappings = source.rules.by_parameter(source.config)
    needed = [name for path in mappings if path in declared for name in mappings[path].tensors]
    if missing := [name for name in needed if name not in source.source.tensors]:
        raise CheckpointError(f"{source.source.where} lacks tensors {listed(missing)}; fetch it again if it is incomplete")
    extra = view.extra + [name for path, mapping in view.by_param.items() if path not in declared for name in mapping.tensors]
    if extra:
        raise CheckpointError(f"{source.source.where} holds tensors that its config has no use for: {listed(sorted(extra))}")
    for path in view.by_param:
        view.shape(path)
    entries = []
    for name, held in contents(rules, source.config).items():
        if held[0].path in declared:
            dtypes = set().union(*(_dtypes(view, content.path, dtype) for content in held))
            one = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
            entries.append(Entry(name, held[0].pattern.tensor_shape(view.sizes), one))
    require_tied_head(source.source, source.rules, source.config)
    return Job(source, target.resolve(), dtype, rules, _format(to, entries, max_shard_bytes))


def _format(to: str, entries: list[Entry], max_shard_bytes: int) -> Target:
    if to == "safetensors":
        return SafetensorsFiles(entries, max_shard_bytes)
    if to == "orbax":
        from checkpoints.orbax_writer import OrbaxArrays  # takes a second to import

        return OrbaxArrays(entries)
    raise ValueError(f"unknown format {to!r}; there are {', '.join(FORMATS)}")


def convert(
    job: Job,
    *,
    force: bool = False,
    check: bool = True,
    flush: bool = True,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write the target. Raises CheckpointError; what is complete by then is gone on from by the next run.

    Args:
      force: overwrite a checkpoint that is there.
      check: compare what was written with the source before it takes its name; what an interrupted run left is always compared.
      flush: wait for the disk; without, as after `cp`, a machine that loses power may lose what was written last.
    """
    try:
        with _exclusive_lock(job):
            if not _finished(job):
                _may_write(job, force)
                goes_on = _begin(job)
                _take_along(job)
                _write(job, progress)
                if check or goes_on:
                    _check(job)
                _may_write(job, force)
                if flush:
                    for path in (*job.work.rglob("*"), job.work):
                        _flush(path)
                _publish(job)
            _clean(job)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(job.target.parent).free
            raise CheckpointError(
                f"{job.work}: the disk is full ({free:,} bytes free, {job.nbytes:,} to write in all): free space and run again, "
                "which goes on from what is complete"
            ) from error
        raise CheckpointError(f"{job.target} cannot be written ({error}): correct that, or choose another target") from error


def _may_write(job: Job, force: bool) -> None:
    source, target = job.source.path.resolve(), job.target
    if any(source.is_relative_to(path) for path in (target, job.work, job.beside("old"))):
        raise CheckpointError(f"{target} holds the source itself, or would: choose another target")
    if not target.exists():
        return
    if not force:
        raise CheckpointError(f"{target} exists: choose another target, or overwrite it with --force")
    inside = list(target.iterdir()) if target.is_dir() else [target]
    weights = any(path.suffix == ".safetensors" or path.name == ORBAX for path in inside) and (target / CONFIG).exists()
    if inside and (not weights or any(path.is_dir() and path.name != ORBAX for path in inside)):
        raise CheckpointError(f"{target} is no checkpoint, which alone --force overwrites: choose another target")


def _record(job: Job, state: str) -> None:
    new = job.beside("new")
    new.write_text(json.dumps({"state": state, "job": job.identity()}))
    new.replace(job.beside("json"))


def _recorded(job: Job) -> dict[str, Any]:
    """State and identity of the conversion that was here last and has not ended; empty where there is none."""
    try:
        return dict(json.loads(job.beside("json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _finished(job: Job) -> bool:
    """Whether this very conversion had published its target when it was stopped."""
    published = job.target.exists() and not job.work.exists()
    return published and _recorded(job) == {"state": PUBLISHING, "job": job.identity()}


def _dtypes(view: View, path: str, dtype: str | None) -> set[np.dtype]:
    if dtype is not None:
        return {np.dtype(jnp.dtype(dtype))}
    return {DTYPES.get(one, np.dtype(np.float32)) for one in view.dtypes(path)}


@contextlib.contextmanager
def _exclusive_lock(job: Job) -> Iterator[None]:
    """Hold a lock beside the target; it falls with the process. Raises CheckpointError where another process has it."""
    job.target.parent.mkdir(parents=True, exist_ok=True)
    path = job.beside("lock")
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before may have removed the name since.
            held = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except BlockingIOError:
            held = False
        if not held:
            raise CheckpointError(f"{job.target} is being written by another process: wait for it, or choose another target")
        try:
            yield
        finally:
            path.unlink()


def _begin(job: Job) -> bool:
    """Make a folder for this job, or take the one that an interrupted run of it left. Returns whether that holds anything."""
    before = _recorded(job)
    if job.work.exists() and not before:
        raise CheckpointError(f"{job.work} is in the way, and not from a conversion: remove it, or choose another target")
    if job.work.exists() and before.get("job") != job.identity():
        shutil.rmtree(job.work)
    _record(job, WRITING)
    job.work.mkdir(exist_ok=True)
    job.format.begin(job.work)
    lacking = [name for name in job.groups if not job.format.is_whole(job.work, name)]
    missing = sum(entry.nbytes for name in lacking for entry in job.groups[name])
    free = shutil.disk_usage(job.work).free
    if missing > free:
        raise CheckpointError(f"{job.target} needs {missing:,} more bytes, the disk has {free:,}: free some or go elsewhere")
    return len(lacking) < len(job.groups)


def _write(job: Job, progress: Progress) -> None:
    view = View(job.source)
    by_tensor = job.contents()
    done = 0

    def pieces(entries: list[Entry]) -> Iterator[Piece]:
        nonlocal done
        for entry in entries:
            for first, x in _pieces(view, by_tensor[entry.name], entry, job.format.chunk(entry)):
                piece = Piece(first, round_to(x, entry.dtype, entry.name))
                yield piece
                done += piece.numbers.nbytes
                progress(done, job.nbytes)

    for name, entries in job.groups.items():
        if job.format.is_whole(job.work, name):
            done += sum(entry.nbytes for entry in entries)
            progress(done, job.nbytes)
        else:
            job.format.write(job.work, name, _prefetch(pieces(entries)))
    job.format.end(job.work)


def _pieces(view: View, held: list[Content], entry: Entry, chunk: tuple[int, ...] | None) -> Iterator[Piece]:
    """A target tensor's numbers, as `Target.chunk` says."""
    tensor_slice = held[0].pattern.tensor_slice
    if chunk is not None:  # the parameter itself
        (content,) = held
        for bounds in view.boxes(content.path, content.pattern, chunk):
            yield Piece(content.pattern.begin(bounds, view.sizes), view.read(content.path, bounds))
    elif tensor_slice is not None and held[0].pattern.tensor_dims[0][0] == tensor_slice.axis:  # one parameter after another
        for content in held:
            yield from _rows(view, [content], entry)
    else:
        yield from _rows(view, held, entry)


def _rows(view: View, held: list[Content], entry: Entry) -> Iterator[Piece]:
    """Rows of all these at a time, along the first axis that they share."""
    axis = held[0].pattern.leading()[0]
    for bounds in view.slices(axis, math.prod(entry.shape)):
        sizes = view.sizes | {axis: bounds[1] - bounds[0]}
        parts = [one.pattern.split(view.read(one.path, {axis: bounds} | one.bounds), sizes) for one in held]
        yield Piece((), held[0].pattern.join(parts))


def round_to(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`x` in `dtype`. Raises CheckpointError where a number becomes infinite."""
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        y = x.astype(dtype)
    if np.isinf(y).any() and not np.array_equal(np.isinf(y), np.isinf(x)):
        largest = float(np.abs(x[np.isfinite(x)].astype(np.float64)).max())
        raise CheckpointError(f"{name} holds {largest:.4g}, beyond what {dtype} can: leave out --dtype, or choose a wider one")
    return y


def _prefetch(pieces: Iterator[T]) -> Iterator[T]:
    """The same pieces, each made while the one before is used."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, pieces, end)
        while (piece := following.result()) is not end:
            following = pool.submit(next, pieces, end)
            yield piece  # type: ignore[misc]


def _take_along(job: Job) -> None:
    """Write all that is not weights; it comes first, so that anything wrong with it is told at once."""
    _write_config(job)
    source = job.source
    if not source.is_hugging_faces:
        tokenizer = source.tokenizer()
        if tokenizer is not None:
            tokenizer.save_pretrained(job.work)
        return
    for pattern in SIDECAR_FILES:
        for file in source.path.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, job.work / file.name)


def _write_config(job: Job) -> None:
    """The source's own config.json, or one made from its metadata; the dtype is that of the matrices that are written."""
    source, values = job.source, job.source.values
    if values is None:
        write = FAMILIES[source.family].write_config
        assert write is not None, "formats that are not Hugging Face's are of families that can be written"
        values = write(source.config)
    values = dict(values)
    dtypes = {str(e.dtype) for entries in job.groups.values() for e in entries if len(e.shape) > 1}
    key = "torch_dtype" if "torch_dtype" in values and "dtype" not in values else "dtype"  # before transformers 5, and since
    values[key] = dtypes.pop() if len(dtypes) == 1 else "float32"
    (job.work / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _check(job: Job) -> None:
    """Compare the target with the source. Raises CheckpointError unless they are equal to the bit, rounded as asked."""
    written = open_checkpoint(job.work)
    wrong = [f"{line} (architecture)" for line in differing_config(job.source, written)]
    wrong += [f"{one.parameter} ({one.verdict})" for one in compare(job.source, written, rounded=True) if not one.equal]
    if wrong:
        raise CheckpointError(
            f"{job.work} differs from {job.source.path} in {listed(wrong)}: the disk may be faulty; remove it and run again"
        )


def _publish(job: Job) -> None:
    """Put the finished folder in the target's place."""
    if _recorded(job).get("job") != job.identity():
        raise CheckpointError(f"{job.source.path} was changed while it was read: run again")
    _record(job, PUBLISHING)
    old = job.beside("old")
    if job.target.exists():
        if old.exists():  # a run was stopped while it removed it
            shutil.rmtree(old)
        job.target.rename(old)
    job.work.rename(job.target)
    _flush(job.target.parent)


def _clean(job: Job) -> None:
    """Remove the target's predecessor, and the conversion's own files beside the target."""
    if job.beside("old").exists():
        shutil.rmtree(job.beside("old"))
    for what in ("new", "json"):
        job.beside(what).unlink(missing_ok=True)


def _flush(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _source_files(path: Path) -> list[Path]:
    """Files of weights, and those that say how to read them."""
    kinds = ("*.safetensors", "*.bin", "*.pth", "config.json", "params.json", f"{ORBAX}/**/*")
    if path.is_dir():
        return sorted({file for kind in kinds for file in path.glob(kind)})
    return [path] if path.exists() else []

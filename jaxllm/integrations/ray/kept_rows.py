"""Rows of results, kept as they come: a file of JSON lines, or a folder of Parquet parts; an interrupted job goes on from it.

Each names its job first. Rows that failed are left out when a job goes on: they are asked for again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from jaxllm.requests.outputs import RequestError

ROW, ERROR = "row", "error"
JOB = "job.json"  # in a folder of parts
LINES = ".jsonl"

Columns = Mapping[str, pa.DataType]
"""Of a job's results, beside `row`, the row's number in the data set, and `error`, why it has none."""


class KeptRows(Protocol):
    """Where rows are kept; `done` are the numbers of those that were there."""

    done: frozenset[int]

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep rows; when it returns they are safe."""

    def close(self) -> None: ...


def open_rows(path: Path, job: Mapping[str, Any], columns: Columns) -> KeptRows:
    """Lines where `path` ends in .jsonl, else parts. Raises RequestError where it holds another job, or anything else."""
    kind = Lines if path.suffix == LINES else Parts
    try:
        return kind(path, dict(job), columns)
    except OSError as error:
        raise RequestError(f"{path} cannot be written ({error.strerror}): name another place for the results") from error


class Lines:
    """A file of JSON lines, the job before the rows."""

    def __init__(self, path: Path, job: dict[str, Any], columns: Columns):
        self._names = [ROW, *columns, ERROR]
        kept = self._read(path, job) if path.exists() and path.stat().st_size else []
        self.done = frozenset(row[ROW] for row in kept)
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.write_text("".join(json.dumps(line) + "\n" for line in (job, *kept)))
        new.replace(path)
        self._file = path.open("a")

    def _read(self, path: Path, job: dict[str, Any]) -> list[dict[str, Any]]:
        whole = path.read_bytes().rpartition(b"\n")[0]  # a last line without its end was being written when the job stopped
        try:
            first, *rows = map(json.loads, whole.splitlines())
            kept = [row for row in rows if row[ERROR] is None and isinstance(row[ROW], int)]
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{path} does not hold results: name another file, or remove it") from error
        _check_job(path, first, job)
        return kept

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._file.write("".join(json.dumps({name: row.get(name) for name in self._names}) + "\n" for row in rows))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Parts:
    """A folder of Parquet files, each of which appears whole, and the job beside them."""

    def __init__(self, path: Path, job: dict[str, Any], columns: Columns):
        self.path = path
        self._schema = pa.schema({ROW: pa.int64(), **columns, ERROR: pa.string()})
        path.mkdir(parents=True, exist_ok=True)
        if (path / JOB).exists():
            _check_job(path, json.loads((path / JOB).read_text()), job)
        elif any(path.iterdir()):
            raise RequestError(f"{path} holds other files: name an empty folder, or a new one")
        else:
            (path / JOB).write_text(json.dumps(job) + "\n")
        done: list[int] = []
        parts = sorted(path.glob("part-*.parquet"))
        for part in parts:
            done += self._kept(part)
        self.done = frozenset(done)
        self._next = int(parts[-1].stem.partition("-")[2]) + 1 if parts else 0

    def _kept(self, part: Path) -> list[int]:
        """The numbers of its rows; those that failed are taken out."""
        table = pq.read_table(part)
        good = table.filter(table[ERROR].is_null())
        if len(good) < len(table):
            self._write(good, part)
        return list(good[ROW].to_pylist())

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            self._write(pa.Table.from_pylist([dict(row) for row in rows], schema=self._schema), self._part(self._next))
            self._next += 1

    def _part(self, number: int) -> Path:
        return self.path / f"part-{number:06d}.parquet"

    def _write(self, table: pa.Table, part: Path) -> None:
        scratch = part.with_name(f".{part.name}.{os.getpid()}")
        pq.write_table(table, scratch)
        scratch.replace(part)

    def close(self) -> None:
        pass


def _check_job(path: Path, found: Any, job: dict[str, Any]) -> None:
    if not isinstance(found, dict):
        raise RequestError(f"{path} does not hold results: name another, or remove it")
    if differing := sorted(key for key in job | found if key not in found or key not in job or found[key] != job[key]):
        raise RequestError(f"{path} holds another job (other {', '.join(differing)}): name another, or remove it")

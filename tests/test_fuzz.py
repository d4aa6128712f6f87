"""Readers of headers: what is well formed reads back; what is not is refused in one line, and harms nothing."""

from __future__ import annotations

import json
import math
import struct
import warnings
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from fuzz import (
    ARRAY,
    PARSERS,
    SCALARS,
    STRING,
    Files,
    GGUFTensor,
    Parser,
    check,
    gguf_bytes,
    gguf_value,
    run,
    safetensors_bytes,
    try_inputs,
)
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.errors import CheckpointError
from checkpoints.gguf_header import read_header
from checkpoints.safetensors import DTYPES, SafetensorsSource

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all examples of a property."""
    return tmp_path_factory.mktemp("fuzz")


@settings(deadline=None)
@given(
    tensors=st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), st.tuples(st.sampled_from(list(DTYPES)), SHAPES)),
    metadata=st.none() | st.dictionaries(NAMES, NAMES),
    spaces=st.integers(0, 9),
    seed=st.integers(0, 9),
)
def test_every_safetensors_header_reads_back(
    folder: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None, spaces: int, seed: int
) -> None:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    parts: dict[str, bytes] = {}
    for name, (dtype, shape) in tensors.items():
        first = sum(map(len, parts.values()))
        parts[name] = Random(seed).randbytes(math.prod(shape) * DTYPES[dtype].itemsize)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [first, first + len(parts[name])]}
    data = safetensors_bytes(json.dumps(header).encode() + b" " * spaces, b"".join(parts.values()))
    (folder / "model.safetensors").write_bytes(data)
    source = SafetensorsSource(folder)
    assert {name: (info.dtype, info.shape) for name, info in source.tensors.items()} == tensors
    for name, part in parts.items():
        box = source.read(name, tuple(slice(0, size) for size in tensors[name][1]))
        assert (box.dtype, box.tobytes()) == (DTYPES[tensors[name][0]], part)


def _scalar(kind: int) -> st.SearchStrategy[Any]:
    if kind == STRING:
        return NAMES
    if kind == 7:
        return st.booleans()
    if kind in (6, 12):
        return st.floats(width=32 if kind == 6 else 64, allow_nan=False)
    bits, signed = 8 * struct.calcsize(SCALARS[kind]), SCALARS[kind][1].islower()
    return st.integers(-(1 << bits - 1) if signed else 0, (1 << bits - signed) - 1)


def _typed(kinds: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, Any]]:
    return kinds.flatmap(lambda kind: st.tuples(st.just(kind), _scalar(kind)))


def _arrays(kinds: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, Any]]:
    inner = kinds.flatmap(lambda kind: st.tuples(st.just(kind), st.lists(_scalar(kind), max_size=5)))
    nested = st.tuples(st.just(ARRAY), st.lists(inner, max_size=3))
    return (inner | nested).map(lambda value: (ARRAY, value))


KINDS = st.sampled_from([*SCALARS, STRING])
STORED = st.sampled_from([Kind.F32, Kind.BF16, Kind.Q8_0, Kind.Q4_K])


def _plain(kind: int, value: Any) -> Any:
    return [_plain(value[0], item) for item in value[1]] if kind == ARRAY else value


@settings(deadline=None)
@given(
    metadata=st.dictionaries(NAMES.filter(lambda key: key != "general.alignment"), _typed(KINDS) | _arrays(KINDS), max_size=5),
    tensors=st.dictionaries(NAMES, st.tuples(STORED, st.lists(st.integers(0, 3), min_size=1, max_size=4)), max_size=4),
    align=st.sampled_from([1, 32, 256]),
)
def test_every_gguf_header_reads_back(
    metadata: dict[str, tuple[int, Any]], tensors: dict[str, tuple[Kind, list[int]]], align: int
) -> None:
    table, data = [], b""
    for name, (kind, sizes) in tensors.items():
        block, size = GGML_QUANT_SIZES[kind]
        shape = (*sizes[:-1], sizes[-1] * block)
        table.append(GGUFTensor(name, shape, kind.value, len(data)))
        data += bytes(math.prod(shape) // block * size)
        data += bytes(-len(data) % align)
    values = [(key, kind, gguf_value(kind, value)) for key, (kind, value) in metadata.items()]
    whole = gguf_bytes([("general.alignment", 4, struct.pack("<I", align)), *values], table, data, align)
    header = read_header(np.frombuffer(whole, np.uint8), Path("x.gguf"))
    expected = {key: _plain(kind, value) for key, (kind, value) in metadata.items()}
    assert header.metadata == {"general.alignment": align} | expected
    start = len(whole) - len(data)
    assert {name: (entry.shape, entry.type, entry.first - start) for name, entry in header.tensors.items()} == {
        name: (shape, Kind(kind), offset) for name, shape, kind, offset in table
    }


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(["safetensors", "index", "gguf", "torch", "config", "generation"]),
    edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 20), st.binary(max_size=20)), max_size=4),
)
def test_any_edit_of_a_file_is_opened_or_refused(valid: dict[str, Files], name: str, edits: list[tuple[int, int, bytes]]) -> None:
    files = valid[name]
    file, _ = files.choices[0]
    data = files.whole[file]
    for at, length, piece in edits:
        data = data[:at] + piece + data[at + length :]
    with warnings.catch_warnings(action="ignore"):
        assert files.try_bytes(file, data) in ("accepted", "refused")


@pytest.fixture(scope="module")
def valid(folder: Path) -> dict[str, Files]:
    return {name: Files(parser, folder / name) for name, parser in PARSERS.items()}


@pytest.mark.parametrize("name", PARSERS)
def test_a_few_hundred_inputs_of_each_reader(tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings(action="ignore"):
        results = list(try_inputs(name, tmp_path, 0, 300, seed=1))
    assert set(results) == {"accepted", "refused"}


@pytest.mark.parametrize("name", ["safetensors", "gguf", "config", "torch"])
def test_a_number_makes_the_same_input_again(valid: dict[str, Files], name: str) -> None:
    ((file, change),) = valid[name].choices
    made = [[change(Random(number), valid[name].whole[file]) for number in range(50)] for _ in range(2)]
    assert made[0] == made[1]


def test_what_breaks_the_contract_is_found(tmp_path: Path) -> None:
    def failing(error: Exception) -> Any:
        def open(folder: Path) -> None:
            raise error

        return open

    (tmp_path / "x").touch()
    for error, finding in [
        (KeyError("x"), "KeyError at test_fuzz.py"),
        (CheckpointError("x is wrong; fetch it again"), "does not name the file"),
        (CheckpointError(f"{tmp_path}: MemoryError; fetch it again"), "finding"),
        (MemoryError(), "MemoryError"),
    ]:
        assert finding in check(Parser(lambda folder: None, {}, failing(error)), tmp_path)


def test_the_program_counts_what_became_of_them() -> None:
    counts, findings = run("config", 50, seed=0)
    assert sum(counts.values()) == 50 and not findings

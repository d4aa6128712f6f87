"""Tensors -> safetensors files that transformers opens, written front to back in pieces.

Format: https://huggingface.co/docs/safetensors. The header, with every offset, comes first: shapes and dtypes are known before
any number is. A file has its name once it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from checkpoints.copying import contiguous
from checkpoints.safetensors import INDEX, NAMES, SINGLE
from checkpoints.target import Entry, Piece, Target


class SafetensorsFiles(Target):
    """Files as transformers has them, of at most so many bytes, and their index."""

    def __init__(self, entries: Iterable[Entry], most: int):
        super().__init__(split(entries, most))

    def is_whole(self, folder: Path, name: str) -> bool:
        return is_whole(folder / name, self.groups[name])

    def write(self, folder: Path, name: str, pieces: Iterator[Piece]) -> None:
        write_file(folder / name, self.groups[name], (piece.numbers for piece in pieces))

    def end(self, folder: Path) -> None:
        write_index(folder, self.groups)


def split(entries: Iterable[Entry], most: int) -> dict[str, list[Entry]]:
    """File names, as transformers has them, and the tensors of each: in order, at most `most` bytes, or one larger tensor."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def header(entries: list[Entry]) -> bytes:
    """The header with which a file of these tensors begins."""
    values: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        offsets = [at, at + entry.nbytes]
        values[entry.name] = {"dtype": NAMES[entry.dtype.name], "shape": entry.shape, "data_offsets": offsets}
        at += entry.nbytes
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, entries: list[Entry], pieces: Iterable[np.ndarray]) -> None:
    """`pieces` are the tensors' numbers, in order, each piece within one tensor. Raises OSError."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(header(entries))
        for piece in pieces:
            file.write(contiguous(piece).reshape(-1).view(np.uint8).data)
    expected = len(header(entries)) + sum(entry.nbytes for entry in entries)
    assert part.stat().st_size == expected, f"{part} has {part.stat().st_size} bytes, not {expected}"
    part.replace(path)


def is_whole(path: Path, entries: list[Entry]) -> bool:
    """Whether `write_file` has finished this file with these tensors."""
    begin = header(entries)
    if not path.is_file() or path.stat().st_size != len(begin) + sum(entry.nbytes for entry in entries):
        return False
    with open(path, "rb") as file:
        return file.read(len(begin)) == begin


def write_index(folder: Path, files: dict[str, list[Entry]]) -> None:
    """Write the index of which file holds which tensor, where there are several files."""
    if list(files) == [SINGLE]:
        return
    total = sum(entry.nbytes for entries in files.values() for entry in entries)
    weight_map = {entry.name: file for file, entries in files.items() for entry in entries}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")

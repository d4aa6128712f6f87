"""Two checkpoints of any two formats -> their differences, parameter by parameter.

Tensors are compared as the parameters that they fill, unpadded: names and axis orders of the formats fall away. A parameter is
read in slices of bounded size from both sides at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from checkpoints.checkpoint import Checkpoint
from checkpoints.view import View


@dataclass(frozen=True)
class Compared:
    """One parameter on both sides.

    Attributes:
      tensors, dtypes: each side's tensor, the first of a stack, and the format's own name of its dtype; None where the side
        has none.
      equal: the same numbers to the last bit; numbers of different dtypes can be.
      largest: the largest difference of two numbers; None where shapes or one side is missing. NaN beside a number is infinite.
    """

    parameter: str
    tensors: tuple[str | None, str | None]
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[str | None, str | None]
    equal: bool
    largest: float | None

    @property
    def verdict(self) -> str:
        if None in self.tensors:
            return f"only in {'A' if self.tensors[0] else 'B'}"
        if self.shapes[0] != self.shapes[1]:
            return f"shapes differ: {self.shapes[0]} and {self.shapes[1]}"
        if self.equal:
            return "equal" if self.dtypes[0] == self.dtypes[1] else "equal numbers, other dtype"
        return f"differs by up to {self.largest:.3g}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict}


def differing_config(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Fields of the architecture that differ, with both values. The dtype is the tensors' own."""
    pairs = [(f.name, getattr(a.config, f.name), getattr(b.config, f.name)) for f in fields(a.config) if f.name != "dtype"]
    return [f"{name}: {first!r} and {second!r}" for name, first, second in pairs if first != second]


def compare(a: Checkpoint, b: Checkpoint, *, rounded: bool = False) -> Iterator[Compared]:
    """Every parameter that either side has a tensor for, then the tensors that fill none.

    `rounded`: A's numbers are rounded to B's dtype first.
    """
    first, second = View(a), View(b)
    for path in dict.fromkeys([*first.by_param, *second.by_param]):
        yield _compare(path, first, second, rounded)
    for name in first.extra:
        info = first.source.tensors[name]
        yield Compared(name, (name, None), (info.shape, None), (info.dtype, None), False, None)
    for name in second.extra:
        info = second.source.tensors[name]
        yield Compared(name, (None, name), (None, info.shape), (None, info.dtype), False, None)


def _compare(path: str, a: View, b: View, rounded: bool) -> Compared:
    names: list[str | None] = []
    shapes: list[tuple[int, ...] | None] = []
    dtypes: list[str | None] = []
    for side in (a, b):
        there = path in side.by_param
        names.append(side.by_param[path].tensors[0] if there else None)
        shapes.append(side.shape(path) if there else None)
        dtypes.append(side.info(path).dtype if there else None)
    equal, largest = False, None
    if shapes[0] is not None and shapes[0] == shapes[1]:
        equal, largest = _in_slices(path, a, b, rounded)
    return Compared(path, (names[0], names[1]), (shapes[0], shapes[1]), (dtypes[0], dtypes[1]), equal, largest)


def _in_slices(path: str, a: View, b: View, rounded: bool) -> tuple[bool, float]:
    equal, largest = True, 0.0
    for bounds in a.boxes(path, b.by_param[path].pattern):
        x, y = a.read(path, bounds), b.read(path, bounds)
        same, difference = _difference(x.astype(y.dtype) if rounded else x, y)
        equal, largest = equal and same, max(largest, difference)
    return equal, largest


def _difference(x: np.ndarray, y: np.ndarray) -> tuple[bool, float]:
    """Whether these are the same bits, or in different dtypes the same numbers; and the largest difference of two."""
    same_dtype = x.dtype == y.dtype
    if same_dtype and np.array_equal(x.view(f"u{x.dtype.itemsize}"), y.view(f"u{y.dtype.itemsize}")):
        return True, 0.0
    wide = np.float64 if max(x.dtype.itemsize, y.dtype.itemsize) > 4 else np.float32
    x, y = x.astype(wide), y.astype(wide)
    nan = np.isnan(x)
    if not np.array_equal(nan, np.isnan(y)):
        return False, float("inf")
    differs = (x != y) & ~nan
    equal = not same_dtype and not differs.any() and np.array_equal(np.signbit(x), np.signbit(y))
    return equal, float(np.abs(x[differs] - y[differs]).max(initial=0.0))

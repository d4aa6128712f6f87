"""Two checkpoints of any two formats -> what differs, parameter by parameter.

Tensors are compared as the parameters that they fill, unpadded: names and axis orders of the formats fall away. A parameter is
read in slices of bounded size from both sides at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import CheckpointError
from checkpoints.names import axis_sizes

SLICE = 1 << 24  # numbers compared at a time


@dataclass(frozen=True)
class Compared:
    """One parameter on both sides.

    Attributes:
      tensors, dtypes: the tensor that each side fills it with, and the format's own name of its dtype; None where it has none.
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


def compare(a: Checkpoint, b: Checkpoint) -> Iterator[Compared]:
    """Every parameter that either side has a tensor for, then the tensors that fill none."""
    first, second = _Side(a), _Side(b)
    for path in dict.fromkeys([*first.by_param, *second.by_param]):
        yield _compare(path, first, second)
    for name in sorted(first.extra):
        info = first.source.tensors[name]
        yield Compared(name, (name, None), (info.shape, None), (info.dtype, None), False, None)
    for name in sorted(second.extra):
        info = second.source.tensors[name]
        yield Compared(name, (None, name), (None, info.shape), (None, info.dtype), False, None)


class _Side:
    """A checkpoint's parameters by path: the tensor and the pattern that fill each. `extra` are tensors that fill none."""

    def __init__(self, checkpoint: Checkpoint):
        self.source, self.sizes = checkpoint.source, axis_sizes(checkpoint.config)
        tensors, rules = self.source.tensors, checkpoint.rules
        pairs = rules.by_parameter(checkpoint.config.num_layers)
        self.by_param = {path: pair for path, pair in pairs.items() if pair[0] in tensors}
        used = {tensor for tensor, _ in self.by_param.values()}
        self.extra = {name for name in tensors if name not in used and not rules.is_ignored(name)}
        if checkpoint.config.tied_head:
            self.by_param.pop("head", None)  # where it is there it is the embedding again: the loader holds it to that

    def shape(self, path: str) -> tuple[int, ...]:
        """Of the parameter. Raises CheckpointError where its tensor is not of the shape that the config gives."""
        tensor, pattern = self.by_param[path]
        expected, found = pattern.tensor_shape(self.sizes), self.source.tensors[tensor].shape
        if expected != found:
            raise CheckpointError(f"{self.source.where}: {tensor} is {found}, not {expected}; correct the config")
        return pattern.param_shape(self.sizes)

    def read(self, path: str, axis: str, bounds: tuple[int, int]) -> np.ndarray:
        """A range of the parameter's `axis`, which leads one of its tensor's dimensions."""
        tensor, pattern = self.by_param[path]
        box = self.source.read(tensor, pattern.tensor_slices({axis: bounds}, self.sizes))
        return pattern.forward(box, self.sizes | {axis: bounds[1] - bounds[0]})


def _compare(path: str, a: _Side, b: _Side) -> Compared:
    names: list[str | None] = []
    shapes: list[tuple[int, ...] | None] = []
    dtypes: list[str | None] = []
    for side in (a, b):
        there = path in side.by_param
        names.append(side.by_param[path][0] if there else None)
        shapes.append(side.shape(path) if there else None)
        dtypes.append(side.source.tensors[side.by_param[path][0]].dtype if there else None)
    equal, largest = False, None
    if shapes[0] is not None and shapes[0] == shapes[1]:
        equal, largest = _in_slices(path, a, b, math.prod(shapes[0]))
    return Compared(path, (names[0], names[1]), (shapes[0], shapes[1]), (dtypes[0], dtypes[1]), equal, largest)


def _in_slices(path: str, a: _Side, b: _Side, numbers: int) -> tuple[bool, float]:
    (_, one), (_, other) = a.by_param[path], b.by_param[path]
    axis = next(group[0] for group in one.tensor_dims if other.leads(group[0]))
    count = a.sizes[axis]
    step = max(1, count * SLICE // numbers)
    equal, largest = True, 0.0
    for at in range(0, count, step):
        bounds = (at, min(at + step, count))
        same, difference = _difference(a.read(path, axis, bounds), b.read(path, axis, bounds))
        equal, largest = equal and same, max(largest, difference)
    return equal, largest


def _difference(x: np.ndarray, y: np.ndarray) -> tuple[bool, float]:
    """Are these the same bits, or in different dtypes the same numbers; and the largest difference of two."""
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

"""Rearrangements of a checkpoint's tensor into a parameter and back: axes split, merged, permuted.

A slice of a parameter is a slice of a tensor (loading touches only the bytes it needs), and a whole parameter is a tensor again
(export).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from checkpoints.copying import contiguous

Group = tuple[str, ...]  # the axes merged into one dimension, outermost first
Bounds = Mapping[str, tuple[int, int]]
"""Axis -> [first, last)."""

_SIDE = re.compile(r"(?:\(\s*\w+(?:\s+\w+)*\s*\)|\w+)(?:\s+(?:\(\s*\w+(?:\s+\w+)*\s*\)|\w+))*")


@dataclass(frozen=True)
class TensorSlice:
    """The positions along one axis of a tensor that belong to one of the several parameters it fills.

    Attributes:
      axis: the axis of the tensor.
      skip: so many positions come before, or as many as these axes have.
      size: the parameter's axis that they are; None: it is one position, and no axis of the parameter.
    """

    axis: str
    skip: int | tuple[str, ...]
    size: str | None = None

    def first(self, sizes: Mapping[str, int]) -> int:
        """Index of its first position along the axis."""
        return self.skip if isinstance(self.skip, int) else sum(sizes[axis] for axis in self.skip)


@dataclass(frozen=True)
class Pattern:
    """An invertible rearrangement such as `(n h) d -> d (n h)`: the tensor's dimensions, then the parameter's.

    Attributes:
      tensor_slice: the positions of the tensor that are the parameter's; None: all.
      stacked: an axis of the parameter of which the tensor is one position.

    Raises ValueError when the text is not of that form, or when the two sides do not name the same axes once each.
    """

    text: str
    tensor_slice: TensorSlice | None = None
    stacked: str | None = None

    def __post_init__(self) -> None:
        left, right = self._atoms, _atoms(self.param_dims)
        only = {self.stacked, self.tensor_slice.axis if self.tensor_slice and not self.tensor_slice.size else None}
        if len(set(left)) != len(left) or sorted({*left} - only) != sorted({*right} - only) or len(set(right)) != len(right):
            raise ValueError(f"pattern {self.text!r} must name the same axes once on each side")

    @cached_property
    def tensor_dims(self) -> tuple[Group, ...]:
        return self._side(0)

    @cached_property
    def param_dims(self) -> tuple[Group, ...]:
        return self._side(1)

    @cached_property
    def _atoms(self) -> list[str]:
        """The tensor's axes by the parameter's names for them."""
        return [self._own(axis) for axis in _atoms(self.tensor_dims)]

    def _own(self, axis: str) -> str:
        return (self.tensor_slice.size or axis) if self.tensor_slice and axis == self.tensor_slice.axis else axis

    def _side(self, which: int) -> tuple[Group, ...]:
        sides = [side.strip() for side in self.text.split("->")]
        if len(sides) != 2 or not all(_SIDE.fullmatch(side) for side in sides):
            raise ValueError(f"pattern {self.text!r} is not of the form '(a b) c -> a b c'")
        return tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\w+", sides[which]))

    def tensor_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return _shape(self.tensor_dims, sizes)

    def param_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return _shape(self.param_dims, sizes)

    def begin(self, bounds: Bounds, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Where the part of the parameter within `bounds`, of axes that lead its dimensions, begins in it."""
        return tuple(bounds.get(axis, (0, 0))[0] * math.prod(sizes[one] for one in inner) for axis, *inner in self.param_dims)

    def leading(self) -> list[str]:
        """The parameter's axes of which a range is a range of one of the tensor's dimensions."""
        single = self.tensor_slice.axis if self.tensor_slice and not self.tensor_slice.size else None
        groups = [[axis for axis in group if axis != single] if group[0] == single else list(group) for group in self.tensor_dims]
        return [self._own(group[0]) for group in groups if group]

    def read(self, tensor: Callable[[tuple[slice, ...]], np.ndarray], bounds: Bounds, sizes: Mapping[str, int]) -> np.ndarray:
        """The part of the parameter within `bounds`, of a tensor that gives its boxes. A view where numpy can."""
        slices: list[slice] = []
        shape: list[int] = []
        select: list[slice] = []
        for group in self.tensor_dims:
            whole, ranges = [sizes[axis] for axis in group], [self._range(axis, bounds, sizes) for axis in group]
            # The first axis of which more than one position is wanted: with those before it, a range of the dimension.
            lead = next((i for i, (low, high) in enumerate(ranges) if high - low != 1), len(group) - 1)
            first = sum(low * math.prod(whole[i + 1 :]) for i, (low, _) in enumerate(ranges[: lead + 1]))
            count = ranges[lead][1] - ranges[lead][0]
            slices.append(slice(first, first + count * math.prod(whole[lead + 1 :])))
            shape += [1] * lead + [count] + whole[lead + 1 :]
            select += [slice(None)] * (lead + 1) + [slice(*one) for one in ranges[lead + 1 :]]
        split = tensor(tuple(slices)).reshape(shape)[tuple(select)]
        return _ordered(split, self._atoms, self.param_dims)

    def _range(self, axis: str, bounds: Bounds, sizes: Mapping[str, int]) -> tuple[int, int]:
        """Which positions of an axis of the tensor are wanted."""
        own = self.tensor_slice
        if own is None or axis != own.axis:
            return bounds.get(axis, (0, sizes[axis]))
        first = own.first(sizes)
        low, high = (0, 1) if own.size is None else bounds.get(own.size, (0, sizes[own.size]))
        return first + low, first + high

    def split(self, param: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """A parameter, or a part of it of these sizes, in the tensor's order, with a dimension for each of the tensor's axes."""
        order = _atoms(self.param_dims)
        one = {self.stacked: 1}
        return _ordered(param.reshape([one.get(axis, sizes[axis]) for axis in order]), order, [(axis,) for axis in self._atoms])

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor, or a part of it, from the outputs of `split` for all the parameters that it fills."""
        together = parts[0]
        if self.tensor_slice is not None:
            together = np.concatenate(parts, axis=_atoms(self.tensor_dims).index(self.tensor_slice.axis))
        lengths = iter(together.shape)
        return _merged(together, [math.prod(next(lengths) for _ in group) for group in self.tensor_dims])


def _atoms(dims: Sequence[Group]) -> list[str]:
    return [axis for group in dims for axis in group]


def _shape(dims: Sequence[Group], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[axis] for axis in group) for group in dims)


def _ordered(x: np.ndarray, order: list[str], dims: Sequence[Group]) -> np.ndarray:
    """`x` has a dimension for each axis of `order` -> these dimensions. An axis on one side only has one position."""
    target = _atoms(dims)
    missing = [axis for axis in target if axis not in order]
    x, order = x.reshape((*x.shape, *[1] * len(missing))), order + missing
    rest = [axis for axis in order if axis not in target]
    sizes = dict(zip(order, x.shape, strict=True))
    return _merged(x.transpose([order.index(axis) for axis in target + rest]), _shape(dims, sizes))


def _merged(x: Any, shape: Sequence[int]) -> Any:
    """An array of numpy's, or of jax's in what is compiled: XLA copies what it has to."""
    try:
        return x.reshape(shape, copy=False) if isinstance(x, np.ndarray) else x.reshape(shape)
    except ValueError:  # axes that were apart are merged
        return contiguous(x).reshape(shape)

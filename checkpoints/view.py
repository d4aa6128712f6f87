"""A checkpoint as the parameters that its tensors fill, unpadded, whatever its format calls and orders them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import CheckpointError
from checkpoints.names import axis_sizes
from checkpoints.pattern import Bounds, Pattern
from checkpoints.source import TensorInfo

SLICE = 1 << 24  # numbers read at a time


class View:
    """A reader of parameters by path.

    Attributes:
      by_param: path -> its tensors, for parameters whose tensors are all there. A tied head is not among them.
      extra: tensors that fill no parameter.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.source, self.sizes = checkpoint.source, axis_sizes(checkpoint.config)
        tensors, rules = self.source.tensors, checkpoint.rules
        mappings = rules.by_parameter(checkpoint.config)
        self.by_param = {path: mapping for path, mapping in mappings.items() if all(name in tensors for name in mapping.tensors)}
        used = {tensor for mapping in self.by_param.values() for tensor in mapping.tensors}
        self.extra = sorted(name for name in tensors if name not in used and not rules.is_ignored(name))
        if checkpoint.config.tied_head:
            self.by_param.pop("head.weight", None)  # where it is there it is the embedding again: the loader holds it to that

    def info(self, path: str) -> TensorInfo:
        """Information on the tensor that fills a parameter, or on the first of them."""
        return self.source.tensors[self.by_param[path].tensors[0]]

    def dtypes(self, path: str) -> set[str]:
        """Dtypes of all tensors that fill a parameter, by the format's own names."""
        return {self.source.tensors[tensor].dtype for tensor in self.by_param[path].tensors}

    def shape(self, path: str) -> tuple[int, ...]:
        """The parameter's shape. Raises CheckpointError where its tensor is not of the shape that the config gives."""
        tensors, pattern = self.by_param[path]
        expected = pattern.tensor_shape(self.sizes)
        for tensor in tensors:
            self.source.require_usable(tensor)
            if (found := self.source.tensors[tensor].shape) != expected:
                raise CheckpointError(f"{self.source.where}: {tensor} is {found}, not {expected}; correct the config")
        return pattern.param_shape(self.sizes)

    def slices(self, axis: str, numbers: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """Ranges of an axis of so many numbers that are read at a time, in order, of a multiple of so many but for the last."""
        count = self.sizes[axis]
        step = count * SLICE // max(numbers, 1)
        step = max(1, step // multiple) * multiple
        for first in range(0, count, step):
            yield first, min(first + step, count)

    def boxes(self, path: str, other: Pattern, chunk: Sequence[int] = ()) -> Iterator[Bounds]:
        """Parts of a parameter that are read at a time: ranges that lie together in its tensor, and are ranges of the other's.

        They are multiples of a chunk, but at the edges.
        """
        pattern, dims = self.by_param[path].pattern, other.param_dims
        stack = [axis for (axis,) in dims[:-2]]
        axis = next(axis for axis in pattern.leading() if axis in other.leading() and axis not in stack)
        multiple = 1
        for (outer, *inner), step in zip(dims, chunk, strict=False):
            if outer == axis:
                multiple = step // math.gcd(step, math.prod(self.sizes[one] for one in inner))
        counts = [self.sizes[one] for one in stack]
        numbers = math.prod(self.shape(path)) // math.prod(counts)
        for place in np.ndindex(*counts):
            at = {one: (i, i + 1) for one, i in zip(stack, place, strict=True)}
            for bounds in self.slices(axis, numbers, multiple):
                yield at | {axis: bounds}

    def read(self, path: str, bounds: Bounds) -> np.ndarray:
        """The part of the parameter within `bounds`."""
        return self.by_param[path].read(self.source, bounds, self.sizes)

"""A checkpoint as the parameters that its tensors fill, unpadded, whatever its format calls and orders them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import CheckpointError
from checkpoints.names import axis_sizes
from checkpoints.source import TensorInfo

SLICE = 1 << 24  # numbers read at a time


class View:
    """Reads parameters by path.

    Attributes:
      by_param: path -> the tensor that fills it, and how, of those that the checkpoint holds. A tied head is not among them.
      extra: tensors that fill no parameter.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.source, self.sizes = checkpoint.source, axis_sizes(checkpoint.config)
        tensors, rules = self.source.tensors, checkpoint.rules
        pairs = rules.by_parameter(checkpoint.config.num_layers)
        self.by_param = {path: pair for path, pair in pairs.items() if pair[0] in tensors}
        used = {tensor for tensor, _ in self.by_param.values()}
        self.extra = sorted(name for name in tensors if name not in used and not rules.is_ignored(name))
        if checkpoint.config.tied_head:
            self.by_param.pop("head", None)  # where it is there it is the embedding again: the loader holds it to that

    def info(self, path: str) -> TensorInfo:
        """Of the tensor that fills a parameter."""
        return self.source.tensors[self.by_param[path][0]]

    def shape(self, path: str) -> tuple[int, ...]:
        """Of the parameter. Raises CheckpointError where its tensor is not of the shape that the config gives."""
        tensor, pattern = self.by_param[path]
        expected, found = pattern.tensor_shape(self.sizes), self.source.tensors[tensor].shape
        if expected != found:
            raise CheckpointError(f"{self.source.where}: {tensor} is {found}, not {expected}; correct the config")
        return pattern.param_shape(self.sizes)

    def slices(self, path: str, axis: str, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """Ranges of a parameter's `axis` that are read at a time, in order, of a multiple of so many but for the last.

        It leads a dimension of the parameter's tensor.
        """
        count = self.sizes[axis]
        step = count * SLICE // max(math.prod(self.shape(path)), 1)
        step = max(1, step // multiple) * multiple
        for first in range(0, count, step):
            yield first, min(first + step, count)

    def read(self, path: str, axis: str, bounds: tuple[int, int]) -> np.ndarray:
        """One of these ranges of the parameter."""
        tensor, pattern = self.by_param[path]
        assert pattern.leads(axis), (path, axis)
        box = self.source.read(tensor, pattern.tensor_slices({axis: bounds}, self.sizes))
        return pattern.forward(box, self.sizes | {axis: bounds[1] - bounds[0]})

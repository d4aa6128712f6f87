"""Rules: how a checkpoint's tensors and the decoder's parameters correspond.

A rule only splits, merges and permutes axes, so it reads in both directions: a slice of a parameter is a slice of a
tensor (loading touches only the bytes it needs), and a whole parameter is a tensor again (export).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from checkpoints.copying import contiguous
from jaxllm.config import ModelConfig

Group = tuple[str, ...]  # the axes merged into one dimension, outermost first
Bounds = Mapping[str, tuple[int, int]]

_SIDE = re.compile(r"(?:\(\s*\w+(?:\s+\w+)*\s*\)|\w+)(?:\s+(?:\(\s*\w+(?:\s+\w+)*\s*\)|\w+))*")


@dataclass(frozen=True)
class Pattern:
    """An invertible rearrangement such as `(n h) d -> n h d`: the tensor's dimensions, then the parameter's.

    Raises ValueError when the text is not of that form, or when the two sides do not name the same axes once each.
    """

    text: str

    def __post_init__(self) -> None:
        left, right = _atoms(self.tensor_dims), _atoms(self.param_dims)
        if len(set(left)) != len(left) or sorted(left) != sorted(right):
            raise ValueError(f"pattern {self.text!r} must name the same axes once on each side")

    @cached_property
    def tensor_dims(self) -> tuple[Group, ...]:
        return self._side(0)

    @cached_property
    def param_dims(self) -> tuple[Group, ...]:
        return self._side(1)

    def _side(self, which: int) -> tuple[Group, ...]:
        sides = [side.strip() for side in self.text.split("->")]
        if len(sides) != 2 or not all(_SIDE.fullmatch(side) for side in sides):
            raise ValueError(f"pattern {self.text!r} is not of the form '(a b) c -> a b c'")
        return tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\w+", sides[which]))

    def tensor_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return _shape(self.tensor_dims, sizes)

    def param_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return _shape(self.param_dims, sizes)

    def forward(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Tensor -> parameter. A view where numpy can."""
        return _rearrange(tensor, self.tensor_dims, self.param_dims, sizes)

    def inverse(self, param: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Parameter -> tensor. A view where numpy can."""
        return _rearrange(param, self.param_dims, self.tensor_dims, sizes)

    def leads(self, axis: str) -> bool:
        """Whether a range of `axis` is a range of one of the tensor's dimensions."""
        return any(group[0] == axis for group in self.tensor_dims)

    def tensor_slices(self, bounds: Bounds, sizes: Mapping[str, int]) -> tuple[slice, ...]:
        """The box of the tensor that holds `bounds`, axis -> [first, last). Each of these axes leads its dimension."""
        slices = []
        for group in self.tensor_dims:
            first, last = bounds.get(group[0], (0, sizes[group[0]]))
            inner = math.prod(sizes[axis] for axis in group[1:])
            slices.append(slice(first * inner, last * inner))
        return tuple(slices)


def _atoms(dims: tuple[Group, ...]) -> list[str]:
    return [axis for group in dims for axis in group]


def _shape(dims: tuple[Group, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[axis] for axis in group) for group in dims)


def _rearrange(x: np.ndarray, source: tuple[Group, ...], target: tuple[Group, ...], sizes: Mapping[str, int]) -> np.ndarray:
    if x.shape != _shape(source, sizes):
        raise ValueError(f"an array of shape {x.shape} is not {source} with sizes {dict(sizes)}")
    order = _atoms(source)
    split = x.reshape([sizes[axis] for axis in order])
    moved = split.transpose([order.index(axis) for axis in _atoms(target)])
    try:
        return moved.reshape(_shape(target, sizes), copy=False)
    except ValueError:  # axes that were apart are merged
        return contiguous(moved).reshape(_shape(target, sizes))


@dataclass(frozen=True)
class Rule:
    """One tensor and the parameter it fills.

    Attributes:
      tensor: the tensor's name in the checkpoint, `{i}` for the layer.
      pattern: how its dimensions become the parameter's, over the axes of `axis_sizes`.
      param: the parameter's path in the decoder, `{i}` for the layer.
    """

    tensor: str
    pattern: Pattern
    param: str

    @classmethod
    def of(cls, tensor: str, pattern: str, param: str) -> Rule:
        return cls(tensor, Pattern(pattern), param)

    def expand(self, num_layers: int) -> list[tuple[str, str]]:
        """(tensor, parameter) of every layer, or the one pair of a rule outside the layers."""
        if "{i}" not in self.tensor:
            return [(self.tensor, self.param)]
        return [(self.tensor.format(i=i), self.param.format(i=i)) for i in range(num_layers)]


@dataclass(frozen=True)
class Rules:
    """A family's tensors in one format. `ignored` are regular expressions of tensors that hold no weights."""

    table: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()

    def by_parameter(self, num_layers: int) -> dict[str, tuple[str, Pattern]]:
        """Path of each parameter -> the tensor that fills it, and how; layer by layer, between what comes before and after."""
        layered = [i for i, rule in enumerate(self.table) if "{i}" in rule.tensor]
        order = sorted(
            (layer if i in layered else (num_layers if layered and i > layered[-1] else -1), i, tensor, param)
            for i, rule in enumerate(self.table)
            for layer, (tensor, param) in enumerate(rule.expand(num_layers))
        )
        return {param: (tensor, self.table[i].pattern) for _, i, tensor, param in order}

    def of_parameters(self) -> Rules:
        """The rules of a format that holds the same parameters as the decoder does, under their own paths."""
        sides = ((rule.param, rule.pattern.text.split("->")[1].strip()) for rule in self.table)
        return Rules(tuple(Rule.of(param, f"{side} -> {side}", param) for param, side in sides))

    def is_ignored(self, tensor: str) -> bool:
        return any(re.fullmatch(pattern, tensor) for pattern in self.ignored)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """What the letters of a family's patterns stand for, before padding.

    n query heads, k KV heads, h head size (c pairs of p = 2), d hidden size, f ffn, v vocabulary.
    """
    return {
        "n": config.num_heads,
        "k": config.num_kv_heads,
        "h": config.head_dim,
        "c": config.head_dim // 2,
        "p": 2,
        "d": config.hidden_size,
        "f": config.intermediate_size,
        "v": config.vocab_size,
    }

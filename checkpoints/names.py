"""Rules: which tensors of a checkpoint fill which parameters of the decoder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from checkpoints.copying import empty, fill
from checkpoints.pattern import Bounds, Pattern, TensorSlice
from checkpoints.source import Source
from jaxllm.config import ModelConfig


class TensorMapping(NamedTuple):
    """The tensors of one parameter: a single one, or a stack of them, one for each expert."""

    tensors: tuple[str, ...]
    pattern: Pattern

    def read(self, source: Source, bounds: Bounds, sizes: dict[str, int]) -> np.ndarray:
        """The part of the parameter within `bounds`."""
        axis = self.pattern.stacked
        first, last = bounds.get(axis, (0, len(self.tensors))) if axis else (0, 1)
        parts = [
            self.pattern.read(lambda box, name=name: source.read(name, box), bounds, sizes)  # type: ignore[misc]
            for name in self.tensors[first:last]
        ]
        if len(parts) == 1:
            return parts[0]
        assert self.pattern.param_dims[0] == (axis,), "a stack's own axis is the outermost"
        stack = empty((len(parts), *parts[0].shape[1:]), np.result_type(*parts))
        for i, part in enumerate(parts):
            fill(stack[i : i + 1], part)
        return stack


@dataclass(frozen=True)
class Rule:
    """One tensor and the parameter it fills.

    Attributes:
      tensor: the tensor's name in the checkpoint, `{i}` for the layer, `{e}` for the expert.
      pattern: the rearrangement of its dimensions into the parameter's, over the axes of `axis_sizes`.
      param: the parameter's path in the decoder, `{i}` for the layer.
    """

    tensor: str
    pattern: Pattern
    param: str

    @classmethod
    def of(cls, tensor: str, pattern: str, param: str, tensor_slice: TensorSlice | None = None) -> Rule:
        return cls(tensor, Pattern(pattern, tensor_slice, "e" if "{e}" in tensor else None), param)

    def expand(self, num_layers: int, num_experts: int = 0) -> list[tuple[tuple[str, ...], str]]:
        """(tensors, parameter) of every layer, or the one pair of a rule outside the layers."""
        experts = range(num_experts if self.pattern.stacked else 1)
        layers = range(num_layers if "{i}" in self.tensor else 1)
        return [(tuple(self.tensor.format(i=i, e=e) for e in experts), self.param.format(i=i)) for i in layers]


_MATRIX = r"(?:query|key|value|out|gate|up|down|router|shared_gate)"
# Paths that parameters had before a matrix and its bias were one module.
EARLIER = (
    (rf"(blocks\..*\.{_MATRIX})_bias", r"\1.bias"),
    (rf"(blocks\..*\.{_MATRIX}|embedding|head|project_in|project_out)", r"\1.weight"),
)


@dataclass(frozen=True)
class Rules:
    """A family's tensors in one format.

    Attributes:
      ignored: regular expressions of tensors that hold no weights.
      renamed: regular expressions of names that some files have, and the table's names for them.
    """

    table: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()

    def by_parameter(self, config: ModelConfig) -> dict[str, TensorMapping]:
        """Path of each parameter -> its tensors and pattern; layer by layer, between what comes before and after."""
        layers, experts = config.num_layers, config.experts.count if config.experts else 0
        layered = [i for i, rule in enumerate(self.table) if "{i}" in rule.tensor]
        order = sorted(
            (layer if i in layered else (layers if layered and i > layered[-1] else -1), i, tensors, param)
            for i, rule in enumerate(self.table)
            for layer, (tensors, param) in enumerate(rule.expand(layers, experts))
        )
        return {param: TensorMapping(tensors, self.table[i].pattern) for _, i, tensors, param in order if tensors}

    def of_parameters(self) -> Rules:
        """The rules of a format that holds the same parameters as the decoder does, under their own paths."""
        sides = ((rule.param, rule.pattern.text.split("->")[1].strip()) for rule in self.table)
        return Rules(tuple(Rule.of(param, f"{side} -> {side}", param) for param, side in sides), renamed=EARLIER)

    def is_ignored(self, tensor: str) -> bool:
        return any(re.fullmatch(pattern, tensor) for pattern in self.ignored)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Sizes that the letters of a family's patterns stand for, before padding.

    n query heads, k KV heads, h head size (c pairs of p = 2), d hidden size, f ffn, v vocabulary, w embedding, y labels, l
    learned positions, e experts, m the ffn of each, s of the one they share; where they are stored together: a all heads, t
    queries, keys and values, u gate and up.
    """
    experts = config.experts
    return {
        "n": config.num_heads,
        "k": config.num_kv_heads,
        "h": config.head_dim,
        "c": config.head_dim // 2,
        "p": 2,
        "d": config.hidden_size,
        "f": config.intermediate_size,
        "v": config.vocab_size,
        "w": config.table_size,
        "y": config.labels or 0,
        "l": config.learned_positions,
        "e": experts.count if experts else 0,
        "m": experts.size if experts else 0,
        "s": experts.shared_size if experts else 0,
        "a": config.num_heads + 2 * config.num_kv_heads,
        "t": 3,
        "u": 2,
        "o": 1,
    }

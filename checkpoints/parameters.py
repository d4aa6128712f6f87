"""The decoder's parameters before they have values: names, axes, shapes, and which source index stands where.

A leaf of the decoder's state is a parameter, or several that are multiplied at once and so stand side by side
(`jaxllm.decoder.linear.Joint`); files know them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding

from jaxllm.config import ModelConfig
from jaxllm.decoder.model import Decoder
from sharding.layout import Axes, Layout
from sharding.padding import PAD, pad_heads, pad_tail


@dataclass(frozen=True)
class Parameter:
    """A matrix, a bias or a scale.

    Attributes:
      path: `blocks.3.attention.query.weight`.
      shape: the padded shape.
      axes: a logical axis name, or None, for each dimension.
      indices: for each dimension the source index at each padded position, or PAD; None for a dimension taken as it is.
    """

    path: str
    shape: tuple[int, ...]
    axes: Axes
    indices: tuple[np.ndarray | None, ...]

    @cached_property
    def source_shape(self) -> tuple[int, ...]:
        """The shape in the checkpoint, without padding and copies."""
        pairs = zip(self.shape, self.indices, strict=True)
        return tuple(size if index is None else int(index.max()) + 1 for size, index in pairs)


@dataclass(frozen=True)
class Leaf:
    """An array of the decoder's state.

    Attributes:
      shape: the padded shape.
      sharding: as it is stored on the devices.
      parts: the parameters in it, side by side along the last dimension: of each of `shares` devices the shares of all.
    """

    shape: tuple[int, ...]
    sharding: NamedSharding
    parts: tuple[Parameter, ...]
    shares: int

    def runs(self, columns: slice) -> Iterator[tuple[Parameter, slice, slice]]:
        """(part, where its columns stand in it, where among `columns`), in their order."""
        first, last, _ = columns.indices(self.shape[-1])
        at = 0
        for share in range(self.shares):
            for part in self.parts:
                width = part.shape[-1] // self.shares
                low, high = max(first, at), min(last, at + width)
                if low < high:
                    own = share * width - at
                    yield part, slice(low + own, high + own), slice(low - first, high - first)
                at += width

    def columns(self, part: Parameter) -> np.ndarray:
        """The column of the leaf that each column of a part is."""
        found = np.empty(part.shape[-1], np.int64)
        for one, own, here in self.runs(slice(None)):
            if one is part:
                found[own] = np.arange(here.start, here.stop)
        return found


def leaves(config: ModelConfig, layout: Layout, dtype: str) -> list[Leaf]:
    """Every leaf of the decoder, in the order of `jax.tree.leaves` of its state."""
    state = nnx.state(Decoder(config, layout, dtype), nnx.Param)
    found = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    indices = padded_indices(config, layout)
    return [_leaf(path, variable, layout, indices) for path, variable in found]


def names_of_parameters(config: ModelConfig) -> list[str]:
    """Dotted paths in the order of the leaves."""
    nowhere = AbstractMesh((1, 1), ("data", "model"))
    layout = Layout("nowhere", nowhere, gathered=False, embed_divides=True)  # type: ignore[arg-type]
    return [part.path for leaf in leaves(config, layout, "float32") for part in leaf.parts]


def padded_indices(config: ModelConfig, layout: Layout) -> dict[str, np.ndarray]:
    """Logical axis -> the source index at each padded position, or PAD."""
    heads = pad_heads(config.num_heads, config.num_kv_heads, layout.divisor)
    sizes = {"ffn": config.intermediate_size, "vocab": config.vocab_size}
    if config.experts is not None:
        sizes |= {"expert_ffn": config.experts.size, "shared_ffn": config.experts.shared_size}
    return {
        "heads": _of_heads(heads.query_index, config.head_dim),
        "kv_heads": _of_heads(heads.kv_index, config.head_dim),
        **{axis: np.array(pad_tail(size, layout.divisor)) for axis, size in sizes.items()},
    }


def _of_heads(index: tuple[int, ...], head_dim: int) -> np.ndarray:
    """Indices of heads -> indices of their numbers."""
    heads = np.array(index)[:, None]
    return np.where(heads == PAD, PAD, heads * head_dim + np.arange(head_dim)).reshape(-1)


def _leaf(path: jax.tree_util.KeyPath, variable: nnx.Variable, layout: Layout, indices: dict[str, np.ndarray]) -> Leaf:
    metadata, shape = variable.get_metadata(), variable.get_value().shape
    axes: Axes = metadata["axes"]

    def part(path: str, size: int, axis: str | None) -> Parameter:
        own = (*axes[:-1], axis)
        return Parameter(path, (*shape[:-1], size), own, tuple(indices.get(axis) if axis else None for axis in own))

    name = jax.tree_util.keystr(path, simple=True, separator=".")
    before, _, kind = name.rpartition(".")
    segments = metadata.get("segments")
    parts = (
        (part(name, shape[-1], axes[-1]),)
        if segments is None
        else tuple(part(f"{before.rpartition('.')[0]}.{s.name}.{kind}", s.size, s.axis) for s in segments)
    )
    return Leaf(shape, layout.stored(axes, shape), parts, 1 if segments is None else layout.model)

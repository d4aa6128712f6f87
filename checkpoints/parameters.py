"""The decoder's parameters before they have values: names, axes, shapes, and which source index stands where."""

from __future__ import annotations

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
    """One leaf of the decoder.

    Attributes:
      path: its path in the module, `blocks.3.attention.query.weight`.
      shape: the padded shape.
      axes: a logical axis name, or None, for each dimension.
      indices: for each dimension the source index at each padded position, or PAD; None for a dimension taken as it is.
      sharding: its sharding as it is stored on the devices.
    """

    path: str
    shape: tuple[int, ...]
    axes: Axes
    indices: tuple[np.ndarray | None, ...]
    sharding: NamedSharding

    @cached_property
    def source_shape(self) -> tuple[int, ...]:
        """The shape in the checkpoint, without padding and copies."""
        pairs = zip(self.shape, self.indices, strict=True)
        return tuple(size if index is None else int(index.max()) + 1 for size, index in pairs)


def parameters(config: ModelConfig, layout: Layout, dtype: str) -> list[Parameter]:
    """Every parameter of the decoder, in the order of `jax.tree.leaves` of its state."""
    state = nnx.state(Decoder(config, layout, dtype), nnx.Param)
    found = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    indices = padded_indices(config, layout)
    return [_parameter(path, variable, layout, indices) for path, variable in found]


def names_of_parameters(config: ModelConfig) -> list[str]:
    """Dotted paths in the order of the leaves."""
    nowhere = AbstractMesh((1, 1), ("data", "model"))
    layout = Layout("nowhere", nowhere, gathered=False, embed_divides=True)  # type: ignore[arg-type]
    return [parameter.path for parameter in parameters(config, layout, "float32")]


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


def _parameter(path: jax.tree_util.KeyPath, variable: nnx.Variable, layout: Layout, indices: dict[str, np.ndarray]) -> Parameter:
    axes: Axes = variable.get_metadata()["axes"]
    return Parameter(
        path=jax.tree_util.keystr(path, simple=True, separator="."),
        shape=variable.get_value().shape,
        axes=axes,
        indices=tuple(indices.get(axis) if axis else None for axis in axes),
        sharding=layout.stored(axes, variable.get_value().shape),
    )

"""Weights that are in memory already: a pytree of arrays, under a checkpoint's names or the decoder's own -> parameters.

What rests on devices goes to where it is to be from there; what is in the host's memory goes the way of a file.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.checkpoint import Checkpoint, of_config
from checkpoints.errors import CheckpointError
from checkpoints.families import FAMILIES
from checkpoints.load import ParameterSpec, join_parts, match_leaves, pad_parameter, read_leaf
from checkpoints.parameters import Leaf, Parameter, leaves
from checkpoints.renamed import renamed
from checkpoints.safetensors import NAMES
from checkpoints.source import Source, TensorInfo
from jaxllm.config import ModelConfig
from sharding.layout import Layout

VALUE = (".value", ".raw_value")  # of nnx's variables, as jax names the way to their arrays


class TreeSource(Source):
    """The arrays of a pytree, by the names of the ways to them, joined by dots."""

    if_lacking, if_superfluous = "give all of them, or correct the config", "leave them out, or correct the config"

    def __init__(self, tree: Any):
        """Raises CheckpointError for what is no array of floating-point numbers, or a name that comes twice."""
        super().__init__(Path("the tree of weights"))
        self.version = uuid.uuid4().hex
        self.arrays: dict[str, Any] = {}
        for path, array in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            for end in VALUE:
                name = name.removesuffix(end)
            if not isinstance(array, (np.ndarray, jax.Array)) or np.dtype(array.dtype).name not in NAMES:
                kind = getattr(array, "dtype", type(array).__name__)
                raise CheckpointError(f"{self.where}: {name or 'its root'} is {kind}; give arrays of {', '.join(NAMES)}")
            if isinstance(array, jax.Array) and (array.is_deleted() or not array.is_fully_addressable):
                what = "deleted" if array.is_deleted() else "partly on other processes' devices"
                raise CheckpointError(f"{self.where}: {name} is {what}; give arrays that are here")
            if name in self.arrays:
                raise CheckpointError(f"{self.where} has {name} twice; give each once")
            self.arrays[name] = array
            self.tensors[name] = TensorInfo(array.shape, NAMES[np.dtype(array.dtype).name], array.nbytes)

    def _box(self, name: str, slices: tuple[slice, ...]) -> tuple[np.ndarray, int]:
        box = np.asarray(self.arrays[name][slices])
        return box, 0


def of_tree(config: Mapping[str, Any] | str | Path | Any, tree: Any) -> Checkpoint:
    """A checkpoint of weights in memory.

    Args:
      config: the values of a config.json, transformers' config, or a folder with one, whose tokenizer is then the checkpoint's.
      tree: see `TreeSource`.

    Raises CheckpointError.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else config
    return of_config(values if isinstance(values, Mapping) else Path(values), TreeSource(tree))


class Matched:
    """A tree whose arrays are known to be a model's.

    Attributes:
      specs: path of each parameter -> what fills it.
    """

    def __init__(self, tree: TreeSource, specs: Sequence[ParameterSpec]):
        self.specs = {spec.parameter.path: spec for spec in specs}
        self.arrays = tree.arrays

    def names(self, part: Parameter) -> list[str]:
        """Of the arrays that fill a parameter."""
        spec = self.specs[part.path]
        return [spec.source.origin(tensor) for tensor in spec.mapping.tensors]


class Placement:
    """Puts trees of weights where a model's parameters are to be; what it compiles serves them all.

    Args:
      family: of the model, whose names the trees may use.
    """

    def __init__(self, family: str, config: ModelConfig, layout: Layout, dtype: str):
        self.config, self.layout, self.dtype = config, layout, dtype
        self._leaves, self._rules = leaves(config, layout, dtype), FAMILIES[family].rules
        self._devices = frozenset(layout.mesh.devices.flat)
        self._makers: dict[object, Callable[..., jax.Array]] = {}

    def match(self, tree: TreeSource) -> Matched:
        """Which of the tree's arrays are which parameter's. Raises CheckpointError where they are not the model's."""
        own = self._rules.of_parameters()
        rules = self._rules if own.by_parameter(self.config).keys().isdisjoint(tree.tensors) else own
        return Matched(tree, match_leaves(self._leaves, renamed(tree, rules), rules, self.config))

    def place(self, found: Matched, *, donate: bool = False) -> list[jax.Array]:
        """The parameters, in the order of the leaves, all of them new arrays.

        `donate`: the tree's arrays on devices are deleted one after another, as soon as nothing here needs them.
        """
        names = [[name for part in leaf.parts for name in found.names(part)] for leaf in self._leaves]
        last = {name: i for i, some in enumerate(names) for name in some}
        placed = []
        for i, (leaf, some) in enumerate(zip(self._leaves, names, strict=True)):
            placed.append(self._placed(leaf, found, [found.arrays[name] for name in some]))
            for name in {*some} if donate else ():
                if last[name] == i and isinstance(array := found.arrays[name], jax.Array):
                    array.delete()
        return placed

    def _placed(self, leaf: Leaf, found: Matched, arrays: list[Any]) -> jax.Array:
        devices = {frozenset(x.sharding.device_set) if isinstance(x, jax.Array) else None for x in arrays}
        if len(devices) > 1 or None in devices:
            return read_leaf(leaf, found.specs, np.dtype(jnp.dtype(self.dtype)))
        make = self._maker(leaf, [found.specs[part.path] for part in leaf.parts], here=devices == {self._devices})
        return jax.device_put(make(arrays), leaf.sharding)

    def _maker(self, leaf: Leaf, specs: list[ParameterSpec], *, here: bool) -> Callable[..., jax.Array]:
        """A compiled function: the arrays that fill a leaf -> the leaf; `here`: all of them are on the leaf's devices."""
        kind = (here, leaf.sharding, *((one.parameter.shape, one.parameter.axes, one.mapping.pattern) for one in specs))
        if kind not in self._makers:
            counts = [len(one.mapping.tensors) for one in specs]

            def make(arrays: list[jax.Array]) -> jax.Array:
                given = iter(arrays)
                parts = [_parameter(spec, [next(given) for _ in range(n)]) for spec, n in zip(specs, counts, strict=True)]
                # Copied: jax would hand what is as it should be through, and whoever gave it may donate it to a step of theirs.
                return jnp.copy(join_parts(leaf, [x.astype(self.dtype) for x in parts]))

            self._makers[kind] = jax.jit(make, out_shardings=leaf.sharding if here else None)
        return self._makers[kind]


def _parameter(spec: ParameterSpec, arrays: list[jax.Array]) -> jax.Array:
    """The padded parameter of the whole tensors that fill it."""
    read = [spec.mapping.pattern.read(x.__getitem__, {}, spec.sizes) for x in arrays]  # type: ignore[arg-type]
    return pad_parameter(spec.parameter, jnp.concatenate(read, axis=0) if len(read) > 1 else jnp.asarray(read[0]))

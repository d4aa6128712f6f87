"""Parameters that rest on devices, as a source of tensors: unpadded, each once, under the decoder's own paths."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.checkpoint import Checkpoint
from checkpoints.copying import empty
from checkpoints.parameters import Leaf, Parameter, leaves
from checkpoints.safetensors import NAMES
from checkpoints.source import Source, TensorInfo
from sharding.layout import Layout
from sharding.padding import PAD

Bounds = list[tuple[int, int]]  # [first, last) in each dimension


def of_arrays(checkpoint: Checkpoint, arrays: Sequence[jax.Array], layout: Layout, dtype: str) -> Checkpoint:
    """The checkpoint with weights as `load` has made them, arrays in its order, instead of its own."""
    declared = leaves(checkpoint.config, layout, dtype)
    source = ArraySource(checkpoint.path, declared, arrays, np.dtype(jnp.dtype(dtype)))
    return checkpoint.with_weights(source, checkpoint.rules.of_parameters())


class ArraySource(Source):
    """Reads boxes of them to the host, and no more than the box.

    `arrays`: each is asked for when it is read, and must then be whole on this process's devices.
    """

    def __init__(self, where: Path, declared: Sequence[Leaf], arrays: Sequence[jax.Array], dtype: np.dtype):
        super().__init__(where)
        self.version = uuid.uuid4().hex
        self._leaves, self._arrays, self._dtype = declared, arrays, dtype
        self._places: dict[str, tuple[int, Parameter]] = {}
        for i, leaf in enumerate(declared):
            for part in leaf.parts:
                self._places[part.path] = i, part
                shape = part.source_shape
                self.tensors[part.path] = TensorInfo(shape, NAMES[dtype.name], math.prod(shape) * dtype.itemsize)

    def _box(self, name: str, slices: tuple[slice, ...]) -> tuple[np.ndarray, int]:
        """The box in its own dtype."""
        i, parameter = self._places[name]
        leaf = self._leaves[i]
        places = [
            np.arange(size)[part] if index is None else _first_places(index)[part]
            for size, index, part in zip(parameter.shape, parameter.indices, slices, strict=True)
        ]
        if not all(map(len, places)):
            return empty(tuple(map(len, places)), self._dtype), 0
        array = self._arrays[i]
        assert array.is_fully_addressable or array.is_fully_replicated, name
        *before, columns = places
        # A device's share at a time: others' columns lie between.
        shares = np.split(columns, np.flatnonzero(np.diff(columns // (parameter.shape[-1] // leaf.shares))) + 1)
        found = leaf.columns(parameter)
        boxes = [_picked(array, [*before, found[share]]) for share in shares]
        box = boxes[0] if len(boxes) == 1 else np.concatenate(boxes, axis=-1)
        return box, box.nbytes


def _picked(array: jax.Array, places: Sequence[np.ndarray]) -> np.ndarray:
    """The numbers at these places of each dimension."""
    bounds = [(int(place.min()), int(place.max()) + 1) for place in places]
    box = _fetch(array, bounds)
    for dim, (place, (first, last)) in enumerate(zip(places, bounds, strict=True)):
        if len(place) < last - first:  # padding or copies lie between
            box = np.take(box, place - first, axis=dim)
    return box


def _first_places(index: np.ndarray) -> np.ndarray:
    """The padded position at which each source index stands first. They are in order, but for padding and copies."""
    sources, places = np.unique(index, return_index=True)
    return places[sources != PAD]


def _fetch(array: jax.Array, bounds: Bounds) -> np.ndarray:
    """The numbers within `bounds` from the devices that have them."""
    box = empty(tuple(last - first for first, last in bounds), np.dtype(array.dtype))
    shards = {str(shard.index): shard for shard in array.addressable_shards}  # of copies one
    for shard in shards.values():
        there = [part.indices(size)[:2] for part, size in zip(shard.index, array.shape, strict=True)]
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(there, bounds, strict=True)]
        if all(first < last for first, last in common):
            starts = [first - a for (first, _), (a, _) in zip(common, there, strict=True)]
            part = _part(shard.data, starts, sizes=tuple(last - first for first, last in common))
            box[tuple(slice(first - c, last - c) for (first, last), (c, _) in zip(common, bounds, strict=True))] = part
    return box


# A program for each shape, as the starts are arguments; the device sends what is asked for alone.
@partial(jax.jit, static_argnames="sizes")
def _part(x: jax.Array, starts: list[int], sizes: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(x, starts, sizes)

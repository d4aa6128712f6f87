"""Tensors of a checkpoint -> sharded parameters.

Each device's shard is built on its own from the slice of the file that it needs, so a process reads only its own bytes
and holds a few shards at a time; shards that several devices share are built once. Padding becomes zeros here.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.copying import empty, fill, owned
from checkpoints.errors import CheckpointError, listed
from checkpoints.names import Rules, TensorMapping, axis_sizes
from checkpoints.parameters import Leaf, Parameter, leaves, names_of_parameters
from checkpoints.source import Source
from jaxllm.config import ModelConfig
from sharding.layout import Layout
from sharding.padding import PAD

__all__ = ["Progress", "load", "match_tensors", "names_of_parameters", "random_leaves"]

Progress = Callable[[int, int], None]
"""Called with (parameters loaded, parameters in all), numbers counted, from one thread at a time."""

_WORKERS = 4  # a shard each: two make safetensors a quarter faster on two cores, GGUF neither faster nor slower
_COMPARED = 1 << 22  # numbers compared at a time


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter, and the tensors it is loaded from."""

    parameter: Parameter
    mapping: TensorMapping
    sizes: dict[str, int]
    source: Source

    def shard(self, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """The part of the padded parameter at `index`, reading only the box of the tensors it comes from."""
        return owned(self.view(index, dtype), dtype)

    def view(self, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """`shard` as it lies in the file, if it lies there in one piece, and in the file's dtype."""
        wanted = [self._positions(dim, part) for dim, part in enumerate(index)]
        shape = tuple(len(positions) for positions in wanted)
        real = [positions[positions != PAD] for positions in wanted]
        if not all(len(positions) for positions in real):
            return np.zeros(shape, dtype)
        bounds, ranges = {}, []
        pattern = self.mapping.pattern
        ranged = [*pattern.leading(), pattern.stacked]
        for (axis, *inner), positions, whole in zip(pattern.param_dims, real, self.parameter.source_shape, strict=True):
            step = math.prod(self.sizes[name] for name in inner)
            if axis in ranged:
                # The source indices of a shard increase without gaps (but for copies), so one range holds nothing superfluous.
                bounds[axis] = (int(positions.min()) // step, int(positions.max()) // step + 1)
                ranges.append((bounds[axis][0] * step, bounds[axis][1] * step))
            else:
                ranges.append((0, whole))
        part = self.mapping.read(self.source, bounds, self.sizes)
        for dim, (first, last) in enumerate(ranges):
            part = _select(part, dim, wanted[dim], first, last)
        return part

    def _positions(self, dim: int, part: slice) -> np.ndarray:
        index = self.parameter.indices[dim]
        return np.arange(self.parameter.shape[dim])[part] if index is None else index[part]


def _select(part: np.ndarray, dim: int, wanted: np.ndarray, first: int, last: int) -> np.ndarray:
    """`part` holds the source indices [first, last) along `dim`; the wanted ones of them, zeros where PAD."""
    if np.array_equal(wanted, np.arange(first, last)):
        return part
    out = np.take(part, np.where(wanted == PAD, 0, wanted - first), axis=dim)
    out[(slice(None),) * dim + (wanted == PAD,)] = 0
    return out


def load(
    source: Source, rules: Rules, config: ModelConfig, layout: Layout, dtype: str, progress: Progress | None = None
) -> list[jax.Array]:
    """The decoder's parameters, sharded as they are stored in `layout`, in the order of `jax.tree.leaves` of its state.

    Raises CheckpointError naming the tensors that are missing, superfluous or misshapen, before any weight is read.
    """
    found = leaves(config, layout, dtype)
    specs = {spec.parameter.path: spec for spec in match_leaves(found, source, rules, config)}
    meter = _Meter(progress, sum(math.prod(leaf.shape) for leaf in found))

    def build(leaf: Leaf) -> jax.Array:
        array = read_leaf(leaf, specs, np.dtype(jnp.dtype(dtype)))
        meter.add(array.size)
        return array

    with ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1)) as pool:
        return list(pool.map(build, found))


class _Meter:
    """Reports to `progress` how many numbers have been loaded."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done = progress, total, 0
        self._lock = threading.Lock()

    def add(self, amount: int) -> None:
        if self.progress is None:
            return
        with self._lock:
            self.done += amount
            self.progress(self.done, self.total)


def read_leaf(leaf: Leaf, specs: Mapping[str, ParameterSpec], dtype: np.dtype) -> jax.Array:
    """A leaf on its devices, each shard read on its own."""
    shards: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None, "parameters are numeric arrays"
        key = tuple(part.indices(size) for part, size in zip(index, leaf.shape, strict=True))
        if key not in shards:
            shards[key] = read_shard(leaf, specs, index, dtype)
        return shards[key]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)


def read_shard(leaf: Leaf, specs: Mapping[str, ParameterSpec], index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """The part of a leaf at `index`, reading only the boxes of the tensors that it comes from."""
    *before, columns = index
    runs = list(leaf.runs(columns))
    if len(runs) == 1:
        part, own, _ = runs[0]
        return specs[part.path].shard((*before, own), dtype)
    out = empty(tuple(len(range(size)[one]) for size, one in zip(leaf.shape, index, strict=True)), dtype)
    for part, own, here in runs:
        fill(out[..., here], specs[part.path].view((*before, own), dtype))
    return out


def match_tensors(source: Source, rules: Rules, config: ModelConfig, layout: Layout, dtype: str) -> list[ParameterSpec]:
    """Match every parameter with its tensors and every tensor with its parameters, and check the shapes.

    Raises CheckpointError naming the tensors that are missing, superfluous or misshapen; no weight but a tied head is read.
    """
    return match_leaves(leaves(config, layout, dtype), source, rules, config)


def match_leaves(found: Sequence[Leaf], source: Source, rules: Rules, config: ModelConfig) -> list[ParameterSpec]:
    """`match_tensors` for a decoder of these leaves."""
    by_param, sizes = rules.by_parameter(config), axis_sizes(config)
    specs = [ParameterSpec(part, by_param[part.path], sizes, source) for leaf in found for part in leaf.parts]
    used = dict.fromkeys(tensor for spec in specs for tensor in spec.mapping.tensors)
    if missing := [tensor for tensor in used if tensor not in source.tensors]:
        raise CheckpointError(f"{source.where} lacks tensors {listed(missing)}; {source.if_lacking}")
    _check_shapes(specs)
    extra = {name for name in source.tensors if name not in used and not rules.is_ignored(name)}
    if config.tied_head:
        require_tied_head(source, rules, config)
        extra -= {*by_param["head.weight"].tensors}
    if extra:
        raise CheckpointError(
            f"{source.where} holds tensors that its config has no use for: {listed(sorted(extra))}; {source.if_superfluous}"
        )
    return specs


def _check_shapes(specs: list[ParameterSpec]) -> None:
    wrong: dict[str, None] = {}
    for spec in specs:
        pattern = spec.mapping.pattern
        assert pattern.param_shape(spec.sizes) == spec.parameter.source_shape, spec.parameter.path
        expected = pattern.tensor_shape(spec.sizes)
        for tensor in spec.mapping.tensors:
            spec.source.require_usable(tensor)
            if (found := spec.source.tensors[tensor].shape) != expected:
                wrong[f"{tensor} is {found}, not {expected}"] = None  # once, though it fills several
    if wrong:
        raise CheckpointError(
            f"{specs[0].source.where}: shapes that its config does not give: {listed([*wrong])}; correct the config"
        )


def require_tied_head(source: Source, rules: Rules, config: ModelConfig) -> None:
    """A tied head may be in the file a second time, but only as the same numbers. Raises CheckpointError."""
    by_param = rules.by_parameter(config)
    (head,), (embedding,) = by_param["head.weight"].tensors, by_param["embedding.weight"].tensors
    if not config.tied_head or head not in source.tensors:
        return
    vocab, embed = source.tensors[embedding].shape
    step = max(1, _COMPARED // embed)
    boxes = [(slice(first, min(first + step, vocab)), slice(0, embed)) for first in range(0, vocab, step)]
    if source.tensors[head].shape != (vocab, embed) or not all(
        np.array_equal(source.read(head, box), source.read(embedding, box)) for box in boxes
    ):
        raise CheckpointError(
            f"{source.where}: the config ties the head to the embedding, but {head} and {embedding} differ; "
            "set `tie_word_embeddings` to false in config.json"
        )


def random_leaves(config: ModelConfig, layout: Layout, dtype: str, seed: int) -> list[jax.Array]:
    """Random parameters made on the devices, sharded as by `load`: normal of scale 0.02, norms one, padding zero."""
    found = leaves(config, layout, dtype)
    # XLA's own generator: 20 times faster to run than the default one on a CPU, and half the time to compile.
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(found))
    makers: dict[object, Callable[[jax.Array], jax.Array]] = {}
    arrays = []
    for leaf, key in zip(found, keys, strict=True):
        kind = tuple((part.shape, part.axes, _is_norm(part)) for part in leaf.parts)
        if kind not in makers:
            makers[kind] = _maker(leaf, dtype, config.norm_offset)
        arrays.append(makers[kind](key))
    return arrays


def _is_norm(parameter: Parameter) -> bool:
    return parameter.path.endswith("norm.scale")


def _maker(leaf: Leaf, dtype: str, offset: float) -> Callable[[jax.Array], jax.Array]:
    """A jitted function: random key -> the leaf. `offset`: added by the model to the scales of norms."""

    def make(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, len(leaf.parts))
        return join_parts(leaf, [part_of(part, one) for part, one in zip(leaf.parts, keys, strict=True)])

    def part_of(parameter: Parameter, key: jax.Array) -> jax.Array:
        if _is_norm(parameter):
            return jnp.full(parameter.shape, 1 - offset, dtype)
        x = 0.02 * jax.random.normal(key, parameter.source_shape, jnp.float32)
        return pad_parameter(parameter, x).astype(dtype)

    return jax.jit(make, out_shardings=leaf.sharding)


def pad_parameter(parameter: Parameter, x: jax.Array) -> jax.Array:
    """A whole parameter [source_shape] -> [shape]: copies of a KV head are equal, padding is zero."""
    for dim, index in enumerate(parameter.indices):
        if index is not None:  # out of bounds reads fill
            x = jnp.take(x, jnp.where(index == PAD, x.shape[dim], index), axis=dim, mode="fill", fill_value=0)
    return x


def join_parts(leaf: Leaf, parts: Sequence[jax.Array]) -> jax.Array:
    """The padded parameters of a leaf -> the leaf."""
    shares = [x.reshape(*x.shape[:-1], leaf.shares, -1) for x in parts]
    return jnp.concatenate(shares, axis=-1).reshape(leaf.shape)

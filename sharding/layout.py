"""A layout is a mesh shape and one table from logical axes to mesh axes.

The mesh has two axes: `data` (rows of a batch) and `model` (heads, ffn, vocabulary). A parameter names its logical axes where it
is declared; the table says where they go. In a gathered layout weights are *stored* split over `data` as well and *used* without
that split, so XLA gathers each weight before its use. The collectives are XLA's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.padding import round_up

Axes = tuple[str | None, ...]

# logical axis -> the mesh axis that splits it, in every layout
SPLIT_OVER_MODEL = ("heads", "kv_heads", "ffn", "expert_ffn", "shared_ffn", "vocab", "joint")
NAMES = "tensor, replicated, gathered, replicated-AxB, gathered-AxB (A over data, B over model)"

# NVIDIA's compute capabilities: the first with Triton kernels in XLA, and the first for which it overlaps collectives unasked
AMPERE, HOPPER = 8.0, 9.0


def capability(device: Any) -> float:
    """Compute capability of an NVIDIA GPU, such as 9.0; infinite for every other device, which has no limits of old GPUs."""
    if device.platform != "gpu":
        return math.inf
    name = str(device.compute_capability)
    return float(name) if name[:1].isdigit() else math.inf  # AMD's begin with letters


def hosts_of(devices: Iterable[Any]) -> int:
    """Over how many hosts, or processes, devices are spread."""
    return len({device.process_index for device in devices})


@dataclass(frozen=True)
class Layout:
    """Where arrays live on `mesh`.

    `gathered`: weights are stored split over `data`. `embed_divides`: their embed axis can be; otherwise heads, ffn and
    vocabulary are padded to the product of both mesh axes, so that these can.
    """

    name: str
    mesh: Mesh
    gathered: bool
    embed_divides: bool

    @property
    def data(self) -> int:
        """Size of the mesh's data axis."""
        return int(self.mesh.shape["data"])

    @property
    def model(self) -> int:
        """Size of the mesh's model axis."""
        return int(self.mesh.shape["model"])

    @property
    def spans_processes(self) -> bool:
        """Whether the devices are of several processes."""
        return hosts_of(self.mesh.devices.flat) > 1

    def hosts(self, axis: Literal["data", "model"]) -> int:
        """Over how many hosts, or processes, those exchange arrays that differ along an axis alone."""
        return hosts_of(self.mesh.devices[0] if axis == "model" else self.mesh.devices[:, 0])

    @property
    def platform(self) -> str:
        """Platform of the devices, "cpu", "gpu" or "tpu"."""
        return str(self.mesh.devices.flat[0].platform)

    @property
    def capability(self) -> float:
        """Compute capability of the devices; see the function of this name."""
        return capability(self.mesh.devices.flat[0])

    @property
    def gathers(self) -> bool:
        """Whether weights are gathered before their use: not from a single data shard."""
        return self.gathered and self.data > 1

    @property
    def divisor(self) -> int:
        """The number that heads, ffn and vocabulary must divide by."""
        return self.model * self.data if self.gathered and not self.embed_divides else self.model

    def spec(self, axes: Axes) -> PartitionSpec:
        """The partition of an array with these logical axes, as it is computed with."""
        return PartitionSpec(*map(_mesh_axis, axes))

    def stored_spec(self, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
        """The partition of a parameter as it rests in memory.

        A gathered matrix is split over `data` too, on the first dimension that divides: to gather along a later one, XLA
        transposes it before.
        """
        spec = [_mesh_axis(axis) for axis in axes]
        if self.gathered and "embed" in axes:
            for i, (axis, size) in enumerate(zip(axes, shape, strict=True)):
                split = ("model", "data") if axis in SPLIT_OVER_MODEL else ("data",)
                if axis is not None and size % math.prod(self.mesh.shape[name] for name in split) == 0:
                    spec[i] = split if len(split) > 1 else split[0]
                    break
        return PartitionSpec(*spec)

    def sharding(self, axes: Axes) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes))

    def stored(self, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(self.mesh, self.stored_spec(axes, shape))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Tell XLA how `x` is laid out at this point of a jitted program."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))


def _mesh_axis(axis: str | None) -> Any:
    if axis == "rows":
        return "data"
    return "model" if axis in SPLIT_OVER_MODEL else None


def parse(name: str, devices: int) -> tuple[int, int, bool]:
    """`name` over so many devices -> (data, model, gathered). Raises ValueError naming the layouts there are."""
    match = re.fullmatch(r"(replicated|gathered)-([1-9]\d*)x([1-9]\d*)", name)
    if match:
        data, model = int(match[2]), int(match[3])
        if data * model != devices:
            raise ValueError(f"layout {name!r} takes {data * model} devices, not {devices}; pass devices={data * model}")
        return data, model, match[1] == "gathered"
    shapes = {"tensor": (1, devices, False), "replicated": (devices, 1, False), "gathered": (devices, 1, True)}
    if name not in shapes:
        raise ValueError(f"unknown layout {name!r}; there are {NAMES}")
    return shapes[name]


def make_layout(name: str, devices: list[Any], embed: int) -> Layout:
    """The layout `name` over `devices` for a model of hidden size `embed`."""
    data, model, gathered = parse(name, len(devices))
    mesh = Mesh(np.array(devices, dtype=object).reshape(data, model), ("data", "model"))
    return Layout(name, mesh, gathered, embed_divides=round_up(embed, data) == embed)

"""The devices a run uses, and the way to them and back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

MOST_VIRTUAL = 512  # each has threads of its own: jax starts so many in a second, and 100,000 of them never


class DeviceError(ValueError):
    """The devices asked for are not there; the message says what is and what to do."""


def virtual_cpu_devices(count: int) -> None:
    """Split the CPU into `count` devices, to run a layout without accelerators. Call before anything else touches jax.

    Raises DeviceError for fewer than one or more than MOST_VIRTUAL, and when jax has already started with another number.
    """
    if not 1 <= count <= MOST_VIRTUAL:
        raise DeviceError(f"{count} virtual devices: ask for 1 to {MOST_VIRTUAL}")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if len(jax.devices("cpu")) != count:
            raise DeviceError(
                f"jax is already running with {len(jax.devices('cpu'))} CPU devices: ask for {count} virtual ones at the "
                "start of the program, before any other use of jax"
            ) from error


def pick_devices(devices: int | Sequence[jax.Device] | None) -> list[jax.Device]:
    """All local devices, the first so many of them, or just those named."""
    if devices is None:
        return jax.devices()
    if not isinstance(devices, int):
        if not devices:
            raise DeviceError("an empty list of devices: name at least one, or leave it out for all of them")
        return list(devices)
    here = jax.devices()
    if not 1 <= devices <= len(here):
        kind = here[0].device_kind
        remedy = f"ask for 1 to {len(here)}" if len(here) > 1 else "ask for 1"
        if here[0].platform == "cpu" and len(here) < devices <= MOST_VIRTUAL:
            remedy += f", or call jaxllm.virtual_cpu_devices({devices}) first (--virtual-devices on the command line)"
        raise DeviceError(f"{devices} devices asked for, {len(here)} there ({kind}): {remedy}")
    return here[:devices]


def to_devices(tree: Any, shardings: Any) -> Any:
    """Host arrays -> arrays on the devices, of all processes, which have the same; `shardings`: a tree of them."""
    first = next(iter(jax.tree.leaves(shardings)), None)
    if first is None or first.is_fully_addressable:
        return jax.device_put(tree, shardings)
    # Asked to, jax would compare the processes' arrays first, a collective for each.
    return jax.tree.map(lambda x, to: jax.make_array_from_callback(np.shape(x), to, np.asarray(x).__getitem__), tree, shardings)


def to_host(tree: Any) -> Any:
    """Arrays on the devices -> numpy arrays; waits for them."""
    return jax.device_get(tree)


def device_memory(device: jax.Device) -> int | None:
    """Bytes of memory a device of this process can give to arrays; virtual CPU devices share the host's. None: nothing tells."""
    if device.platform == "cpu":
        return _available_host_memory() // max(len(jax.local_devices(backend="cpu")), 1)
    stats = device.memory_stats()
    return None if stats is None or "bytes_limit" not in stats else int(stats["bytes_limit"] - stats["bytes_in_use"])


def _available_host_memory() -> int:
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

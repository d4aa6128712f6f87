"""What the devices that are here can do, measured once and kept: the rates of a plan `--on here`."""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.layers import dot
from sharding.hardware import Hardware
from sharding.mesh import device_memory

ROWS = (1, 4, 16, 64, 256, 1024)  # of products
REPEATS, CALLS = 5, 4
LONG = 0.1  # seconds of a call that need not be repeated so often
WIDTH = 4096  # of matrices that no cache holds: some processors have hundreds of megabytes
EXCHANGES = 32  # in one program
SMALL, LARGE = 1 << 12, 1 << 23  # numbers exchanged


def measured(devices: list[jax.Device], dtype: str, folder: Path) -> Hardware:
    """Rates of each device while all of them work, as virtual ones share a processor. Kept in `folder`; takes seconds."""
    file = folder / _key(devices, dtype)
    memory = device_memory(devices[0]) or 0  # it changes from run to run
    try:
        kept = json.loads(file.read_text())
        curve = tuple((int(rows), float(seconds)) for rows, seconds in kept.pop("curve"))
        return Hardware(**kept | {"memory": memory, "curve": curve})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # there is none yet, or it is none
    found = measure(devices, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{os.getpid()}")
    new.write_text(json.dumps(asdict(found)))
    new.replace(file)
    return found


def _key(devices: list[jax.Device], dtype: str) -> str:
    text = f"{devices[0].device_kind}-{len(devices)}-{dtype}-{os.cpu_count()}-jax{jax.__version__}"
    return re.sub(r"[^\w.-]", "_", text) + ".json"


def measure(devices: list[jax.Device], dtype: str) -> Hardware:
    """Copies, products of few and of many rows, and exchanges."""
    mesh = _mesh(devices)
    inputs, outputs = (WIDTH, 4 * WIDTH // len(devices)) if devices[0].platform == "cpu" else (2 * WIDTH, 4 * WIDTH)
    weights = _filled(mesh, (inputs, outputs), dtype)
    curve = tuple((rows, _product(mesh, weights, rows, dtype) / (inputs * outputs)) for rows in ROWS)
    hop, link = _exchange(mesh) if len(devices) > 1 else (0.0, 1e12)
    flops = max(2 * rows / seconds for rows, seconds in curve)
    capability = getattr(devices[0], "compute_capability", None) if devices[0].platform == "gpu" else None
    return Hardware(
        name=devices[0].device_kind,
        kind="",
        memory=device_memory(devices[0]) or 0,
        flops=flops,
        float32_flops=flops,
        bandwidth=copy_rate(devices),
        link=link,
        hop=hop,
        capability=capability,
        curve=curve,
    )


def _mesh(devices: list[jax.Device]) -> Mesh:
    return Mesh(np.array(devices, dtype=object), ("all",))


def _filled(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An array of this shape on each device, [devices, *shape]."""
    sharding = NamedSharding(mesh, P("all"))
    return jax.jit(partial(jnp.ones, (mesh.size, *shape), dtype), out_shardings=sharding)()


def _seconds(run: Callable[[], Any]) -> float:
    """Median time of a call among several that are queued together."""
    jax.block_until_ready(run())

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            last = run()
        jax.block_until_ready(last)
        return (time.perf_counter() - start) / calls

    one = seconds(1)
    return one if one > LONG else statistics.median(seconds(CALLS) for _ in range(REPEATS))


def _product(mesh: Mesh, weights: jax.Array, rows: int, dtype: str) -> float:
    x = _filled(mesh, (rows, weights.shape[1]), dtype)
    spec = P("all")
    step = jax.jit(jax.shard_map(partial(dot, "ark,ako->aro"), mesh=mesh, in_specs=(spec, spec), out_specs=spec))
    return _seconds(lambda: step(x, weights))


def copy_rate(devices: list[jax.Device]) -> float:
    """Bytes a second, read and written, when each device copies its part of an array that no cache holds."""
    mesh = _mesh(devices)
    x = _filled(mesh, ((1 << 26) // mesh.size,), jnp.float32)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place, or the time is that of finding fresh memory

    def run() -> jax.Array:
        nonlocal x
        x = step(x)
        return x

    return 2 * x.nbytes / mesh.size / _seconds(run)


def _exchange(mesh: Mesh) -> tuple[float, float]:
    """Seconds of a small all-reduce, and bytes a second of a large one, as a ring's link would have them."""

    def seconds(numbers: int, times: int) -> float:
        x = _filled(mesh, (numbers,), jnp.float32)

        def local(x: jax.Array) -> jax.Array:
            def again(_: Any, x: jax.Array) -> jax.Array:
                return jax.lax.psum(x, "all") / mesh.size

            return jax.lax.fori_loop(0, times, again, x)

        step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("all"), out_specs=P("all"), check_vma=False))
        return _seconds(lambda: step(x)) / times

    hop = seconds(SMALL, EXCHANGES)
    large = max(seconds(LARGE, 2) - hop, 1e-9)
    return hop, 2 * (mesh.size - 1) / mesh.size * LARGE * 4 / large

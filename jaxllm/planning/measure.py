"""Rates of the devices that are here, measured once and kept, for a plan `--on here`."""

from __future__ import annotations

import json
import logging
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Wrapped

from jaxllm.buckets import PAGE
from jaxllm.decoder.attention import AttentionSpec
from jaxllm.decoder.cache_spec import LayerCache, cache_dtype
from jaxllm.decoder.layers import dot
from jaxllm.decoder.linear import product
from jaxllm.decoder.paged_attention import read_pages
from jaxllm.platforms import attention_form
from sharding.hardware import Hardware
from sharding.layout import capability
from sharding.mesh import device_memory

VERSION = 4  # of what is measured: what others have kept is measured anew
ROWS = (1, 4, 16, 64, 256, 1024)  # of products
REPEATS, CALLS, MOST_CALLS = 5, 4, 64
LONG = 0.1  # seconds of a call that need not be repeated so often
WIDTH = 4096  # of matrices; on a CPU a quarter, as small models have, and so many that no cache holds them
EXCHANGES, FEW = 32, 4  # in one program, of small and of large arrays
SMALL, LARGE = 1 << 12, 1 << 23  # numbers exchanged
CACHED = (8, 8, 4, 16, 128)  # rows, KV heads, queries of each, pages, head size: a cache of 67 MB in float32
LAUNCHES = 64  # in one program


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
    new = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(asdict(found)))
        new.replace(file)
    except OSError as error:
        logging.getLogger("jaxllm").warning("what these devices were measured to do cannot be kept (%s)", error)
    return found


def _key(devices: list[jax.Device], dtype: str) -> str:
    text = f"{devices[0].device_kind}-{len(devices)}-{dtype}-{os.cpu_count()}-jax{jax.__version__}-{VERSION}"
    return re.sub(r"[^\w.-]", "_", text) + ".json"


def measure(devices: list[jax.Device], dtype: str) -> Hardware:
    """Measure the rates of copies, of products with few and with many rows, and of exchanges."""
    mesh = _mesh(devices)
    width, count = (WIDTH // 4, 64 // len(devices)) if devices[0].platform == "cpu" else (2 * WIDTH, 2)
    weights = [_filled(mesh, (width, width), dtype) for _ in range(count)]
    curve = tuple((rows, _product(mesh, weights, rows, dtype) / (count * width**2)) for rows in ROWS)
    hop, link, gather = _exchange(mesh) if len(devices) > 1 else (0.0, 1e12, None)
    flops = max(2 * rows / seconds for rows, seconds in curve)
    of_nvidia = getattr(devices[0], "compute_capability", None) if devices[0].platform == "gpu" else None
    return Hardware(
        name=devices[0].device_kind,
        kind="",
        memory=device_memory(devices[0]) or 0,
        flops=flops,
        float32_flops=flops,
        bandwidth=copy_rate(devices),
        link=link,
        hop=hop,
        capability=of_nvidia,
        curve=curve,
        cache_rate=_cache_rate(mesh, dtype),
        gather_rate=gather,
        launch=_launch(mesh),
    )


def _mesh(devices: list[jax.Device]) -> Mesh:
    return Mesh(np.array(devices, dtype=object), ("all",))


def _filled(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random numbers of this shape on each device, [devices, *shape]: of ones a GPU makes faster products."""
    return _maker(mesh, shape, jnp.dtype(dtype))()


@lru_cache
def _maker(mesh: Mesh, shape: tuple[int, ...], dtype: np.dtype) -> Wrapped:
    def make() -> jax.Array:
        numbers = jax.random.normal(jax.random.key(0, impl="rbg"), (mesh.size, *shape), jnp.float32)
        # So large that a product with a matrix of them is about as large as what is multiplied.
        return (numbers * shape[-1] ** -0.5).astype(dtype)

    return jax.jit(make, out_shardings=NamedSharding(mesh, P("all")))


def seconds_of(run: Callable[[], Any]) -> float:
    """Median time of a call among several that are queued together, so many that waiting for the last is little.

    On a CPU few: its virtual devices wait for each other for ever where many exchanges are queued.
    """
    jax.block_until_ready(run())

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            last = run()
        jax.block_until_ready(last)
        return (time.perf_counter() - start) / calls

    one = seconds(1)
    calls = CALLS if jax.default_backend() == "cpu" else min(max(CALLS, int(LONG / one)), MOST_CALLS)
    return one if one > LONG else statistics.median(seconds(calls) for _ in range(REPEATS))


def _product(mesh: Mesh, weights: list[jax.Array], rows: int, dtype: str) -> float:
    """Seconds to multiply `rows` rows with one weight after another, as in a model."""
    x, platform = _filled(mesh, (rows, weights[0].shape[1]), dtype), mesh.devices.flat[0].platform

    def local(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        for weight in weights:
            x = product(platform, x, weight[0]).astype(x.dtype)
        return x

    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("all"), out_specs=P("all")))
    return seconds_of(lambda: step(x, weights))


def copy_rate(devices: list[jax.Device]) -> float:
    """Bytes a second, read and written, when each device copies its shard of an array that no cache holds."""
    mesh = _mesh(devices)
    x = _filled(mesh, ((1 << 26) // mesh.size,), jnp.float32)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place, or the time is that of finding fresh memory

    def run() -> jax.Array:
        nonlocal x
        x = step(x)
        return x

    return 2 * x.nbytes / mesh.size / seconds_of(run)


def _cache_rate(mesh: Mesh, dtype: str) -> float:
    rows, heads, group, pages, head_dim = CACHED
    device = mesh.devices.flat[0]
    kept = cache_dtype(dtype, device.platform)
    # Each device has rows of its own, as in a batch.
    q = _filled(mesh, (rows, 1, heads * group, head_dim), dtype).reshape(-1, 1, heads * group, head_dim)
    keys = _filled(mesh, (rows * pages, heads, head_dim, PAGE), kept).reshape(-1, heads, head_dim, PAGE)
    cache = LayerCache(keys, keys.swapaxes(2, 3))
    table = jnp.tile(jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages), (mesh.size, 1))
    start = jnp.full(len(q), pages * PAGE - 1, jnp.int32)
    spec = P("all")
    form = attention_form(device.platform, capability(device), dtype, head_dim)
    one = partial(read_pages(device.platform, form), AttentionSpec(head_dim**-0.5, 0, None))
    step = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    return 2 * keys.nbytes / mesh.size / seconds_of(lambda: step(q, cache, table, start))


def _launch(mesh: Mesh) -> float:
    """Seconds of a small product that waits for the one before."""
    x = _filled(mesh, (8, 8), jnp.float32)

    @jax.jit
    def chain(x: jax.Array) -> jax.Array:
        y = x
        for _ in range(LAUNCHES):
            y = dot("abi,aio->abo", y, x)
        return y

    return seconds_of(lambda: chain(x)) / LAUNCHES


def _exchange(mesh: Mesh) -> tuple[float, float, float]:
    """Seconds of a small all-reduce; bytes a second of a large one, as a ring's link would have them, and of an all-gather."""
    n, spec = mesh.size, P("all")

    def seconds(numbers: int, times: int, exchange: Callable[[jax.Array], jax.Array]) -> float:
        x = _filled(mesh, (numbers,), jnp.float32)

        def local(x: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, times, lambda _, x: exchange(x), x)

        step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
        return seconds_of(lambda: step(x)) / times

    def reduce(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, "all") / n

    def gather(x: jax.Array) -> jax.Array:
        """Gather all shards and keep another device's: for its own XLA would not gather."""
        return jax.lax.dynamic_index_in_dim(jax.lax.all_gather(x, "all"), (jax.lax.axis_index("all") + 1) % n, keepdims=False)

    hop = seconds(SMALL, EXCHANGES, reduce)
    reduced = max(seconds(LARGE, FEW, reduce) - hop, 1e-9)
    # Of a size that models which run on a CPU have: it stays in caches.
    matrix = LARGE // 8 if mesh.devices.flat[0].platform == "cpu" else LARGE
    gathered = max(seconds(matrix // n, FEW, gather) - hop, 1e-9)
    return hop, 2 * (n - 1) / n * LARGE * 4 / reduced, (n - 1) / n * matrix * 4 / gathered

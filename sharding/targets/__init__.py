"""GPUs and TPUs to compile for on a machine that has none.

The name of a device and a count go in; devices for a `Mesh` come out, which compile and do not run. XLA's CUDA compiler
comes with jax's CUDA plugin and needs neither a GPU nor the CUDA libraries, only a description of the GPU: a
GpuTargetConfigProto in text form, one file a GPU beside this module. XLA keeps more of them in its repository under
`xla/tools/hlo_opt/gpu_specs`. The TPUs' compiler is libtpu, which knows them all.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata, resources
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Compiled, Wrapped

from sharding.hardware import named

INSTALL_TPU = 'pip install "jaxllm[tpu]"'
# How libtpu calls so many TPUs, in a square or a box.
SLICES = {1: "1x1", 2: "1x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}
BOXES = {1: "1x1x1", 2: "1x2x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}  # of v5p

INSTALL = 'pip install "jaxllm[aot]"'
CUDA = ("12", "13")


def target_kinds() -> list[str]:
    """The GPUs described here."""
    names = (file.name for file in resources.files(__name__).iterdir())
    return sorted(name.removesuffix(".txtpb") for name in names if name.endswith(".txtpb"))


def target_devices(kind: str, count: int, hosts: int = 1) -> list[jax.Device]:
    """`count` devices of each host, described and not there. The process's own devices stay what they are.

    Raises ValueError for an unknown kind, however spelt, one that there is no description of, or a count that cannot be, and
    RuntimeError where the compiler is missing, or is of another version than jaxlib.
    """
    known = named(kind)
    if count < 1:
        raise ValueError(f"count is the number of devices to compile for, at least 1, not {count}")
    if known.platform == "tpu":
        return _tpus(known.name.removeprefix("TPU-"), count * hosts)
    if known.name.lower() not in target_kinds():
        raise ValueError(f"no description of {known.name} to compile for; there are {', '.join(target_kinds())}, and TPUs")
    cuda = _plugin()
    config = resources.files(__name__).joinpath(f"{known.name.lower()}.txtpb").read_text()
    options: dict[str, Any] = {"platform": "cuda", "topology": f"1x{hosts}x{count}", "target_config": config}
    with _no_gpu_needed():
        try:
            return list(topologies.get_topology_desc(**options).devices)
        except NotImplementedError:
            # jax has looked for plugins before, on its own account, and gave this one up for want of a GPU.
            importlib.import_module(f"jax_plugins.xla_cuda{cuda}").initialize()
            return list(topologies.get_topology_desc(**options).devices)


def _tpus(kind: str, count: int) -> list[jax.Device]:
    shapes = BOXES if kind == "v5p" else SLICES
    if count not in shapes:
        raise ValueError(f"{count} {kind} are no slice of TPUs; there are {', '.join(map(str, shapes))}")
    if _version("libtpu") is None:
        raise RuntimeError(f"compiling for a TPU needs libtpu: {INSTALL_TPU}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shapes[count]}").devices)


def compile_for(jitted: Wrapped, *args: Any, **kwargs: Any) -> Compiled:
    """Compile for the devices of the arguments, which are ShapeDtypeStructs with shardings: those here, or described ones.

    Without arguments it is for those here.
    """
    leaves = jax.tree.leaves((args, kwargs))
    device = next(iter(leaves[0].sharding.device_set)) if leaves else None
    if device is None or device in jax.local_devices(backend=None):
        return jitted.lower(*args, **kwargs).compile()
    if device.platform == "gpu":
        return compile_for_cuda(jitted, *args, **kwargs)
    with _no_persistent_cache():
        return jitted.trace(*args, **kwargs).lower(lowering_platforms=(device.platform,)).compile()


def compile_for_cuda(jitted: Wrapped, *args: Any, **kwargs: Any) -> Compiled:
    """Compile a function under `jax.jit` for the devices of its arguments, which are ShapeDtypeStructs with shardings.

    Without a GPU there is nothing to time, so XLA takes the kernels that it holds best instead of measuring them.
    """
    lowered = jitted.trace(*args, **kwargs).lower(lowering_platforms=("cuda",))
    with _no_persistent_cache():
        return lowered.compile(compiler_options={"xla_gpu_autotune_level": 0})


def _plugin() -> str:
    """The CUDA version that jax's plugin is for. Raises RuntimeError if there is no plugin that fits jaxlib."""
    jaxlib = metadata.version("jaxlib")
    found = {cuda: version for cuda in CUDA if (version := _version(f"jax-cuda{cuda}-plugin"))}
    if not found:
        raise RuntimeError(f"compiling for a GPU needs jax's CUDA plugin: {INSTALL}")
    for cuda, version in found.items():
        if version == jaxlib == _version(f"jax-cuda{cuda}-pjrt"):
            return cuda
    cuda, version = found.popitem()
    raise RuntimeError(f"jax-cuda{cuda}-plugin {version} does not fit jaxlib {jaxlib}: {INSTALL} jax=={jaxlib}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def _no_persistent_cache() -> Iterator[None]:
    """Keep jax's compilation cache out: it writes a program for devices that are not there and cannot read it back.

    jax asks once a process whether the cache is on, so it is made to ask again, now and afterwards.
    """
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@contextmanager
def _no_gpu_needed() -> Iterator[None]:
    """Keep the CUDA plugin from asking for the CUDA libraries when jax loads it; no argument of jax's says so."""
    name = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

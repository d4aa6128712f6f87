"""Loaders of the CUDA plugin's modules that leave out what they write about a GPU that is not there."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ExtensionFileLoader, ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

EXPECTED = (b"Could not find cuda drivers on your machine", b"All log messages before absl::InitializeLog() is called")


@cache
def has_driver() -> bool:
    """Whether there is an NVIDIA driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def quiet_spec(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """The spec of one of the plugin's modules, with a loader of this file's; None where there is a driver."""
    spec = None if has_driver() else PathFinder.find_spec(name, path)
    if spec is not None and spec.origin is not None:
        if isinstance(spec.loader, ExtensionFileLoader):
            spec.loader = _QuietLibrary(name, spec.origin)
        elif name.startswith("jax_plugins."):
            spec.loader = _QuietPlugin(name, spec.origin)
    return spec


class _QuietLibrary(ExtensionFileLoader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        with _without_expected_lines():
            return super().create_module(spec)


class _QuietPlugin(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        module.__dict__["initialize"] = _quiet(module.initialize)


def _quiet(initialize: Callable[[], None]) -> Callable[[], None]:
    def quietly() -> None:
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        with _without_expected_lines():
            initialize()

    return quietly


@contextmanager
def _without_expected_lines() -> Iterator[None]:
    """Within it, standard error is held back, and written at the end without the expected lines."""
    stderr = os.dup(2)
    with open(os.memfd_create("stderr"), "w+b") as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            for line in written:
                if not any(expected in line for expected in EXPECTED):
                    os.write(2, line)

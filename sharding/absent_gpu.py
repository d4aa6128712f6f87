"""JAX's CUDA plugin on a machine without a GPU, where it is there to compile for GPUs elsewhere.

As it is loaded it logs that there are no drivers, once for each of its libraries and whatever the log level, and its check of
CUDA's versions prints a traceback. Where there is an NVIDIA driver nothing is changed. What this needs is imported with the
plugin: before that a command must be on its way within milliseconds.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

LIBRARIES = ("jax_cuda12_plugin", "jax_cuda13_plugin")
PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


def keep_quiet() -> None:
    """Leave those lines out in this process; of use before jax is imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the plugin's modules alone."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in PLUGINS and name.rpartition(".")[0] not in LIBRARIES:
            return None
        from sharding.quiet_plugin import quiet_spec

        return quiet_spec(name, path)

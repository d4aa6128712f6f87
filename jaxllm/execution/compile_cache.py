"""The persistent compilation cache, on by default, of whole entries alone.

jax writes an entry in place: a process that is stopped there leaves half of it, which every later one warns of and none
renews. Here an entry appears whole, and one that is broken all the same is removed, said once, and made anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
from jax._src import compilation_cache, lru_cache  # jax has no public way to say how entries are kept

SUFFIX = "-cache"


def use_compilation_cache(folder: Path) -> None:
    """Keep every compiled program in `folder`, unless the user has set a folder of their own.

    jax by default skips programs that compile in under a second, which is most of them.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _warn(f"compiled programs cannot be kept ({error})")
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.LRUCache = WholeEntries  # type: ignore[attr-defined]  # where jax makes its cache, at the first compilation


def folder_in_use(default: Path) -> Path:
    """The user's own folder, of JAX_COMPILATION_CACHE_DIR, or the default one."""
    return Path(jax.config.values["jax_compilation_cache_dir"] or default)


class Entry(NamedTuple):
    """A compiled program on the disk: the function's name, its bytes, when it was compiled, in seconds since 1970."""

    file: Path
    name: str
    nbytes: int
    compiled: float


def entries(folder: Path) -> list[Entry]:
    """The programs in a folder, the newest first; none where there is no such folder."""
    found = []
    for file in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # another process may clear it
            stat = file.stat()
            name = file.name.removesuffix(SUFFIX).rpartition("-")[0]
            found.append(Entry(file, name, stat.st_size, stat.st_mtime))
    return sorted(found, key=lambda entry: -entry.compiled)


def clear(folder: Path) -> list[Entry]:
    """Remove the programs in a folder, and nothing else that is there. A process that runs has its own in memory."""
    found = entries(folder)
    for entry in found:
        entry.file.unlink(missing_ok=True)
    for left in (*folder.glob("*-atime"), *folder.glob("*.new")):
        left.unlink(missing_ok=True)
    return found


class WholeEntries(lru_cache.LRUCache):
    """jax's cache. Its least-recently-used form, which a user may ask for, has a lock and is left as it is."""

    def put(self, key: str, value: bytes) -> None:
        path = self.path / f"{key}{SUFFIX}"
        if self.eviction_enabled or path.exists():
            return super().put(key, value)
        new = self.path / f"{key}.{os.getpid()}.new"
        try:
            new.write_bytes(value)
            new.replace(path)
        except OSError as error:
            _warn(f"compiled programs cannot be kept in {self.path} ({error.strerror})")
        finally:
            new.unlink(missing_ok=True)

    def get(self, key: str) -> bytes | None:
        value: bytes | None = super().get(key)
        if value is not None and not _is_whole(value):
            path = self.path / f"{key}{SUFFIX}"
            path.unlink(missing_ok=True)
            _warn(f"{path} was broken and is made anew")
            return None
        return value


@cache
def _warn(line: str) -> None:
    """Log a warning, once in a process."""
    logging.getLogger("jaxllm").warning(line)


def _is_whole(entry: bytes) -> bool:
    try:
        return bool(compilation_cache.decompress_executable(entry))
    except Exception:  # zlib and zstandard have an error each
        return False

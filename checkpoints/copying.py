"""Strided views of files -> arrays of their own, at about the speed of memory.

A weight is stored as [out, in] and used as [in, out], so most of loading is a transposition. numpy transposes an element at a
time, and where rows are a power of two apart a column's elements share a few cache lines: 0.23 GB/s for a bfloat16 matrix of
11,008 x 4,096 on a Zen 3 core. Tile by tile, through a buffer whose rows lie otherwise, it is 1.6, into new memory.
"""

from __future__ import annotations

import math
from functools import cache

import jax
import numpy as np

_ALIGN = 64  # bytes: XLA's CPU client takes such memory as it is, without another copy
_FEW = 1 << 18  # bytes that numpy transposes before XLA has begun
_LONG, _WIDE = 512, 256  # of a tile, along what is contiguous in the view and in the result
_STAGGER = 8  # numbers between the rows of the buffer, so that they do not fall on the same cache lines


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`numpy.empty`, aligned."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGN, np.uint8)
    first = -memory.ctypes.data % _ALIGN
    return memory[first : first + nbytes].view(dtype).reshape(shape)


def owned(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`x` in `dtype`, contiguous: `x` itself if it is that already and may be written to, which views of files may not."""
    if x.dtype == dtype and x.flags.c_contiguous and x.flags.writeable:
        return x
    out = empty(x.shape, dtype)
    fill(out, x)
    return out


def fill(out: np.ndarray, x: np.ndarray) -> None:
    """Copy `x` into `out`, whose rows are contiguous, of its shape, in the dtype of `out`."""
    if x.dtype == out.dtype:
        x, out = (a.view(f"u{a.dtype.itemsize}") for a in (x, out))  # ml_dtypes' own copies are slower than numpy's
    last, fast = x.ndim - 1, _fastest(x)
    if fast == last:
        np.copyto(out, x, casting="unsafe")
        return
    source, target = (np.moveaxis(a, (fast, last), (-2, -1)) for a in (x, out))
    for at in np.ndindex(source.shape[:-2]):
        _transpose(source[at], target[at])


def packed(x: np.ndarray) -> np.ndarray:
    """The numbers of `x` contiguous, not to be written to: `x` itself or a copy that is soon dropped.

    XLA's CPU client transposes faster than numpy can, into memory of small pages, which is slow to keep; a call takes 0.1 ms.
    """
    cpu = _cpu()
    if cpu is None or x.nbytes < _FEW or x.dtype.itemsize > 4:  # jax would make 64 bits 32
        return contiguous(x)
    return np.asarray(jax.device_put(x.view(f"u{x.dtype.itemsize}"), cpu)).view(x.dtype)


@cache
def _cpu() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return None


def contiguous(x: np.ndarray) -> np.ndarray:
    """`x` itself where its numbers follow each other, else a copy in which they do."""
    return x if x.flags.c_contiguous else owned(x, x.dtype)


def _fastest(x: np.ndarray) -> int:
    """The axis along which neighbours are nearest in memory; the last one of several."""
    strides = [(abs(stride), -i) for i, stride in enumerate(x.strides) if x.shape[i] > 1]
    return -min(strides)[1] if strides else x.ndim - 1


def _transpose(x: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` [I, J], whose rows are contiguous, from `x` [I, J], whose columns are."""
    rows, columns = x.shape
    buffer = np.empty((min(_WIDE, columns), min(_LONG, rows) + _STAGGER), out.dtype)
    for i in range(0, rows, _LONG):  # row by row of tiles: memory that is new is then touched in order
        for j in range(0, columns, _WIDE):
            tile = x[i : i + _LONG, j : j + _WIDE].T
            part = buffer[: tile.shape[0], : tile.shape[1]]
            np.copyto(part, tile, casting="unsafe")
            out[i : i + _LONG, j : j + _WIDE] = part.T

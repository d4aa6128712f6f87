"""Copies of strided views are numpy's, whatever the strides, and are aligned."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.copying import contiguous, empty, owned, packed

pytestmark = pytest.mark.fast

DTYPES = [np.dtype(d) for d in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)]


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from(DTYPES),
    target=st.sampled_from(DTYPES),
    steps=st.integers(1, 3),
)
def test_any_view_is_copied(shape: list[int], order: object, dtype: np.dtype, target: np.dtype, steps: int) -> None:
    axes = list(range(len(shape)))
    order.shuffle(axes)  # type: ignore[attr-defined]
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype).transpose(axes)[::steps]
    x.flags.writeable = False
    got = owned(x, target)
    assert got.dtype == target and got.flags.c_contiguous and got.flags.writeable
    assert got.tobytes() == x.astype(target).tobytes()
    assert contiguous(x).tobytes() == x.tobytes()
    assert packed(x).dtype == dtype and packed(x).flags.c_contiguous
    assert packed(x).tobytes() == x.tobytes()


@pytest.mark.parametrize("shape", [(300, 1100), (513, 256), (3, 700, 300), (1, 5000)])
def test_views_larger_than_a_tile_are_copied(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for view in (x.T, x.swapaxes(0, -1), np.moveaxis(x, 0, -1), x):
        assert np.array_equal(owned(view, np.dtype(ml_dtypes.bfloat16)), view.astype(ml_dtypes.bfloat16))
        assert np.array_equal(owned(view, view.dtype), view)
        assert np.array_equal(packed(view), view)


def test_what_is_owned_and_contiguous_is_not_copied() -> None:
    x = np.ones((3, 4), np.float32)
    assert owned(x, x.dtype) is x and contiguous(x) is x
    view = np.frombuffer(x.tobytes(), np.float32)  # read-only
    assert owned(view, view.dtype) is not view and contiguous(view) is view


def test_memory_is_aligned_for_xla() -> None:
    assert all(empty((n,), np.dtype(np.uint8)).ctypes.data % 64 == 0 for n in range(1, 100))

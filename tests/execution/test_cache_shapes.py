"""A cache has few shapes, and climbs from one to the next."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.decoder.cache_spec import BLOCK
from jaxllm.execution.cache_shapes import CacheLadder
from sharding.hardware import absent_devices
from sharding.layout import make_layout

pytestmark = pytest.mark.fast


def ladder(on: str, name: str, max_num_seqs: int, max_model_len: int) -> CacheLadder:
    return CacheLadder.of(make_layout(name, absent_devices(on), 64), max_num_seqs, max_model_len)


@given(st.sampled_from(["4xH100", "4xv6e"]), st.sampled_from(["tensor", "replicated"]), st.data())
def test_every_climb_is_foreseen(on: str, name: str, data: st.DataObject) -> None:
    one = ladder(on, name, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5000)))
    reachable = one.reachable()
    slots, lengths = st.integers(1, one.max_rows), st.integers(1, one.max_length)
    now = one.shape(data.draw(slots), data.draw(lengths))
    assert now in reachable
    for _ in range(5):
        wanted = data.draw(slots), data.draw(lengths)
        for shape in one.climb(now, *wanted):
            assert shape in reachable[now] and shape in reachable
            assert shape[0] >= now[0] and shape[1] >= now[1]
            now = shape
        assert now[0] >= wanted[0] and now[1] >= wanted[1] and now[1] % BLOCK == 0


@pytest.mark.parametrize(("on", "count"), [("4xv6e", 7 * 7), ("4xH100", 7 * 7 + 21)])
def test_shapes_are_few(on: str, count: int) -> None:
    """A square one on a GPU has a block more, and keeps it when it gets more rows."""
    assert len(ladder(on, "tensor", 64, 8192).reachable()) <= count

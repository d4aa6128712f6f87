"""Every chunk and every call fits the cache that its bucket gives it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.buckets import MAX_CHUNK, MIN_CHUNK, cache_length, chunk_bucket, length_bucket, power_of_two, row_bucket

pytestmark = pytest.mark.fast

BLOCK = 128


@given(st.integers(1, 1 << 40))
def test_power_of_two_is_the_smallest(n: int) -> None:
    found = power_of_two(n)
    assert found.bit_count() == 1 and found >= n and (found == 1 or found // 2 < n)


@given(st.integers(1, MAX_CHUNK))
def test_a_chunk_fits_its_bucket(tokens: int) -> None:
    assert tokens <= chunk_bucket(tokens) <= max(2 * tokens - 1, MIN_CHUNK)
    assert chunk_bucket(tokens) <= MAX_CHUNK == chunk_bucket(tokens + MAX_CHUNK)


def test_few_programs() -> None:
    assert {chunk_bucket(n) for n in range(1, MAX_CHUNK + 1)} == {16, 32, 64, 128, 256, 512}
    assert {length_bucket(n, 20 * BLOCK, BLOCK) for n in range(1, 20 * BLOCK + 1)} == {128, 256, 512, 1024, 2048, 2560}
    assert {row_bucket(n, 12, 4) for n in range(1, 13)} == {4, 8, 12}


@given(st.integers(1, 64), st.data())
def test_a_length_bucket_holds_the_length_in_blocks(blocks: int, data: st.DataObject) -> None:
    max_length = blocks * BLOCK
    length = data.draw(st.integers(1, max_length))
    found = length_bucket(length, max_length, BLOCK)
    assert length <= found <= max_length and found % BLOCK == 0
    assert length_bucket(min(length + 1, max_length), max_length, BLOCK) >= found


@given(st.integers(1, 40 * BLOCK), st.data())
def test_no_chunk_of_any_prompt_passes_the_end_of_the_cache(max_model_len: int, data: st.DataObject) -> None:
    """A chunk is padded to its bucket: an update past the end would be shifted back over the tokens before it."""
    prompt = data.draw(st.integers(1, max_model_len))
    max_length = cache_length(max_model_len, BLOCK)
    for start in range(0, prompt, MAX_CHUNK):
        size = chunk_bucket(min(prompt - start, MAX_CHUNK))
        assert start + size <= length_bucket(start + size, max_length, BLOCK)


@given(st.integers(1, 8), st.integers(1, 40), st.data())
def test_rows_hold_the_slots_and_divide(data_axis: int, parts: int, data: st.DataObject) -> None:
    max_rows = data_axis * parts
    slots = data.draw(st.integers(1, max_rows))
    rows = row_bucket(slots, max_rows, data_axis)
    assert slots <= rows <= max_rows and rows % data_axis == 0

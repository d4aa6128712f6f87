"""The ladder of shapes that programs are compiled for. Plain Python."""

from __future__ import annotations

from sharding.padding import round_up

MIN_CHUNK, MAX_CHUNK = 16, 512
STOP_ID_WIDTH = 8  # stop ids a row, in powers of two from here


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def chunk_bucket(tokens: int) -> int:
    """Length of the program that prefills so many tokens of a prompt."""
    return min(max(power_of_two(tokens), MIN_CHUNK), MAX_CHUNK)


def chunk_rungs() -> list[int]:
    """Every length of such a program."""
    rungs = [MIN_CHUNK]
    while rungs[-1] < MAX_CHUNK:
        rungs.append(2 * rungs[-1])
    return rungs


def cache_length(max_model_len: int, block: int) -> int:
    """Positions of the longest cache, such that the bucket of no chunk passes its end."""
    return round_up(max_model_len, max(block, MAX_CHUNK // 2))


def length_bucket(length: int, max_length: int, block: int) -> int:
    """Positions of the cache for sequences up to `length`; `max_length` is a multiple of `block`, as every rung is."""
    return min(power_of_two(max(length, block)), max_length)


def row_bucket(rows: int, max_rows: int, data: int) -> int:
    """Rows of the cache for so many slots; a multiple of the data axis, as `max_rows` is."""
    return min(data * power_of_two(-(-rows // data)), max_rows)

"""The sizes that shapes are made of. Plain Python."""

from __future__ import annotations

PAGE = 64  # positions of a page of the cache
TILE = 16  # tokens of one sequence that stand together in a prefill step; a page holds whole tiles
MAX_STEP_TOKENS = 1024  # tokens of a prefill step on each data shard, by default
MAX_LOGPROBS = 20  # likeliest tokens that a program reports, where it does not report all
STOP_ID_WIDTH = 8  # stop ids a row, in powers of two from here


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def pages_of(tokens: int) -> int:
    """Pages that hold so many positions."""
    return -(-tokens // PAGE)


def pages_held(window: int | None, length: int) -> int:
    """Most pages of a sequence of `length` tokens that layers with this window hold, in a step that takes MAX_STEP_TOKENS."""
    if window is None:
        return pages_of(length)
    return min(pages_of(length), pages_of(window - 1 + MAX_STEP_TOKENS) + 1)  # the first may be left in the middle

"""Rows hold every sequence, see what they should, and share what they can."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.scoring.trie import Row, Trie, best_fit, pack

pytestmark = pytest.mark.fast

many = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=30)


def nodes(members: list[list[int]]) -> int:
    """Tokens of the trie of these sequences."""
    return len({tuple(s[:n]) for s in members for n in range(1, len(s) + 1)})


def check(row: Row, sequences: list[list[int]]) -> None:
    for member, path in zip(row.members, row.paths, strict=True):
        assert row.tokens[path].tolist() == sequences[member]
        assert row.position[path].tolist() == list(range(len(path)))
        # The last token of the path sees the path and nothing else; so does, with it, every token on it.
        i = path[-1]
        index = np.arange(len(row.tokens))
        assert np.flatnonzero((index <= i) & (i < row.end)).tolist() == path.tolist()
    padding = np.arange(row.size, len(row.tokens))
    assert (row.end[padding] == padding + 1).all() and (row.end[: row.size] <= row.size).all()


@given(many, st.integers(12, 40), st.integers(1, 40))
def test_rows_hold_every_sequence(sequences: list[list[int]], length: int, tree: int) -> None:
    trie = Trie(sequences)
    rows = pack(trie, length, tree)
    assert sorted(i for row in rows for i in row.members) == list(range(len(sequences)))
    assert trie.tokens == nodes(sequences) <= sum(row.size for row in rows)
    for row in rows:
        check(row, sequences)


@given(many)
def test_a_trie_that_fits_is_one_tree(sequences: list[list[int]]) -> None:
    [row] = pack(Trie(sequences), 400, 400)
    assert row.size == nodes(sequences)


def test_a_long_shared_context_is_not_repeated_for_each_ending() -> None:
    context = list(range(3, 103))
    sequences = [[*context, i, *[1] * 9] for i in range(40)]
    rows = pack(Trie(sequences), 256, 32)  # the context alone is more than a tree is meant to be
    assert sum(row.size for row in rows) == 3 * 100 + 40 * 10


def test_what_does_not_fit_is_refused() -> None:
    for sequences in ([[1] * 9], [[1], []]):
        with pytest.raises(ValueError, match="do not fit rows of 8"):
            pack(Trie(sequences), 8, 8)
    assert pack(Trie([]), 8, 8) == []


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(50, 80))
def test_best_fit(sizes: list[int], capacity: int) -> None:
    bins = best_fit(sizes, capacity)
    assert sorted(i for group in bins for i in group) == list(range(len(sizes)))
    sums = [sum(sizes[i] for i in group) for group in bins]
    assert max(sums, default=0) <= capacity
    assert sum(2 * total <= capacity for total in sums) <= 1  # no two bins could have been one

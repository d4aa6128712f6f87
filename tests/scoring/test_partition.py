"""Groups hold every sequence once, are about equal, and share nearly what the whole shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.scoring.partition import EACH, groups_for, partition, repeated
from jaxllm.scoring.trie import Trie

pytestmark = pytest.mark.fast

many = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=60)


def random_questions(count: int, seed: int = 0) -> list[list[int]]:
    """Four endings of 20 tokens to each of so many queries of 30 to 90, as HellaSwag's questions are."""
    rng = np.random.default_rng(seed)
    queries = [rng.integers(5, 30000, rng.integers(30, 90)).tolist() for _ in range(count)]
    return [query + rng.integers(5, 30000, 20).tolist() for query in queries for _ in range(4)]


@given(many, st.integers(1, 20), st.integers(0, 30))
def test_groups_hold_every_sequence_once_and_know_their_tokens(sequences: list[list[int]], count: int, extra: int) -> None:
    groups = partition(Trie(sequences), count, extra)
    assert 1 <= len(groups) <= count
    assert sorted(i for group in groups for i in group.members) == list(range(len(sequences)))
    for group in groups:
        assert group.tokens == Trie([sequences[i] for i in group.members]).tokens
    assert sum(group.tokens for group in groups) >= Trie(sequences).tokens


@pytest.mark.parametrize("count", [2, 16, 64])
def test_groups_of_questions_are_equal_and_share_as_the_whole_does(count: int) -> None:
    trie = Trie(random_questions(1500))
    groups = partition(trie, count)
    assert len(groups) == count
    assert repeated(groups, trie) < 1e-4  # every cut is between two questions, which share nothing
    mean = trie.tokens / count
    assert max(abs(group.tokens - mean) for group in groups) < 0.2 * mean


def test_the_work_of_answers_is_divided_too() -> None:
    """One prompt of 1,000 tokens beside 100 of 10: with answers of 500 each, the long prompt is a fiftieth of the work."""
    sequences = [[1, *range(100, 1099)], *([2, i] * 5 for i in range(100, 200))]
    without, withal = (partition(Trie(sequences), 2, extra) for extra in (0, 500))
    assert min(len(group.members) for group in without) == 1
    assert min(len(group.members) for group in withal) > 40


def test_a_prefix_that_all_share_leaves_fewer_groups() -> None:
    rng = np.random.default_rng(0)
    shots = rng.integers(5, 30000, 1000).tolist()
    sequences = [shots + question for question in random_questions(500)]
    trie = Trie(sequences)
    assert repeated(partition(trie, 4 * EACH), trie) > 0.1
    # Each group computes the shots once; with four workers that is more than 2 %, however many groups there are.
    assert len(groups_for(sequences, 4)) == 4
    assert len(groups_for(sequences, 1)) == 2
    assert repeated(groups_for(sequences, 1), trie) < 0.02
    assert len(groups_for(random_questions(500), 4)) == 4 * EACH


def test_few_sequences_and_none() -> None:
    assert partition(Trie([]), 4) == [] == groups_for([], 3)
    assert [group.members for group in partition(Trie([[3], [1], [2]]), 9)] == [[1], [2], [0]]
    twins = Trie([[1, 2, 3], [1, 2, 3]])
    assert [group.tokens for group in partition(twins, 2)] == [3]  # the second takes no work
    assert [group.tokens for group in partition(twins, 2, extra=9)] == [3, 3]

"""Token sequences -> groups of about equal work that share nearly all that the whole shares. Plain Python and numpy: no device.

Sequences in lexicographic order stand beside those that they share most with. A group is a range of that order, and a cut costs
the prefix that is common to both sides of it, which is then computed twice. So cuts are made near the balanced places, where
the least is shared. Dealing sequences out one by one would compute their prefixes in every group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jaxllm.scoring.trie import Trie

SLACK = 0.1  # of a group's share: how far from its balanced place a cut may be
REPEATED = 0.02  # of the whole's work: the most that cuts may add, where fewer groups would do
EACH = 4  # groups for each worker: the last ones end at about the same time, and one that is lost costs little


@dataclass(frozen=True)
class Group:
    """Sequences that one worker takes, by their indices in lexicographic order, and their tokens after sharing."""

    members: list[int]
    tokens: int


def groups_for(sequences: Sequence[Sequence[int]], workers: int, extra: int = 0) -> list[Group]:
    """EACH groups for each worker, or fewer where they would do more than REPEATED of the work again, but one each.

    `extra`: tokens of work that each sequence takes besides its own, such as those of its answer.
    """
    trie = Trie(sequences)
    for each in range(EACH, 1, -1):
        groups = partition(trie, each * workers, extra)
        if sum(group.tokens for group in groups) - trie.tokens <= REPEATED * (trie.tokens + extra * len(sequences)):
            return groups
    return partition(trie, workers, extra)


def partition(trie: Trie, count: int, extra: int = 0) -> list[Group]:
    """At most `count` groups of about equal work that hold every sequence once; fewer where there are not so many sequences."""
    cuts = [*_cuts(trie, count, extra), len(trie.sorted)] if trie.sorted else []
    return [Group([trie.order[k] for k in range(*part)], trie.new(part, 0)) for part in pairwise(cuts)]


def _cuts(trie: Trie, count: int, extra: int) -> list[int]:
    """Where groups begin, among the sorted sequences."""
    work = trie.lengths - trie.shared + extra
    before = np.cumsum(work) - work
    share = work.sum() / count
    cuts = [0]
    for goal in share * np.arange(1, count):
        at = _cheapest(trie, before, goal, (goal - SLACK * share, goal + SLACK * share))
        if cuts[-1] < at:
            cuts.append(at)
    return cuts


def _cheapest(trie: Trie, before: np.ndarray, goal: float, allowed: tuple[float, float]) -> int:
    """The sequence before which the least is shared, of those that so much work precedes; of equals the nearest to the goal."""
    first, last = np.searchsorted(before, allowed)
    far = np.abs(before - goal)
    if first == last:  # one sequence spans all of them
        return int(far.argmin())
    return int(first + np.lexsort((far[first:last], trie.shared[first:last]))[0])


def repeated(groups: Sequence[Group], trie: Trie) -> float:
    """The fraction of the whole's tokens that the groups compute again."""
    return sum(group.tokens for group in groups) / max(trie.tokens, 1) - 1

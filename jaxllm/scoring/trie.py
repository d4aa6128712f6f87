"""Token sequences -> one trie -> packed rows. Plain Python and numpy: no device.

Sequences that begin alike share their first tokens. A tree is laid out in preorder, with `end[j]` the index after the last
descendant of token j; token j is then i itself or an ancestor of i exactly when `j <= i < end[j]`: causal attention in which key
j expires at `end[j]`. Trees stand side by side in a row and need no more than that to keep apart; the position is the depth.

A trie too large for a tree is split by repeating the path above. Sorting makes all of this arithmetic on one array: the length
of the prefix that each sequence shares with the one before it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

REPEAT = 8  # a path may be repeated once for so many times its own length


@dataclass(frozen=True)
class Row:
    """Trees side by side.

    Attributes:
      tokens, position, end: [T] int32; past the `size` tokens of the trees, zeros that see themselves alone.
      size: tokens of the trees.
      members: the sequences that the row holds, as indices into what was packed.
      paths: for each member, where in the row its tokens are, [its length] int32.
    """

    tokens: np.ndarray
    position: np.ndarray
    end: np.ndarray
    size: int
    members: list[int]
    paths: list[np.ndarray]


Range = tuple[int, int]  # [first, last) of the sorted sequences


class Trie:
    """Sequences in lexicographic order, and how many tokens each shares with the one before."""

    def __init__(self, sequences: Sequence[Sequence[int]]):
        self.order = sorted(range(len(sequences)), key=lambda i: list(sequences[i]))
        self.sorted = [np.asarray(sequences[i], np.int32) for i in self.order]
        self.lengths = np.array([len(s) for s in self.sorted], np.int64)
        pairs = zip(self.sorted[:-1], self.sorted[1:], strict=True)
        self.shared = np.array([0, *(_common(a, b) for a, b in pairs)], np.int64)
        # Tokens of the trie up to each sequence.
        self._total = np.concatenate([[0], np.cumsum(self.lengths - self.shared[: len(self.lengths)])])

    @property
    def tokens(self) -> int:
        """Tokens of the whole trie."""
        return int(self._total[-1])

    def depth(self, part: Range) -> int:
        """Length of the prefix that all of a range share."""
        first, last = part
        return int(self.lengths[first] if last - first == 1 else self.shared[first + 1 : last].min())

    def new(self, part: Range, depth: int) -> int:
        """Tokens of a range below a path of `depth` tokens that they share."""
        first, last = part
        return int(self.lengths[first] - depth + self._total[last] - self._total[first + 1])

    def size(self, ranges: list[Range]) -> int:
        """Tokens of a tree of these ranges."""
        return sum(self.new(part, shared) for part, shared in self.joined(ranges))

    def joined(self, ranges: list[Range]) -> list[tuple[Range, int]]:
        """Ranges in order, each with the length of the prefix that it shares with the range before."""
        ranges = sorted(ranges)
        before = [0, *(int(self.shared[a[1] : b[0] + 1].min()) for a, b in pairwise(ranges))]
        return list(zip(ranges, before, strict=True))


def pack(trie: Trie, length: int, tree: int) -> list[Row]:
    """Rows of `length` tokens that hold every sequence, in trees of about `tree` tokens.

    Small trees keep attention short, large ones share more. Raises ValueError for an empty sequence or one longer than a row.
    """
    if len(trie.lengths) and not 0 < trie.lengths.min() <= trie.lengths.max() <= length:
        raise ValueError(f"sequences of {trie.lengths.min()} to {trie.lengths.max()} tokens do not fit rows of {length}")
    trees = _split(trie, tree, length)
    sizes = [trie.size(ranges) for ranges in trees]
    return [_lay_out(trie, [trees[i] for i in group], length) for group in best_fit(sizes, length)]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _split(trie: Trie, tree: int, length: int) -> list[list[Range]]:
    """Trees of at most `tree` tokens, or of more where the path that is repeated is long; never more than a row."""
    trees: list[list[Range]] = []
    pending = [(0, len(trie.sorted))] if trie.sorted else []
    while pending:
        part = pending.pop()
        depth = trie.depth(part)
        limit = min(length, max(tree, REPEAT * depth))
        if part[1] - part[0] == 1 or trie.new(part, 0) <= limit:
            trees.append([part])
            continue
        first, last = part
        cuts = [first, *(first + 1 + np.flatnonzero(trie.shared[first + 1 : last] == depth)), last]
        children = [(int(a), int(b)) for a, b in pairwise(cuts)]
        small = [child for child in children if trie.new(child, 0) <= limit]
        pending += [child for child in children if trie.new(child, 0) > limit]
        groups = best_fit([trie.new(child, depth) for child in small], limit - depth)
        trees += [[small[i] for i in group] for group in groups]
    return trees


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of items by their index: largest first, each into the fullest bin that it fits (best-fit decreasing)."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, bin), sorted
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect_left(free, (sizes[item], -1))
        room, index = free.pop(at) if at < len(free) else (capacity, len(bins))
        if index == len(bins):
            bins.append([])
        bins[index].append(item)
        insort(free, (room - sizes[item], index))
    return bins


def _lay_out(trie: Trie, trees: list[list[Range]], length: int) -> Row:
    tokens, position = np.zeros((2, length), np.int32)
    end = np.arange(1, length + 1, dtype=np.int32)
    members, paths = [], []
    at = 0
    for tree in trees:
        path = np.zeros(0, np.int32)
        for part, joint in trie.joined(tree):
            for k in range(*part):
                shared = joint if k == part[0] else int(trie.shared[k])
                end[path[shared:]] = at
                new = trie.sorted[k][shared:]
                here = np.arange(at, at + len(new), dtype=np.int32)
                tokens[here], position[here] = new, np.arange(shared, shared + len(new))
                path = np.concatenate([path[:shared], here])
                members.append(trie.order[k])
                paths.append(path)
                at += len(new)
        end[path] = at
    return Row(tokens, position, end, at, members, paths)

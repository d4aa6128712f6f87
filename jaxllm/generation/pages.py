"""The pages of the KV cache: who holds which, and which may be shared.

Plain Python. A page that is full holds the keys of its tokens after those before it: a node of a tree of whole pages of tokens,
compared token by token and not by a hash alone. A sequence that begins with the same pages holds the same ones. What nobody
holds any more stays until its page is needed, and what was used longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from jaxllm.buckets import PAGE, pages_held, pages_of

NOBODY = 0  # the page that no sequence holds: rows without one write there
ROOT = 0  # the node of no tokens

Tokens = Sequence[int]


class PagePool:
    """The pages of one group of layers on one data shard."""

    def __init__(self, pages: int):
        """`pages`: NOBODY included."""
        self.pages = pages
        self.holders = [0] * pages  # sequences that hold each page
        self.nodes: list[int | None] = [None] * pages  # what each page is known to hold
        self.page_of: dict[int, int] = {}  # the page of a node
        self.unused: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, pages))  # held by nobody, the next to go first

    @property
    def free(self) -> int:
        """Pages that can be taken, those that are known included."""
        return len(self.unused)

    def take(self) -> int:
        """A page for one sequence; what it held is forgotten. There must be a free one."""
        page, _ = self.unused.popitem(last=False)
        self.forget(page)
        self.holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more sequence holds a page that is known."""
        if not self.holders[page]:
            del self.unused[page]
        self.holders[page] += 1

    def give_back(self, page: int) -> None:
        """One sequence less holds it. Of those that nobody holds, a page that is not known goes first."""
        self.holders[page] -= 1
        if not self.holders[page]:
            self.unused[page] = None
            if self.nodes[page] is None:
                self.unused.move_to_end(page, last=False)

    def know(self, page: int, node: int) -> None:
        """The page holds a node of the tree, unless another does."""
        if node not in self.page_of:
            self.page_of[node], self.nodes[page] = page, node

    def forget(self, page: int) -> None:
        """What the page holds is not to be shared any more."""
        node, self.nodes[page] = self.nodes[page], None
        if node is not None:
            del self.page_of[node]


@dataclass(eq=False)
class HeldPages:
    """The pages of one sequence.

    Attributes:
      pages: of each group, for each PAGE tokens; NOBODY: given back, or not there.
      nodes: where in the tree it stands: the root, and the nodes of its first full pages, as far as they are known.
    """

    pages: tuple[list[int], ...]
    nodes: list[int]

    def reaches(self, tokens: int) -> bool:
        """Is there room for so many tokens?"""
        return len(self.pages[0]) * PAGE >= tokens


class PageTable:
    """The pages of one data shard, for each group of layers, and the tree of what they hold.

    Args:
      pages: of each group by its window, NOBODY included.
      sharing: sequences with the same beginning hold the same pages.
    """

    def __init__(self, pages: dict[int | None, int], *, sharing: bool = True):
        self.windows, self.pools = tuple(pages), tuple(PagePool(n) for n in pages.values())
        self.sharing = sharing
        self._tree: dict[tuple[int, tuple[int, ...]], int] = {}
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._numbers = count(ROOT + 1)

    def find(self, tokens: Tokens, root: int = ROOT) -> list[int]:
        """The root, and nodes of the longest beginning of `tokens`, in whole pages, whose keys are here; never of all tokens."""
        nodes = [root]
        if self.sharing:
            for i in range((len(tokens) - 1) // PAGE):
                node = self._tree.get((nodes[-1], tuple(tokens[i * PAGE : (i + 1) * PAGE])))
                if node is None:
                    break
                nodes.append(node)
        while not self._are_here(nodes[1:]):
            nodes.pop()
        return nodes

    def _are_here(self, nodes: list[int]) -> bool:
        """Can a sequence go on after these? With a window it needs no more than the pages in it."""
        for window, pool in zip(self.windows, self.pools, strict=True):
            seen = nodes[_first_seen(window, len(nodes) * PAGE) :]
            if not all(node in pool.page_of for node in seen):
                return False
        return True

    def missing(self, held: HeldPages, tokens: int) -> tuple[int, ...]:
        """Pages of each group, at most, that a sequence with `held` lacks to have room for so many tokens."""
        lacking = [pages_of(tokens) - len(pages) for pages in held.pages]
        return tuple(min(max(n, 0), pages_held(window, tokens)) for n, window in zip(lacking, self.windows, strict=True))

    def has(self, wanted: Iterable[int]) -> bool:
        """Are there so many free pages of each group?"""
        return all(n <= pool.free for n, pool in zip(wanted, self.pools, strict=True))

    def begin(self, nodes: list[int]) -> HeldPages:
        """Hold the pages of what was found."""
        held, nodes = HeldPages(tuple([] for _ in self.pools), list(nodes)), nodes[1:]
        for window, pool, pages in zip(self.windows, self.pools, held.pages, strict=True):
            seen = _first_seen(window, len(nodes) * PAGE)
            pages += [NOBODY] * seen
            for node in nodes[seen:]:
                pages.append(pool.page_of[node])
                pool.share(pages[-1])
        return held

    def extend(self, held: HeldPages, tokens: int) -> None:
        """Take pages until there is room for so many tokens; there must be as many as `missing` says."""
        for pool, pages in zip(self.pools, held.pages, strict=True):
            while len(pages) < pages_of(tokens):
                pages.append(pool.take())

    def know(self, held: HeldPages, tokens: Tokens, cached: int) -> None:
        """The first `cached` of its tokens are in its pages: those that are full may be shared."""
        if not self.sharing:
            return
        for i in range(len(held.nodes) - 1, cached // PAGE):
            key = (held.nodes[-1], tuple(tokens[i * PAGE : (i + 1) * PAGE]))
            node = self._tree.get(key)
            if node is None:
                node = self._tree[key] = next(self._numbers)
                self._keys[node] = key
            held.nodes.append(node)
            for pool, pages in zip(self.pools, held.pages, strict=True):
                if pages[i] != NOBODY:
                    pool.know(pages[i], node)
        if len(self._tree) > 2 * sum(pool.pages for pool in self.pools):
            self._prune()

    def leave_window(self, held: HeldPages, cached: int) -> None:
        """Give back the pages that no token from position `cached` on sees."""
        for window, pool, pages in zip(self.windows, self.pools, held.pages, strict=True):
            for i in range(_first_seen(window, cached) - 1, -1, -1):
                if pages[i] == NOBODY:
                    break
                pool.give_back(pages[i])
                pages[i] = NOBODY

    def release(self, held: HeldPages) -> None:
        """Give back all pages, the last first: a beginning is worth more than what follows it."""
        for pool, pages in zip(self.pools, held.pages, strict=True):
            for page in reversed(pages):
                if page != NOBODY:
                    pool.give_back(page)
            pages.clear()
        del held.nodes[1:]

    def clear(self) -> None:
        """Forget what the pages hold: the arrays are lost. Whoever holds some gives them back as ever."""
        self._tree.clear()
        self._keys.clear()
        for pool in self.pools:
            for page in list(pool.page_of.values()):
                pool.forget(page)

    def _prune(self) -> None:
        """Drop the nodes that no page holds."""
        here = {node for pool in self.pools for node in pool.page_of}
        self._keys = {node: key for node, key in self._keys.items() if node in here}
        self._tree = {key: node for node, key in self._keys.items()}

    def check_integrity(self, everyone: Iterable[HeldPages]) -> None:
        """Every page is held by as many as say so, or free; what is known is known both ways. Raises AssertionError."""
        holding = list(everyone)
        for group, pool in enumerate(self.pools):
            held = [0] * pool.pages
            for one in holding:
                for page in one.pages[group]:
                    held[page] += page != NOBODY
            assert held == pool.holders, "a page is held by others than it knows"
            assert set(pool.unused) == {page for page in range(1, pool.pages) if not held[page]}, (
                "a page is lost, or free and held"
            )
            known = {node: page for page, node in enumerate(pool.nodes) if node is not None}
            assert known == pool.page_of, "a page holds another node than the tree says"


def _first_seen(window: int | None, position: int) -> int:
    """The first page that a token at this position sees, or any after it."""
    return 0 if window is None else max(position - window + 1, 0) // PAGE

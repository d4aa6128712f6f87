"""Pages: each is held by whom it says, and shared where the tokens are the same."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from jaxllm.buckets import PAGE, pages_held, pages_of
from jaxllm.generation.pages import NOBODY, ROOT, HeldPages, PageTable

pytestmark = pytest.mark.fast


def taken(table: PageTable, tokens: list[int]) -> HeldPages:
    """Pages for the tokens, as of a sequence that is prefilled."""
    held = table.begin(table.find(tokens))
    table.extend(held, len(tokens))
    table.know(held, tokens, len(tokens))
    return held


def test_equal_beginnings_share_whole_pages() -> None:
    table = PageTable({None: 20})
    one = taken(table, [1] * (3 * PAGE) + [5])
    other = taken(table, [1] * (2 * PAGE) + [2] * PAGE + [5])
    assert one.pages[0][:2] == other.pages[0][:2] and not set(one.pages[0][2:]) & set(other.pages[0][2:])
    assert table.find([1] * (2 * PAGE)) == one.nodes[:2]  # the last token is always computed
    assert table.find([1] * (PAGE - 1)) == [ROOT]
    assert table.find([1] * (3 * PAGE) + [5], root=-1) == [-1]  # turned otherwise
    table.check_integrity([one, other])


def test_what_was_used_longest_ago_goes_first_and_ends_before_beginnings() -> None:
    table = PageTable({None: 8})
    a, b = [1] * (3 * PAGE + 1), [2] * (2 * PAGE + 1)
    for tokens in (a, b):
        table.release(taken(table, tokens))
    assert table.pools[0].free == 7
    assert (len(table.find(a)), len(table.find(b))) == (4, 3)
    table.release(taken(table, [3] * (3 * PAGE)))  # two that held nothing, and one of `a`
    assert (len(table.find(a)), len(table.find(b))) == (3, 3)
    again = taken(table, a)
    table.check_integrity([again])
    table.release(again)


def test_a_page_that_falls_out_of_a_window_is_free_and_may_still_be_shared() -> None:
    window = 2 * PAGE
    table = PageTable({None: 40, window: 10})
    tokens = [7] * (6 * PAGE + 1)
    held = taken(table, tokens)
    table.leave_window(held, 6 * PAGE)
    assert held.pages[1][:4] == [NOBODY] * 4 and NOBODY not in held.pages[0]
    assert len(held.pages[1]) - 4 <= pages_held(window, len(tokens))
    other = table.begin(table.find(tokens))
    assert other.pages[1][4:] == held.pages[1][4:6] and other.pages[0] == held.pages[0][:6]
    table.check_integrity([held, other])
    table.release(held)
    table.release(other)
    for _ in range(9):  # all the pages of the window's group for something else
        table.pools[1].take()
    assert table.find(tokens) == [ROOT]  # without them, the other group's are of no use


class Model(RuleBasedStateMachine):
    """Random sequences over a small pool, beside what each page ought to hold."""

    def __init__(self) -> None:
        super().__init__()
        self.table = PageTable({None: 12, 96: 9})
        self.held: list[tuple[HeldPages, list[int]]] = []
        self.content: list[dict[int, tuple[int, ...]]] = [{}, {}]  # of each group, the tokens up to a page's end

    @rule(kinds=st.lists(st.integers(0, 1), min_size=1, max_size=4), rest=st.integers(1, PAGE))
    def begin(self, kinds: list[int], rest: int) -> None:
        tokens = [kind for kind in kinds[:-1] for _ in range(PAGE)] + [kinds[-1]] * rest
        held = self.table.begin(self.table.find(tokens))
        shared = (len(held.nodes) - 1) * PAGE
        for pages, content in zip(held.pages, self.content, strict=True):
            for i, page in enumerate(pages):
                assert page == NOBODY or content[page] == tuple(tokens[: (i + 1) * PAGE])
        self._grow(held, tokens, shared)

    @rule(which=st.integers(0, 9), more=st.integers(1, 2 * PAGE), kind=st.integers(0, 1))
    def grow(self, which: int, more: int, kind: int) -> None:
        if which < len(self.held):
            held, tokens = self.held.pop(which)
            self._grow(held, tokens + [kind] * more, len(tokens))

    def _grow(self, held: HeldPages, tokens: list[int], cached: int) -> None:
        self.table.leave_window(held, cached)
        if not self.table.has(self.table.missing(held, len(tokens))):
            self.table.release(held)
            return
        self.table.extend(held, len(tokens))
        self.table.know(held, tokens, len(tokens))
        for pages, content in zip(held.pages, self.content, strict=True):
            for i in range(cached // PAGE, pages_of(len(tokens))):
                assert pages[i] != NOBODY
                content[pages[i]] = tuple(tokens[: (i + 1) * PAGE])
        self.held.append((held, tokens))

    @rule(which=st.integers(0, 9))
    def release(self, which: int) -> None:
        if which < len(self.held):
            self.table.release(self.held.pop(which)[0])

    @rule()
    def lose_all(self) -> None:
        self.table.clear()

    @invariant()
    def holds(self) -> None:
        self.table.check_integrity(held for held, _ in self.held)
        for held, tokens in self.held:
            for pages, content, window in zip(held.pages, self.content, self.table.windows, strict=True):
                for i, page in enumerate(pages):
                    assert page != NOBODY or window is not None
                    if page != NOBODY and (i + 1) * PAGE <= len(tokens):
                        assert content[page] == tuple(tokens[: (i + 1) * PAGE])


TestPages = Model.TestCase
TestPages.settings = settings(max_examples=400, stateful_step_count=50, deadline=None)  # 20,000 operations


@given(st.integers(1, 5000), st.integers(1, 3000))
def test_a_window_needs_no_more_pages_than_it_says(length: int, window: int) -> None:
    assert pages_held(window, length) <= pages_held(None, length) == pages_of(length)

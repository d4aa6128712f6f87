"""Texts as token ids where a tokenizer has more than one way for them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from jaxllm.requests.encoding import bad_word_ids
from jaxllm.requests.outputs import RequestError

pytestmark = pytest.mark.fast

WORDS = ["no", " no", " way", " New", "New", " York", "ß", " ", "s", "pace"]


class Words:
    """A tokenizer of WORDS, each with the space before it that it has there; other letters are lost."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        longest_first = sorted(WORDS, key=len, reverse=True)
        return {"input_ids": [WORDS.index(word) for word in re.findall("|".join(longest_first), text)]}


def ids(*words: str) -> list[int]:
    return [WORDS.index(word) for word in words]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["no"], [ids("no"), ids(" no")]),
        (["  no"], [ids("no"), ids(" no")]),  # spaces before it make no other word
        (["New York"], [ids("New", " York"), ids(" New", " York")]),
        (["space"], [ids("s", "pace")]),  # after a space it is one token longer, and its last are these
        (["no", "no", "New"], [ids("no"), ids(" no"), ids("New"), ids(" New")]),
        ([], []),
    ],
)
def test_a_bad_word_is_one_at_the_start_and_after_a_space(words: Sequence[str], found: list[list[int]]) -> None:
    assert bad_word_ids(Words(), words) == found


def test_a_bad_word_without_a_token_is_refused() -> None:
    with pytest.raises(RequestError, match="bad_words holds 'xyz', of which the tokenizer makes no token: leave it out"):
        bad_word_ids(Words(), ["no", "xyz"])

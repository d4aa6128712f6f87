"""Text that grows token by token is the text of all the tokens, and what has been shown is never taken back."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.checkpoint import open_checkpoint
from checkpoints.errors import CheckpointError
from checkpoints.hub import resolve
from jaxllm.generation.detokenizer import Detokenizer

TEXTS = [
    "The capital of France is Paris.",
    " leading and  double   spaces \n\n and\ttabs",
    "naïve café, Привет мир, 東京都, नमस्ते, ﷽",
    "👩‍👩‍👧‍👦 family, flags 🇨🇭🇯🇵, 😀😀 and é composed of e\u0301",
    "def f(x):\n    return {'a': [1, 2.5]}  # done",
    "\N{REPLACEMENT CHARACTER} is a character too",
]


@cache
def tokenizer() -> Any:
    try:
        path = resolve("smollm2-135m")
    except CheckpointError as error:
        pytest.skip(f"the SmolLM2 checkpoint cannot be fetched: {error}")
    return open_checkpoint(path).tokenizer()


def ids_of(text: str) -> list[int]:
    return list(tokenizer()(text)["input_ids"])


def detokenizer(prompt: list[int], *stops: str, skip: bool = True) -> Detokenizer:
    return Detokenizer(tokenizer(), prompt, stops, skip)


def text_of(tokens: list[int], prompt: list[int] | None = None) -> str:
    growing = detokenizer(prompt or [])
    for token in tokens:
        growing.push(token)
    growing.finish()
    return growing.text


@pytest.mark.parametrize("text", TEXTS)
def test_token_by_token_is_the_whole_text(text: str) -> None:
    tokens = ids_of(text)
    assert tokenizer().decode(tokens) == text  # the tokenizer itself loses nothing
    assert text_of(tokens) == text
    for cut in range(1, len(tokens)):
        prompt, rest = tokens[:cut], tokens[cut:]
        before = tokenizer().decode(prompt)
        if text.startswith(before):  # else the prompt ends within a character
            assert text_of(rest, prompt) == text[len(before) :]


def test_no_piece_of_a_character_is_shown() -> None:
    tokens = ids_of("😀 東 e\u0301 👩‍👩‍👧‍👦")
    growing, shown = detokenizer([]), ""
    for token in tokens:
        growing.push(token)
        assert "\N{REPLACEMENT CHARACTER}" not in growing.text
        assert growing.text.startswith(shown)
        shown = growing.text
    held = [i for i in range(1, len(tokens)) if tokenizer().decode(tokens[:i]).endswith("\N{REPLACEMENT CHARACTER}")]
    assert held  # the text has tokens that end within a character


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    tokens = ids_of("a😀")[:-1]
    growing = detokenizer([])
    for token in tokens:
        growing.push(token)
    assert growing.text == "a"
    assert not growing.finish()
    assert growing.text == tokenizer().decode(tokens) != "a"


def test_special_tokens_are_left_out_or_not() -> None:
    tokens = [*ids_of("Hello"), tokenizer().eos_token_id, *ids_of(" there")]
    for skip, expected in ((True, "Hello there"), (False, f"Hello{tokenizer().eos_token} there")):
        growing = detokenizer([], skip=skip)
        for token in tokens:
            growing.push(token)
        assert growing.text == expected


def test_a_stop_string_across_tokens_ends_the_text_before_it() -> None:
    tokens = ids_of("One two, three four five")
    pieces = [tokenizer().decode([token]) for token in tokens]
    assert not any("o, th" in piece for piece in pieces)
    growing = detokenizer([], "o, th", "five")
    done = [growing.push(token) for token in tokens[: pieces.index(" three") + 1]]
    assert done == [False] * (len(done) - 1) + [True]
    assert (growing.text, growing.stopped_by) == ("One tw", "o, th")
    assert growing.settled == growing.text


def test_a_stop_string_can_be_part_of_the_text() -> None:
    tokens = ids_of("One two, three four five")
    growing = Detokenizer(tokenizer(), [], ("o, th", "five"), True, include_stop=True)
    for token in tokens:
        if growing.push(token):
            break
        assert growing.settled == growing.text  # nothing is taken back
    assert (growing.text, growing.stopped_by) == ("One two, th", "o, th")


def test_the_first_of_several_stop_strings_counts() -> None:
    growing = detokenizer([], "dog", "quick", "ck br")
    for token in ids_of("The quick brown dog"):
        if growing.push(token):
            break
    assert (growing.text, growing.stopped_by) == ("The ", "quick")


def test_a_stop_string_held_with_an_unfinished_character_is_found_at_the_end() -> None:
    class Bytes:
        """Token i is the byte i."""

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode(errors="replace")

    growing = Detokenizer(Bytes(), [], ("b\N{REPLACEMENT CHARACTER}",), True)
    assert not any(growing.push(token) for token in b"ab\xf0")
    assert growing.finish()
    assert growing.text == "a"


words = st.text(alphabet="ab ,é😀東", min_size=1, max_size=12)


@settings(deadline=None, max_examples=150)
@given(words, st.lists(st.text(alphabet="ab ,é😀東", min_size=1, max_size=4), max_size=3))
def test_settled_text_is_never_taken_back(text: str, stops: list[str]) -> None:
    tokens = ids_of(text)
    growing, shown = detokenizer([], *stops), ""
    for token in tokens:
        ended = growing.push(token)
        now = growing.text if ended else growing.settled
        assert now.startswith(shown)
        shown = now
        if ended:
            break
    else:
        growing.finish()
    assert growing.text.startswith(shown)
    first = min((text.find(stop) for stop in stops if stop in text), default=-1)
    if first < 0:
        assert growing.stopped_by is None and growing.text == text
    else:
        assert growing.stopped_by in stops
        # A longer stop string that begins earlier may be cut short by one that is complete sooner.
        assert text.startswith(growing.text + str(growing.stopped_by)) and not any(stop in growing.text for stop in stops)
    if not stops:
        assert shown == text


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 49151), max_size=12), st.integers(0, 6))
def test_any_tokens_are_the_whole_text(tokens: list[int], cut: int) -> None:
    whole = tokenizer().decode(tokens, skip_special_tokens=True)
    prompt = tokens[:cut]
    before = tokenizer().decode(prompt, skip_special_tokens=True)
    if "\N{REPLACEMENT CHARACTER}" not in before:
        assert before + text_of(tokens[cut:], prompt) == whole

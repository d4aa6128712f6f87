"""The delimiter between a question's query and a choice, put before the choice and scored with it.

lm-eval puts its `target_delimiter`, a space by default, before every choice. Files also come with the space in the choices or at
the query's end; a second one is scored without complaint, up to 13 nats away. So by default there is a space only where neither
text has white space at the joint, and `describe` says what was done.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

# How Unicode names the letters of scripts that are written without spaces between words.
WITHOUT_SPACES = ("BOPOMOFO", "CJK", "HIRAGANA", "KATAKANA", "KHMER", "LAO", "MYANMAR", "THAI", "TIBETAN")


def delimiter_for(query: str, choice: str, given: str | None) -> str:
    """`given`, or without it a space where the texts have none of their own."""
    if given is not None:
        return given
    return "" if _own_space(query, choice) else " "


def describe(pairs: Sequence[tuple[str, str]], given: str | None) -> str:
    """A line that says which delimiters stand before the choices of these (query, choice)."""
    if given is not None:
        return f"delimiter: {given!r} before each of {len(pairs)} choices"
    reasons = Counter(_own_space(*pair) for pair in pairs)
    spaced = reasons.pop("", 0)
    said = [f"a space before {spaced} of {len(pairs)} choices", *(f"none before {n} ({why})" for why, n in reasons.items())]
    if unspaced := sum(not _own_space(*pair) and _unspaced_script(pair[1]) for pair in pairs):
        said.append(f"{unspaced} with a space begin in a script without spaces: --delimiter '' leaves it out")
    return f"delimiter: {'; '.join(said)}"


def _own_space(query: str, choice: str) -> str:
    """The reason for which no space is put between them; empty where one is."""
    if not query:
        return "the query is empty"
    if query[-1].isspace():
        return "the query ends in white space"
    return "the choice begins with white space" if choice[0].isspace() else ""


def _unspaced_script(choice: str) -> bool:
    first = next((char for char in choice if char.isalnum()), "")
    return bool(first) and unicodedata.name(first, "").startswith(WITHOUT_SPACES)

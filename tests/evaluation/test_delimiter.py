"""The delimiter between a query and a choice, and its description."""

from __future__ import annotations

import pytest

from jaxllm.evaluation.delimiter import delimiter_for, describe

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("query", "choice", "expected"),
    [
        ("Answer:", "A", " "),
        ("Answer:", " A", ""),
        ("Answer:", "\nA", ""),
        ("Answer: ", "A", ""),
        ("Answer:\n", "A", ""),
        ("Answer:\u3000", "A", ""),
        ("", "A", ""),
        ("", " A", ""),
        ("首都是", "北京", " "),  # said, and left to the user
    ],
)
def test_a_space_is_put_where_the_texts_have_none(query: str, choice: str, expected: str) -> None:
    assert delimiter_for(query, choice, None) == expected
    assert delimiter_for(query, choice, "\n") == "\n"
    assert delimiter_for(query, choice, "") == ""


def test_what_was_assumed_is_said() -> None:
    assert describe([("q", "A"), ("q", "B")], None) == "delimiter: a space before 2 of 2 choices"
    assert describe([("q", "A"), ("q", " B"), ("", "C"), ("q ", "D"), ("q ", "E")], None) == (
        "delimiter: a space before 1 of 5 choices; none before 1 (the choice begins with white space); "
        "none before 1 (the query is empty); none before 2 (the query ends in white space)"
    )
    assert describe([("q", "A"), ("q", " B")], "\n") == r"delimiter: '\n' before each of 2 choices"
    assert describe([("首都是", "北京")], "") == "delimiter: '' before each of 1 choices"


@pytest.mark.parametrize("choice", ["北京", "「東京」", "ひらがな", "カタカナ", "ภาษาไทย", "ភាសាខ្មែរ"])
def test_a_space_before_a_script_without_spaces_is_hinted_at(choice: str) -> None:
    said = describe([("q", choice), ("q", "A"), ("q ", choice)], None)
    assert said.endswith("; 1 with a space begin in a script without spaces: --delimiter '' leaves it out")
    assert "script" not in describe([("q", choice)], " ")


@pytest.mark.parametrize("choice", ["한국어", "Ελληνικά", "42", "?", "هذا"])
def test_scripts_with_spaces_give_no_hint(choice: str) -> None:
    assert describe([("q", choice)], None) == "delimiter: a space before 1 of 1 choices"

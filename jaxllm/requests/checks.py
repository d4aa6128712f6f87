"""The types of what users give: each check returns the value as plain Python, or raises RequestError naming the argument."""

from __future__ import annotations

import difflib
import numbers
import operator
from collections.abc import Collection, Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

from jaxllm.requests.outputs import RequestError

_LARGEST = (1 << 31) - 1  # of what becomes an int32 on a device
_SHOWN = 60  # characters of a value in a message


def whole(name: str, value: Any) -> int:
    """A whole number, numpy's among them; no bool, and no float even where it has no fraction."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise RequestError(f"{name}={shown(value)} is of type {type(value).__name__}: give a whole number")


def language_model(path: Path, labels: int | None) -> None:
    """Raises RequestError for a classifier of so many labels, or a model of 0, which has no head at all."""
    if labels is not None:
        door = f"a classifier of {labels} labels: use LLM.classify" if labels else "without a head: use LLM.embed"
        raise RequestError(f"{path} is no language model but {door}")


def count(name: str, value: Any) -> int:
    """A whole number of 31 bits."""
    if abs(found := whole(name, value)) > _LARGEST:
        raise RequestError(f"{name}={found}: a number from 0 to {_LARGEST}")
    return found


def number(name: str, value: Any) -> float:
    """A real number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RequestError(f"{name}={shown(value)} is of type {type(value).__name__}: give a number")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise RequestError(f"{name}={shown(value)} is of type {type(value).__name__}: give True or False")
    return value


def text(name: str, value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise RequestError(f"{name}={shown(value)} is of type {type(value).__name__}: give a text")
    return value


def texts(name: str, value: Any) -> str | list[str]:
    """A text, or a list of texts."""
    if isinstance(value, str):
        return value
    return [text(f"{name}[{i}]", one) for i, one in enumerate(items(name, value, "a text or a list of texts"))]


def list_of_texts(name: str, value: Any) -> list[str]:
    """A list of texts, and no single one."""
    return [text(f"{name}[{i}]", one) for i, one in enumerate(items(name, value, "a list of texts"))]


def token_ids(name: str, value: Any, wanted: str = "a list of token ids") -> list[int]:
    """A list of whole numbers; an array is one too. `wanted` is what the message asks for."""
    ids = items(name, value, wanted)
    if all(type(one) is int for one in ids):  # nearly always, and millions of them are scored in one call
        return ids
    return [whole(f"{name}[{i}]", one) for i, one in enumerate(ids)]


def biases(name: str, value: Any) -> dict[int, float]:
    """A dict from token ids to numbers."""
    if not isinstance(value, Mapping):
        raise RequestError(f"{name}={shown(value)} is of type {type(value).__name__}: give a dict, token id -> number")
    return {whole(f"a token id of {name}", token): number(f"{name}[{token}]", bias) for token, bias in value.items()}


def items(name: str, value: Any, wanted: str) -> list[Any]:
    """The items of a list, a tuple, an array or the like; `wanted` is what the message asks for."""
    if isinstance(value, (str, bytes, bytearray, Mapping, set, frozenset)) or not _is_list(value):
        raise RequestError(f"{name}={shown(value)} is of type {type(value).__name__}: give {wanted}")
    return list(value)


def _is_list(value: Any) -> bool:
    # An array of no dimension has the methods of a list and fails in them.
    return isinstance(value, Iterable) and isinstance(value, Sized) and getattr(value, "ndim", 1) > 0


def shown(value: Any) -> str:
    """A value as a message has it: in one line, not too long."""
    said = repr(value).replace("\n", " ")
    return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}..."


def refuse_unknown(owner: str, given: Iterable[str], known: Collection[str], elsewhere: Mapping[str, str]) -> None:
    """Raises RequestError for a name that `owner` does not take; `elsewhere` says what takes the place of some."""
    for name in given:
        if name in known:
            continue
        similar = difflib.get_close_matches(name, known, n=1)
        remedy = f"is it {similar[0]}?" if similar else f"there are {', '.join(known)}"
        raise RequestError(f"{owner} has no argument {name!r}: {elsewhere.get(name, remedy)}")

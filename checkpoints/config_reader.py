"""Reading a published config so that nothing in it is skipped by accident."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from checkpoints.errors import CheckpointError, listed

T = TypeVar("T", bool, int, float, str, dict, list)
LARGEST_JSON = 1 << 24  # bytes: the largest index there is has half as many, and a list in memory takes 25 times its text
_DEEPEST = 32
_LARGEST_SIZE = (1 << 31) - 1
_LARGEST_FLOAT = sys.float_info.max


class ConfigReader:
    """A dictionary that must be read to its last key.

    Each key is taken, ignored because it cannot change what the model computes, or accepted at one value alone; what is `left`
    then is for `finish` to refuse, or for `checkpoints.families.judge`. Every method raises CheckpointError with `where` and the
    key.

    Attributes:
      unread: keys of dictionaries within this one that are accepted although nobody reads them.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._left = dict(values)
        self.where = where
        self.unread: list[str] = []

    def part(self, values: Mapping[str, Any], name: str = "") -> ConfigReader:
        """A reader of a dictionary within this one; what it leaves unread is this one's."""
        part = ConfigReader(values, f"{self.where}: {name}" if name else self.where)
        part.unread = self.unread
        return part

    def required(self, key: str, kind: type[T]) -> T:
        """The value of `key`, which must be there."""
        value = self.optional(key, kind)
        if value is None:
            raise CheckpointError(f"{self.where}: `{key}` is missing; add it, or fetch the file again")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number of 31 bits; required when there is no default, which also stands for null."""
        value = self.required(key, int) if default is None else self.optional(key, int)
        value = default if value is None else value
        if value is None or not 1 <= value <= _LARGEST_SIZE:
            raise CheckpointError(f"{self.where}: `{key}` is {value}, which is not a size; it must be 1 to {_LARGEST_SIZE}")
        return value

    def size_if_there(self, key: str, default: int) -> int:
        """The same, but that null stands for nothing; the default when the key is absent."""
        return self.size(key) if key in self._left else default

    def take(self, key: str, default: T) -> T:
        """The value of `key`, of the default's type; the default when the key is absent."""
        if key not in self._left:
            return default
        return self.required(key, type(default))

    def optional(self, key: str, kind: type[T]) -> T | None:
        """The value of `key`, None when it is absent or null."""
        return None if (value := self.raw(key)) is None else self._checked(key, value, kind)

    def nullable(self, key: str, default: T) -> T | None:
        """The value of `key`, of the default's type; None when it is null, the default when it is absent."""
        return self.optional(key, type(default)) if key in self._left else default

    def above_zero(self, key: str, default: float) -> float:
        """A number above zero; the default when the key is absent."""
        value = self.take(key, default)
        if value <= 0:
            raise CheckpointError(f"{self.where}: `{key}` is {value}; it must be above 0")
        return value

    def nullable_size(self, key: str, default: int | None = None) -> int | None:
        """A size; None when it is null, the default when it is absent."""
        value = self.optional(key, int) if key in self._left else default
        if value is not None and value < 1:
            raise CheckpointError(f"{self.where}: `{key}` is {value}; it must be at least 1, or null")
        return value

    @property
    def left(self) -> set[str]:
        """Keys that have not been read."""
        return set(self._left)

    def has(self, key: str) -> bool:
        """Whether `key` is there and has not been read."""
        return key in self._left

    def raw(self, key: str) -> Any:
        """The value of `key` of any type, None when it is absent."""
        return self._left.pop(key, None)

    def ignore(self, *keys: str) -> None:
        """Accept these keys at any value: they have no effect on what the model computes."""
        for key in keys:
            self._left.pop(key, None)

    def ignore_prefix(self, prefix: str) -> None:
        """Ignore every key that starts so."""
        self.ignore(*[key for key in self._left if key.startswith(prefix)])

    def ignore_at(self, **values: Any) -> None:
        """Accept these keys at these values without a word; at others they are left."""
        self.ignore(*[key for key, value in values.items() if key in self._left and _equal(self._left[key], value)])

    def leave_unread(self, name: str) -> None:
        """Accept whatever has not been read, as keys of `name` that nobody reads."""
        self.unread += [f"{name}.{key}" for key in sorted(self._left)]
        self._left.clear()

    def default(self, key: str, *values: Any) -> None:
        """Accept `key` at these values alone: any other asks for something this package does not do."""
        if key not in self._left:
            return
        given = self._left.pop(key)
        if not any(_equal(given, value) for value in values):
            supported = " or ".join(repr(value) for value in values)
            raise CheckpointError(f"{self.where}: `{key}` is {given!r}, and only {supported} is supported")

    def finish(self) -> None:
        """Refuse whatever has not been read."""
        if self._left:
            raise CheckpointError(
                f"{self.where}: unknown keys {listed(sorted(self._left))}; "
                "remove them if they do not change what the model computes"
            )

    def _checked(self, key: str, value: Any, kind: type[T]) -> T:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and (abs(value) == math.inf or value != value or (kind is float and abs(value) > _LARGEST_FLOAT)):
            raise CheckpointError(f"{self.where}: `{key}` is {value}, which is not a number to compute with; correct it")
        if kind is float and number:
            return kind(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.where}: `{key}` is {value!r}, which is not of type {kind.__name__}")
        return value


def _equal(given: Any, value: Any) -> bool:
    """Whether two values are equal; a bool is no number, though Python's equal one."""
    return bool(given == value) and isinstance(given, bool) == isinstance(value, bool)


def overlaid(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `overrides` laid over them: a mapping within is laid over that of its key, the rest takes its place."""
    if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
        raise CheckpointError(f"hf_overrides is {overrides!r}; give a mapping from keys of config.json to values")
    merged = dict(values)
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            old = values.get(key)
            value = overlaid(old if isinstance(old, Mapping) else {}, value)
        merged[key] = value
    return merged


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object, of a size and depth that configs have. Raises CheckpointError naming it."""
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise CheckpointError(f"{path} has {size} bytes, more than any config; fetch it again")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from error
    return parse_json(data, path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """The same from the text of a file."""
    try:
        values = json.loads(str(data, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object; fetch it again")
    if _is_deep(values):
        raise CheckpointError(f"{path} nests values more than {_DEEPEST} deep; fetch it again")
    return values


def _is_deep(value: Any) -> bool:
    """Whether a value is nested too deep to be printed or compared: Python does both by recursion."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [child for x in level if isinstance(x, (dict, list)) for child in (x.values() if isinstance(x, dict) else x)]
    return bool(level)

"""Reading a published config so that nothing in it is skipped by accident."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from checkpoints.errors import CheckpointError, listed

T = TypeVar("T", bool, int, float, str, dict, list)


class ConfigReader:
    """A dictionary that must be read to its last key.

    Each key is taken, ignored because it cannot change what the model computes, or accepted at one value alone;
    `finish` then refuses what is left. Every method raises CheckpointError with `where` and the key.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._left = dict(values)
        self.where = where

    def required(self, key: str, kind: type[T]) -> T:
        """The value of `key`, which must be there."""
        value = self.optional(key, kind)
        if value is None:
            raise CheckpointError(f"{self.where}: `{key}` is missing; add it, or fetch the file again")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number; required when there is no default, which also stands for null."""
        value = self.required(key, int) if default is None else self.optional(key, int)
        value = default if value is None else value
        if value is None or value < 1:
            raise CheckpointError(f"{self.where}: `{key}` is {value}, which is not a size; it must be at least 1")
        return value

    def take(self, key: str, default: T) -> T:
        """The value of `key`, of the default's type; the default when the key is absent."""
        if key not in self._left:
            return default
        return self.required(key, type(default))

    def optional(self, key: str, kind: type[T]) -> T | None:
        """The value of `key`, None when it is absent or null."""
        return None if (value := self.raw(key)) is None else self._checked(key, value, kind)

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

    def default(self, key: str, value: Any) -> None:
        """Accept `key` at this value alone: any other asks for something this package does not do."""
        if key not in self._left:
            return
        given = self._left.pop(key)
        if given != value or isinstance(given, bool) != isinstance(value, bool):
            raise CheckpointError(f"{self.where}: `{key}` is {given!r}, and only {value!r} is supported")

    def finish(self) -> None:
        """Refuse whatever has not been read."""
        if self._left:
            raise CheckpointError(
                f"{self.where}: unknown keys {listed(sorted(self._left))}; "
                "remove them if they do not change what the model computes"
            )

    def _checked(self, key: str, value: Any, kind: type[T]) -> T:
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.where}: `{key}` is {value!r}, which is not of type {kind.__name__}")
        return value


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises CheckpointError naming it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object; fetch it again")
    return values

"""A source whose tensors have other names in some files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from checkpoints.names import Rules
from checkpoints.source import Source


class RenamedSource(Source):
    """`source` with the names that `rules` know."""

    def __init__(self, source: Source, names: dict[str, str]):
        """`names`: name shown -> name in `source`."""
        super().__init__(Path(source.where))
        self.if_lacking, self.if_superfluous = source.if_lacking, source.if_superfluous
        self.version, self._source, self._names = source.version, source, names
        self.tensors = {new: source.tensors[old] for new, old in names.items()}
        self.unusable = {new: source.unusable[old] for new, old in names.items() if old in source.unusable}

    def origin(self, name: str) -> str:
        return self._names[name]

    def _box(self, name: str, slices: tuple[slice, ...]) -> tuple[np.ndarray, int]:
        return self._source._box(self._names[name], slices)


def renamed(source: Source, rules: Rules) -> Source:
    """`source`, where some of its tensors have names that `rules` rename; a name that is there already is not given twice."""
    names = {}
    for old in source.tensors:
        new = next((re.sub(pattern, to, old) for pattern, to in rules.renamed if re.fullmatch(pattern, old)), old)
        names[old if new in source.tensors else new] = old
    return RenamedSource(source, names) if any(new != old for new, old in names.items()) else source

"""What the parts find: a file of JSON lines that several processes append to, one after another."""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Results:
    """Rows of a file, each with the part it is of."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, part: str, row: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"part": part} | row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()] if self.path.exists() else []

    def done(self) -> set[str]:
        """Names of the parts that ran to their end."""
        return {row["part"] for row in self.rows() if row.get("done")}

    def ceiling(self, name: str) -> float | None:
        """A rate that the part `ceilings` has measured."""
        return next((row[name] for row in reversed(self.rows()) if name in row and row["part"] == "ceilings"), None)


class Reporter:
    """One part's way to the results."""

    def __init__(self, args: argparse.Namespace):
        self.results, self.part = Results(args.results), args.part

    def __call__(self, **row: Any) -> None:
        self.results.add(self.part, row)
        print(row)

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """What fails here is reported, and the part goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self(what=what, error=f"{type(error).__name__}: {error}"[:500])


def options_of_a_part(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--part", required=True)
    return parser


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, one a line, numbers short."""
    return "\n".join("  ".join(_cell(name, value) for name, value in row.items()) for row in rows if not row.get("kernels"))


def _cell(name: str, value: Any) -> str:
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"

"""What form an answer is held to, with the names that vLLM gave it. Plain Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from jaxllm.requests import checks
from jaxllm.requests.outputs import RequestError


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The form that an answer is held to, token by token: one of these.

    Attributes:
      json: a JSON schema, as a dict or a text.
      json_object: any JSON object.
      regex: a regular expression that the whole answer matches, in the syntax of Rust's `regex`.
      choice: one of these texts.
      grammar: a context-free grammar, in the form of Lark that llguidance reads.
    """

    json: Mapping[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) not in (None, False)]
        if len(given) != 1:
            said = f"has {' and '.join(given)}" if given else "is empty"
            raise RequestError(f"structured_outputs {said}: give one of {', '.join(field.name for field in fields(self))}")
        if self.json is not None and not isinstance(self.json, (str, Mapping)):
            raise RequestError(f"structured_outputs: json={checks.shown(self.json)}: give a JSON schema, as a dict or a text")
        for name in ("regex", "grammar"):
            if getattr(self, name) is not None:
                checks.text(f"structured_outputs.{name}", getattr(self, name))
        if self.choice is not None and not checks.list_of_texts("structured_outputs.choice", self.choice):
            raise RequestError("structured_outputs: choice is empty: give a text at least")


def structured_outputs(name: str, value: Any) -> StructuredOutputsParams:
    """What SamplingParams are given, a dict of the same names too."""
    if isinstance(value, StructuredOutputsParams):
        return value
    if not isinstance(value, Mapping):
        raise RequestError(f"{name}={checks.shown(value)}: give StructuredOutputsParams, or a dict of its names")
    known = [field.name for field in fields(StructuredOutputsParams)]
    checks.refuse_unknown(name, value, known, {})
    return StructuredOutputsParams(**value)

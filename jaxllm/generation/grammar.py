"""The tokens that a grammar allows next, as bits over the vocabulary: llguidance's, on the host."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.requests.outputs import RequestError
from jaxllm.requests.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

INSTALL = 'pip install "jaxllm[structured]"'
WORD = 32  # tokens of a mask's int32
# Without a bound a model may fill its answer with blanks, which JSON allows anywhere.
JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,20}"}


class GrammarError(RuntimeError):
    """A grammar that has failed while a request ran; it ends that request."""


class Grammar:
    """Where an answer stands in the form that it is held to.

    `mask`: a bit for each token of the vocabulary that may follow, in int32 [V / 32].
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self._matcher, self._words = matcher, -(-vocab_size // WORD)
        self.mask = self._first = self._allowed()

    @property
    def ended(self) -> bool:
        """Nothing can follow but the end."""
        return bool(self._matcher.is_stopped())

    def advance(self, token: int) -> None:
        """One more token. Raises GrammarError where the form does not allow it, or has grown beyond llguidance's limits."""
        self._matcher.consume_token(token)
        if not self.ended or self._matcher.is_error():
            self.mask = self._allowed()

    def copy(self) -> Grammar:
        """Another answer that stands where this one does, without compiling the form again."""
        other = copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    def reset(self) -> None:
        """Begin anew."""
        self._matcher.reset()
        self.mask = self._first

    def _allowed(self) -> np.ndarray:
        found = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: self._words]
        if self._matcher.is_error():
            raise GrammarError(f"the form of structured_outputs cannot be followed: {self._matcher.get_error()}")
        return found


class GrammarMaker:
    """Makes grammars over the tokens of one tokenizer.

    Args:
      tokenizer: of transformers.
      vocab_size: of the model, which may have more rows than its tokenizer has tokens.
      end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: tuple[int, ...]):
        self._tokenizer, self.vocab_size, self._end_ids = tokenizer, vocab_size, end_ids
        self._known: LLTokenizer | None = None

    def make(self, wanted: StructuredOutputsParams) -> Grammar:
        """Raises RequestError for what is no schema, expression or grammar, or is not understood."""
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise RequestError(f"structured_outputs needs llguidance: {INSTALL}") from error
        grammar = _compiled(wanted)
        wrong, said = LLMatcher.validate_grammar_with_warnings(grammar, self._of_tokens())
        if wrong or said:
            raise RequestError(f"structured_outputs cannot be followed: {' '.join(said[0].split())}")
        return Grammar(LLMatcher(self._of_tokens(), grammar, log_level=0), self.vocab_size)

    def _of_tokens(self) -> LLTokenizer:
        """llguidance's tokenizer, made at its first use: it takes about a second."""
        if self._known is None:
            from llguidance.hf import from_tokenizer

            size = max(self.vocab_size, len(self._tokenizer))
            try:
                self._known = from_tokenizer(self._tokenizer, n_vocab=size, eos_token=list(self._end_ids) or None)
            except ValueError as error:
                raise RequestError(f"structured_outputs are not possible with this tokenizer ({error})") from error
        return self._known


def _compiled(wanted: StructuredOutputsParams) -> str:
    """What the answer is held to, in llguidance's form."""
    from llguidance import LLMatcher

    if wanted.json is not None:
        return LLMatcher.grammar_from_json_schema(_schema(wanted.json), defaults=JSON_OPTIONS)  # type: ignore[arg-type]
    if wanted.json_object:
        return LLMatcher.grammar_from_json_schema({"type": "object"}, defaults=JSON_OPTIONS)  # type: ignore[arg-type]
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, wanted.choice))}")
    assert wanted.grammar is not None
    return LLMatcher.grammar_from_lark(wanted.grammar)


def _schema(given: Mapping[str, Any] | str) -> dict[str, Any]:
    if not isinstance(given, str):
        return dict(given)
    try:
        found = json.loads(given)
    except ValueError as error:
        raise RequestError(f"structured_outputs: json is no JSON ({error}): give a schema") from error
    if not isinstance(found, dict):
        raise RequestError("structured_outputs: json is no object: give a schema")
    return found

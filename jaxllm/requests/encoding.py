"""Texts of a context and a continuation -> token ids, split as lm-eval splits them.

The rules are those of `TemplateLM._encode_pair` and `HFLM.tok_encode` of EleutherAI's lm-evaluation-harness: spaces that end the
context move to the continuation; the context and the whole are encoded separately, and what the whole has beyond the context's
length is the continuation; special tokens are added as the tokenizer's own default has it, but not to a text that begins with one
already; an empty context is the tokenizer's beginning-of-sequence token, or its end-of-sequence token if it has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.requests.outputs import RequestError
from jaxllm.requests.prompts import ParsedPrompt

Pair = tuple[Sequence[int], Sequence[int]]
"""A context, one token at least, and a continuation of it, one token at least."""


@dataclass(frozen=True)
class PairEncoder:
    """Encodes texts with a transformers tokenizer; `prefix` stands for an empty context.

    `bos`: do texts start with the beginning-of-sequence token, and have no other special one; None: as the tokenizer has it.
    """

    tokenizer: Any
    prefix: int
    bos: bool | None = None

    def __post_init__(self) -> None:
        if self.bos and self.tokenizer.bos_token_id is None:
            raise RequestError("add_bos_token=True, and the tokenizer has no such token: leave it out")

    @classmethod
    def of(cls, tokenizer: Any) -> PairEncoder:
        """Raises RequestError for a tokenizer that has neither a beginning nor an end of sequence."""
        prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if prefix is None:
            raise RequestError("the tokenizer has no token for an empty context: give contexts as token ids")
        return cls(tokenizer, prefix)

    def __str__(self) -> str:
        """What is assumed, in a line."""
        adds = self.tokenizer("a")["input_ids"][:1] == [self.prefix]
        name = self.tokenizer.convert_ids_to_tokens(self.prefix)
        return f"texts start {'with' if adds else 'without'} {name}; an empty context is {name}; spaces go with the continuation"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens as the tokenizer adds them."""
        begins = self.tokenizer.decode(self.prefix)
        special = [text.startswith(begins) for text in texts]
        ids: list[list[int]] = [[] for _ in texts]
        for flag in set(special):
            chosen = [i for i, has in enumerate(special) if has == flag]
            keywords = {"add_special_tokens": False} if flag or self.bos is not None else {}
            start = [self.tokenizer.bos_token_id] if self.bos and not flag else []
            for i, encoded in zip(chosen, self._batch([texts[i] for i in chosen], **keywords), strict=True):
                ids[i] = start + encoded
        return ids

    def pairs(self, texts: Sequence[tuple[str, str]]) -> list[Pair]:
        """(context, continuation) -> their token ids. A context that stands in several pairs is encoded once."""
        moved = [_move_spaces(*pair) if pair[0] else pair for pair in texts]
        contexts = list(dict.fromkeys(context for context, _ in moved if context))
        known = dict(zip(contexts, self.encode(contexts), strict=True))
        wholes = iter(self.encode([context + continuation for context, continuation in moved if context]))
        bare = iter(self._batch([continuation for context, continuation in moved if not context], add_special_tokens=False))
        pairs: list[Pair] = []
        for context, _ in moved:
            if context:
                pairs.append((known[context], next(wholes)[len(known[context]) :]))
            else:
                ids = next(bare)
                pairs.append((ids[:1], ids[1:]) if ids[:1] == [self.prefix] else ([self.prefix], ids))
        return pairs

    def _batch(self, texts: Sequence[str], **keywords: Any) -> Iterable[list[int]]:
        return self.tokenizer(list(texts), **keywords)["input_ids"] if texts else []


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    kept = len(context.rstrip())
    return context[:kept], context[kept:] + continuation


def fit(pairs: Sequence[Pair], names: Sequence[str], context: int, vocab: int, truncate: bool) -> list[Pair]:
    """Pairs that a model with so many positions can score; its last token is never fed, so one more than that fits.

    Longer ones lose the start of their context if `truncate`. Raises RequestError naming the first that cannot be scored.
    """
    return [_fit(name, *pair, context + 1, vocab, truncate) for name, pair in zip(names, pairs, strict=True)]


def _fit(name: str, context: Sequence[int], continuation: Sequence[int], limit: int, vocab: int, truncate: bool) -> Pair:
    if not context or not continuation:
        raise RequestError(f"{name}: its {'continuation' if context else 'context'} is empty: give at least one token")
    check_ids(name, context, vocab)
    check_ids(name, continuation, vocab)
    excess = len(context) + len(continuation) - limit
    if excess > 0 and not (truncate and len(continuation) < limit):
        remedy = "shorten it" if truncate else "shorten it, or cut contexts from the left: truncate=True, --truncate"
        raise RequestError(f"{name} and its context have {limit + excess} tokens, and the model takes {limit}: {remedy}")
    return context[max(excess, 0) :], continuation


def encode_whole(prompts: Sequence[ParsedPrompt], tokenizer: Any, limit: int, vocab: int) -> list[list[int]]:
    """Token ids of prompts that are embedded or classified, special tokens as the tokenizer adds them. Raises RequestError."""
    ids = [list(tokenizer(one.text)["input_ids"]) if one.ids is None else one.ids for one in prompts]
    for i, of_one in enumerate(ids):
        if not of_one:
            raise RequestError(f"prompt {i} is empty: give at least one token")
        if len(of_one) > limit:
            raise RequestError(f"prompt {i} has {len(of_one)} tokens, and the model takes {limit}: shorten it")
        check_ids(f"prompt {i}", of_one, vocab)
    return ids


def bad_word_ids(tokenizer: Any, words: Iterable[str]) -> list[list[int]]:
    """The token ids of words that must not be generated, as vLLM takes them.

    Each as a text begins with it, and as it stands after a space where that changes its first token and not their number.
    """
    found: list[list[int]] = []
    for word in dict.fromkeys(words):
        first, spaced = (list(tokenizer(space + word.lstrip(), add_special_tokens=False)["input_ids"]) for space in ("", " "))
        if not first:
            raise RequestError(f"bad_words holds {word!r}, of which the tokenizer makes no token: leave it out")
        found.append(first)
        if len(spaced) == len(first) and spaced[0] != first[0]:
            found.append(spaced)
    return found


def check_ids(name: str, ids: Iterable[int], vocab: int) -> None:
    """Raises RequestError for an id outside the vocabulary."""
    outside = next((i for i in ids if not 0 <= i < vocab), None)
    if outside is not None:
        raise RequestError(f"{name} holds token id {outside}, outside the vocabulary of {vocab}")

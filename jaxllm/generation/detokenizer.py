"""Token ids to text, one token at a time."""

from __future__ import annotations

from typing import Any

PROMPT_TAIL = 5  # tokens of the prompt that the first ones are decoded with: whether a space precedes depends on them


class Detokenizer:
    """The text of one sequence as it grows, and where a stop string ended it.

    A token is decoded together with those just before it, because bytes of one character and spaces between words depend on the
    neighbours. An unfinished character is held back.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: list[int],
        stops: tuple[str, ...],
        skip_special_tokens: bool,
        include_stop: bool = False,
    ):
        """`include_stop`: the text ends with the stop string, and not before it."""
        self.tokenizer = tokenizer
        self.stops = stops
        self.include_stop = include_stop
        self.skip = skip_special_tokens
        self.ids = prompt[-PROMPT_TAIL:]
        self.prefix = 0
        self.read = len(self.ids)
        self.count = 0
        self.text = ""
        self.stopped_by: str | None = None

    def push(self, token: int) -> bool:
        """Take one more token. True when it completes a stop string, at which the text is cut off."""
        self.ids.append(token)
        self.count += 1
        known, whole = self._decode(self.prefix, self.read), self._decode(self.prefix, len(self.ids))
        if len(whole) > len(known) and not whole.endswith("\N{REPLACEMENT CHARACTER}"):
            self._grow(whole[len(known) :])
            self.prefix, self.read = self.read, len(self.ids)
        return self.stopped_by is not None

    def finish(self) -> bool:
        """Give up waiting for the rest of an unfinished character. True when the text then ends at a stop string."""
        if self.stopped_by is None:
            known, whole = self._decode(self.prefix, self.read), self._decode(self.prefix, len(self.ids))
            self._grow(whole[len(known) :])
            self.read = self.prefix = len(self.ids)
        return self.stopped_by is not None

    @property
    def settled(self) -> str:
        """The text that no stop string can still take back."""
        if self.include_stop:
            return self.text
        held = max((_overlap(self.text, stop) for stop in self.stops), default=0)
        return self.text[: len(self.text) - held]

    def _grow(self, new: str) -> None:
        start = len(self.text)
        self.text += new
        found = [(self.text.find(stop, max(0, start - len(stop) + 1)), stop) for stop in self.stops]
        found = [(at, stop) for at, stop in found if at >= 0]
        if found:
            at, self.stopped_by = min(found)
            self.text = self.text[: at + len(self.stopped_by) if self.include_stop else at]

    def _decode(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self.ids[start:end], skip_special_tokens=self.skip)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper start of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

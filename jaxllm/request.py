"""A request on its way: the engine's sequences and their texts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jaxllm.requests import CompletionOutput, Logprob, RequestOutput
from jaxllm.scheduler import Sequence
from jaxllm.text import Detokenizer


class Sample:
    """A sequence of the engine and its text."""

    def __init__(self, sequence: Sequence, tokenizer: Any):
        self.sequence = sequence
        self.tokenizer = tokenizer
        params = sequence.params
        self.text = (
            None if tokenizer is None else Detokenizer(tokenizer, sequence.prompt, params.stops, params.skip_special_tokens)
        )

    def update(self) -> None:
        """Decode the tokens that are new; a stop string ends the sequence at the token that completed it."""
        sequence, text = self.sequence, self.text
        if text is None:
            return
        ended_by_id = sequence.finish_reason == "stop"
        while text.count < len(sequence.tokens) and text.stopped_by is None:
            if ended_by_id and text.count == len(sequence.tokens) - 1:
                text.count += 1  # the stop id itself is no text
            elif text.push(sequence.tokens[text.count]):
                del sequence.tokens[text.count :], sequence.logprobs[text.count :]
                sequence.finish_reason, sequence.stop_reason = "stop", text.stopped_by
        if sequence.finish_reason is not None and text.finish():
            sequence.finish_reason, sequence.stop_reason = "stop", text.stopped_by

    @property
    def finished(self) -> bool:
        return self.sequence.finish_reason is not None

    @property
    def settled(self) -> str:
        """The text that can be shown: all of it once the sequence has ended."""
        assert self.text is not None
        return self.text.text if self.finished else self.text.settled

    def output(self, index: int) -> CompletionOutput:
        s = self.sequence
        logprobs = None if s.params.logprobs is None else [self._named(choices) for choices in s.logprobs]
        text = "" if self.text is None else self.text.text
        return CompletionOutput(index, text, list(s.tokens), logprobs, s.finish_reason, s.stop_reason)

    def _named(self, choices: dict[int, Logprob]) -> dict[int, Logprob]:
        if self.tokenizer is None:
            return choices
        return {token: replace(choice, decoded_token=self.tokenizer.decode([token])) for token, choice in choices.items()}


@dataclass(frozen=True)
class Request:
    """A prompt and its samples."""

    id: int
    prompt: str | None
    ids: list[int]
    samples: list[Sample]

    @property
    def finished(self) -> bool:
        return all(sample.finished for sample in self.samples)

    def output(self) -> RequestOutput:
        return RequestOutput(self.id, self.prompt, self.ids, [s.output(i) for i, s in enumerate(self.samples)])

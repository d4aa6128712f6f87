"""What a user asks for and gets back. Plain Python, with the names that vLLM gave them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_LOGPROBS = 20


class RequestError(ValueError):
    """A request that cannot be served; the message names the parameter and what to do."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request's tokens are chosen and when it ends. Checked when made; raises RequestError.

    Attributes:
      n: samples of the prompt, each with a random stream of its own.
      temperature: 0 is greedy.
      top_p, top_k, min_p: filters after temperature; off at 1, 0 (or -1), 0.
      repetition_penalty: divides positive logits of tokens already seen, prompt included; off at 1.
      seed: of the random stream; None: drawn from the engine's seed and the request's number.
      stop: strings that end the text, not part of it.
      stop_token_ids: ids that end the row, besides the model's own end-of-sequence ids.
      ignore_eos: go on past the model's own end-of-sequence ids.
      max_tokens: at most so many new tokens; None: as many as the context holds.
      min_tokens: no stop id before so many.
      logit_bias: token id -> number added to its logit.
      logprobs: report the chosen token's log-probability and those of so many likeliest tokens (0 to 20).
      skip_special_tokens: leave special tokens out of the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        checks = [
            (self.n >= 1, f"n={self.n}: ask for at least 1 sample"),
            (0 <= self.temperature < math.inf, f"temperature={self.temperature}: a finite number from 0 up; 0 is greedy"),
            (0 < self.top_p <= 1, f"top_p={self.top_p}: it lies in (0, 1]; 1 is off"),
            (self.top_k >= -1, f"top_k={self.top_k}: a positive number, or 0 for off"),
            (0 <= self.min_p <= 1, f"min_p={self.min_p}: it lies in [0, 1]; 0 is off"),
            (
                0 < self.repetition_penalty < math.inf,
                f"repetition_penalty={self.repetition_penalty}: a finite number above 0; 1 is off",
            ),
            (self.seed is None or self.seed >= 0, f"seed={self.seed}: a number from 0 up, or None"),
            (self.max_tokens is None or self.max_tokens >= 1, f"max_tokens={self.max_tokens}: ask for at least 1"),
            (self.min_tokens >= 0, f"min_tokens={self.min_tokens}: it cannot be negative"),
            (
                self.max_tokens is None or self.min_tokens <= self.max_tokens,
                f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}: raise the one or lower the other",
            ),
            (
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"logprobs={self.logprobs}: from 0 to {MAX_LOGPROBS}",
            ),
            (
                self.n == 1 or self.temperature > 0,
                f"n={self.n} greedy samples are all the same: set a temperature above 0, or n=1",
            ),
            (
                all(bias < math.inf for bias in (self.logit_bias or {}).values()),
                f"logit_bias={self.logit_bias}: finite numbers, or -inf to forbid a token",
            ),
            (all(self.stops), "an empty stop string would end every text at once: leave it out"),
        ]
        for good, message in checks:
            if not good:
                raise RequestError(message)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability, its rank (1 is the likeliest) and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One sample of a prompt.

    `logprobs`: for each token, {token id: Logprob} of the chosen and the likeliest tokens; None when not asked for.
    `finish_reason`: "stop" (an end id or stop string, named in `stop_reason`), "length", "cancelled", None while running.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the chosen tokens' log-probabilities."""
        if self.logprobs is None:
            return None
        return sum(choices[token].logprob for token, choices in zip(self.token_ids, self.logprobs, strict=True))


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its samples."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

"""What a user gets back, or is refused with. Plain Python, with the names that vLLM gave them."""

from __future__ import annotations

from dataclasses import dataclass, field


class RequestError(ValueError):
    """A request that cannot be served; the message names the parameter and what to do."""


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability, or what `logprobs_mode` of the LLM says, its rank (1 is the likeliest) and its text."""

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
    """A prompt and its samples.

    `num_cached_tokens`: how many of the prompt's tokens had not to be computed for its first sample: others that began with the
    same ones had left them in the cache.
    `prompt_logprobs`: for each token of the prompt, {token id: Logprob} of it and the likeliest in its place; None for the first,
    and for all where they were not asked for.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

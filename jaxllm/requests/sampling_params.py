"""How a request's tokens are chosen and when it ends, with the names that vLLM gave it. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from jaxllm.buckets import MAX_LOGPROBS
from jaxllm.requests import checks
from jaxllm.requests.outputs import RequestError
from jaxllm.requests.structured_outputs import StructuredOutputsParams, structured_outputs
from jaxllm.requests.vllm_arguments import SAMPLING_ELSEWHERE

LARGEST_PENALTY = 2  # of presence and frequency, as in OpenAI's API
LARGEST_BIAS = 1e30  # what is far beyond any logit, and still a float32


@dataclass(kw_only=True)
class SamplingParams:
    """How a request's tokens are chosen and when it ends.

    Checked when it is made, and once more, as it then is, when a request takes its copy; raises RequestError. None stands for
    the default wherever None has no meaning of its own.

    Attributes:
      n: samples of the prompt, each with a random stream of its own.
      temperature: 0 is greedy.
      top_p: after temperature, of the likeliest tokens that have so much probability together; off at 1.
      top_k: of so many likeliest tokens; off at 0 or -1.
      min_p: of tokens at least so likely beside the likeliest; off at 0.
      repetition_penalty: divides positive logits of tokens already seen, prompt included; off at 1.
      presence_penalty: taken from the logit of each token generated so far; -2 to 2, off at 0.
      frequency_penalty: taken from it as often as the token was generated; -2 to 2, off at 0.
      seed: of the random stream; None: drawn from the engine's seed and the request's number.
      stop: strings that end the text, not part of it.
      include_stop_str_in_output: the string, or the token, that ends the text is part of it.
      stop_token_ids: ids that end the row, besides the model's own end-of-sequence ids.
      ignore_eos: go on past the model's own end-of-sequence ids.
      max_tokens: at most so many new tokens; None: as many as the context holds.
      min_tokens: no stop id before so many.
      logit_bias: token id -> number added to its logit; -inf forbids the token.
      allowed_token_ids: no other token is generated.
      bad_words: texts that are not generated, each with and without a space before it: of a word's tokens the last is forbidden
        where the others were generated just before.
      logprobs: report the chosen token's log-probability and those of so many likeliest tokens (0 to 20), or of all (-1).
      prompt_logprobs: the same of the prompt's tokens (0 to 20), all of which are then computed, shared or not.
      skip_special_tokens: leave special tokens out of the text.
      structured_outputs: the form that the answer is held to, `StructuredOutputsParams` or a dict of its names.
      truncate_prompt_tokens: keep the prompt's last so many tokens alone; -1: as many as the context holds beside max_tokens.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __new__(cls, *args: object, **options: object) -> SamplingParams:
        if args:
            raise RequestError(f"SamplingParams({checks.shown(args[0])}): give each value by its name, as in temperature=0")
        checks.refuse_unknown("SamplingParams", options, [field.name for field in fields(cls)], SAMPLING_ELSEWHERE)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name != "max_tokens":  # whose None is another than its default
                value = field.default
            setattr(self, field.name, None if value is None else _KINDS[field.name](field.name, value))
        for good, message in self._limits():
            if not good:
                raise RequestError(message)

    def clone(self) -> SamplingParams:
        """As it is now, checked; what is then changed here does not reach the copy. Raises RequestError."""
        return replace(self)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def _limits(self) -> list[tuple[bool, str]]:
        biases = (self.logit_bias or {}).values()
        return [
            (self.n >= 1, f"n={self.n}: ask for at least 1 sample"),
            (0 <= self.temperature < math.inf, f"temperature={self.temperature}: a finite number from 0 up; 0 is greedy"),
            (0 < self.top_p <= 1, f"top_p={self.top_p}: it lies in (0, 1]; 1 is off"),
            (self.top_k >= -1, f"top_k={self.top_k}: a positive number, or 0 for off"),
            (0 <= self.min_p <= 1, f"min_p={self.min_p}: it lies in [0, 1]; 0 is off"),
            (
                0 < self.repetition_penalty < math.inf,
                f"repetition_penalty={self.repetition_penalty}: a finite number above 0; 1 is off",
            ),
            *(
                (
                    -LARGEST_PENALTY <= penalty <= LARGEST_PENALTY,
                    f"{name}={penalty}: it lies in [-{LARGEST_PENALTY}, {LARGEST_PENALTY}]; 0 is off",
                )
                for name, penalty in (
                    ("presence_penalty", self.presence_penalty),
                    ("frequency_penalty", self.frequency_penalty),
                )
            ),
            (self.seed is None or self.seed >= 0, f"seed={self.seed}: a number from 0 up, or None"),
            (self.max_tokens is None or self.max_tokens >= 1, f"max_tokens={self.max_tokens}: ask for at least 1"),
            (self.min_tokens >= 0, f"min_tokens={self.min_tokens}: it cannot be negative"),
            (
                self.max_tokens is None or self.min_tokens <= self.max_tokens,
                f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}: raise the one or lower the other",
            ),
            (
                self.logprobs is None or -1 <= self.logprobs <= MAX_LOGPROBS,
                f"logprobs={self.logprobs}: from 0 to {MAX_LOGPROBS}, or -1 for all of the vocabulary",
            ),
            (
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_LOGPROBS,
                f"prompt_logprobs={self.prompt_logprobs}: from 0 to {MAX_LOGPROBS}",
            ),
            (
                self.n == 1 or self.temperature > 0,
                f"n={self.n} greedy samples are all the same: set a temperature above 0, or n=1",
            ),
            (
                all(bias == -math.inf or abs(bias) <= LARGEST_BIAS for bias in biases),
                f"logit_bias={checks.shown(self.logit_bias)}: numbers of at most {LARGEST_BIAS}, or -inf to forbid a token",
            ),
            (
                self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
                "allowed_token_ids is empty, and leaves nothing to generate: leave it out to allow all",
            ),
            (all(map(str.strip, self.bad_words)), "bad_words holds a text without a word in it: leave it out"),
            (
                self.truncate_prompt_tokens is None or self.truncate_prompt_tokens >= 1 or self.truncate_prompt_tokens == -1,
                f"truncate_prompt_tokens={self.truncate_prompt_tokens}: keep at least 1, or -1 for as many as the context holds",
            ),
            (all(self.stops), "an empty stop string would end every text at once: leave it out"),
        ]


def from_generation_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of SamplingParams that a generation_config.json changes, those that vLLM takes from it.

    `do_sample` is not among them: as in vLLM, a temperature of 0 is what makes a request greedy.
    """
    names = {"max_tokens": "max_new_tokens"} | {name: name for name in _FROM_GENERATION_CONFIG}
    found = {name: values[key] for name, key in names.items() if values.get(key) is not None}
    return {name: value for name, value in found.items() if value != getattr(SamplingParams, name)}


_FROM_GENERATION_CONFIG = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_KINDS: dict[str, Callable[[str, Any], Any]] = {
    "n": checks.count,
    "temperature": checks.number,
    "top_p": checks.number,
    "top_k": checks.count,
    "min_p": checks.number,
    "repetition_penalty": checks.number,
    "presence_penalty": checks.number,
    "frequency_penalty": checks.number,
    "seed": checks.whole,
    "stop": checks.texts,
    "stop_token_ids": checks.token_ids,
    "include_stop_str_in_output": checks.flag,
    "ignore_eos": checks.flag,
    "max_tokens": checks.count,
    "min_tokens": checks.count,
    "logit_bias": checks.biases,
    "allowed_token_ids": checks.token_ids,
    "bad_words": checks.list_of_texts,
    "logprobs": checks.count,
    "prompt_logprobs": checks.count,
    "skip_special_tokens": checks.flag,
    "truncate_prompt_tokens": checks.count,
    "structured_outputs": structured_outputs,
}

"""One sample of one request on its way through the engine. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxllm.generation.grammar import Grammar
from jaxllm.generation.pages import HeldPages
from jaxllm.requests.outputs import Logprob
from jaxllm.requests.sampling_params import SamplingParams


@dataclass(eq=False)
class Sequence:
    """The tokens of a sample, and how far the engine has come with them. The scheduler alone writes how it ends.

    Its pages, on data shard `shard`, hold the first `cached` of its tokens; the last token it generated is never in there. Where
    they had to be computed again, `num_recomputed` of its generated tokens are prefilled with the prompt. `num_shared` tokens of
    the prompt were there before it came. No token that completes one of `bad_words` is generated. `prompt_logprobs` of the
    likeliest tokens are reported at each token of the prompt but the first; None: nothing is. Its tokens follow `grammar`;
    `error` is what has ended it, if that was one. It finds the keys of its own `cache_salt` alone, comes before a larger
    `priority`, and was `admitted` at that time, by `time.perf_counter`.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    stop_ids: tuple[int, ...]
    seed: int
    bad_words: tuple[tuple[int, ...], ...] = ()
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: int | None = None
    of_prompt: list[dict[int, Logprob]] = field(default_factory=list)
    cached: int = 0
    num_recomputed: int = 0
    num_shared: int = 0
    grammar: Grammar | None = None
    error: Exception | None = None
    cache_salt: str = ""
    priority: int = 0
    admitted: float | None = None
    held: HeldPages | None = None
    shard: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def prefill_tokens(self) -> list[int]:
        """The prompt, and what was generated before the cache had to be computed again."""
        return self.prompt + self.tokens[: self.num_recomputed] if self.num_recomputed else self.prompt

    @property
    def prefilling(self) -> bool:
        return self.cached < len(self.prompt) + self.num_recomputed

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Are some of its prompt's not there yet?"""
        return self.prompt_logprobs is not None and len(self.of_prompt) < len(self.prompt) - 1

    @property
    def awaits_decode(self) -> bool:
        """Is its last token known, and the only one that is not in its pages?"""
        return not self.prefilling and self.cached == len(self.prompt) + len(self.tokens) - 1

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self.max_tokens - len(self.tokens)

    def reset_for_recompute(self, *, keep_tokens: bool = True) -> None:
        """All its tokens will be prefilled again, into other pages; or the prompt alone, and the others, the same, generated."""
        if not keep_tokens:
            self.tokens.clear()
            self.logprobs.clear()
            if self.grammar is not None:
                self.grammar.reset()
        self.cached, self.num_recomputed, self.held = 0, len(self.tokens), None
        if self.wants_prompt_logprobs:
            self.of_prompt.clear()

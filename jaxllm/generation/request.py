"""A request on its way: the engine's sequences and their texts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.generation.detokenizer import Detokenizer
from jaxllm.generation.grammar import GrammarMaker
from jaxllm.generation.sequence import Sequence
from jaxllm.requests import checks
from jaxllm.requests.encoding import bad_word_ids, check_ids
from jaxllm.requests.outputs import CompletionOutput, Logprob, RequestError, RequestOutput
from jaxllm.requests.prompts import ParsedPrompt
from jaxllm.requests.sampling_params import SamplingParams


class StopAt(NamedTuple):
    """A stop string was completed: the sequence ends with the first `keep` of its tokens."""

    keep: int
    stop: str


class Sample:
    """A sequence of the engine and its text."""

    def __init__(self, sequence: Sequence, tokenizer: Any):
        self.sequence = sequence
        self.tokenizer = tokenizer
        self._names: dict[int, str] = {}  # of tokens in its log-probabilities: with all of them, each comes again and again
        params = sequence.params
        how = (params.stops, params.skip_special_tokens, params.include_stop_str_in_output)
        self.text = None if tokenizer is None else Detokenizer(tokenizer, sequence.prompt, *how)
        self.shown = ""  # the text that can be shown, and all of it once the sequence has ended

    def update(self) -> StopAt | None:
        """Decode the tokens that are new. What is returned is for the scheduler to end the sequence with."""
        sequence, text = self.sequence, self.text
        if text is None or text.stopped_by is not None:
            return None
        hidden_end = isinstance(sequence.stop_reason, int) and not sequence.params.include_stop_str_in_output
        while text.count < len(sequence.tokens) and text.stopped_by is None:
            if hidden_end and text.count == len(sequence.tokens) - 1:
                text.count += 1  # the stop id itself is no text
            else:
                text.push(sequence.tokens[text.count])
        if sequence.finish_reason is not None:
            text.finish()
        ended = sequence.finish_reason is not None or text.stopped_by is not None
        self.shown = text.text if ended else text.settled
        return None if text.stopped_by is None else StopAt(text.count, text.stopped_by)

    @property
    def finished(self) -> bool:
        return self.sequence.finish_reason is not None

    @property
    def num_read(self) -> int:
        """How many of its tokens the text was made of; the engine may have come further. None of them is taken back."""
        return len(self.sequence.tokens) if self.text is None else self.text.count

    def logprobs(self, start: int, end: int) -> list[dict[int, Logprob]]:
        """Those of tokens `start` to `end`, with the tokens' texts."""
        return [self._named(choices) for choices in self.sequence.logprobs[start:end]]

    def output(self, index: int) -> CompletionOutput:
        s = self.sequence
        logprobs = None if s.params.logprobs is None else self.logprobs(0, len(s.tokens))
        text = "" if self.text is None else self.text.text
        return CompletionOutput(index, text, list(s.tokens), logprobs, s.finish_reason, s.stop_reason)

    def of_prompt(self) -> list[dict[int, Logprob] | None] | None:
        """The log-probabilities of the prompt's tokens; None if they were not asked for."""
        if self.sequence.prompt_logprobs is None:
            return None
        return [None, *map(self._named, self.sequence.of_prompt)]

    def _named(self, choices: dict[int, Logprob]) -> dict[int, Logprob]:
        if self.tokenizer is None:
            return choices
        return {token: replace(choice, decoded_token=self.name(token)) for token, choice in choices.items()}

    def name(self, token: int) -> str:
        """The text of a token by itself."""
        if token not in self._names:
            self._names[token] = self.tokenizer.decode([token])
        return self._names[token]


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
        outputs = [s.output(i) for i, s in enumerate(self.samples)]
        first = self.samples[0]
        return RequestOutput(self.id, self.prompt, self.ids, outputs, first.sequence.num_shared, first.of_prompt())


class RequestMaker:
    """Makes requests of prompts, each with its number and its samples' random streams."""

    def __init__(self, path: Path, config: ModelConfig, max_model_len: int, tokenizer: Any, seed: int):
        self.path, self.config, self.max_model_len = path, config, max_model_len
        self.tokenizer, self.seed = tokenizer, seed
        self._requests = self._sequences = 0
        self._grammar_maker: GrammarMaker | None = None

    def make(self, prompt: ParsedPrompt, params: SamplingParams, number: int | None = None) -> Request:
        """Raises RequestError for a prompt that the model cannot take, or params that it cannot follow.

        `number`: of the request; None: the next one.
        """
        checks.language_model(self.path, self.config.labels)
        ids = self._kept(self._encode(prompt.text or "") if prompt.ids is None else prompt.ids, params)
        self._check(ids, params)
        own_ends = () if params.ignore_eos else self.config.eos_token_ids
        stop_ids = tuple(dict.fromkeys((*own_ends, *params.stop_token_ids)))
        bad_words = self._bad_words(params)
        _check_that_some_are_allowed(params, stop_ids, bad_words)
        room = self.max_model_len - len(ids)
        grammar = None if params.structured_outputs is None else self._grammars().make(params.structured_outputs)
        if number is None:
            number, self._requests = self._requests, self._requests + 1
        samples = []
        for i in range(params.n):
            seed = self.stream_seed(params, number, i)
            sequence = Sequence(self._sequences, ids, params, min(params.max_tokens or room, room), stop_ids, seed, bad_words)
            sequence.prompt_logprobs = None if i else params.prompt_logprobs
            sequence.grammar = grammar and grammar.copy()
            sequence.cache_salt, sequence.priority = prompt.cache_salt, prompt.priority
            self._sequences += 1
            samples.append(Sample(sequence, self.tokenizer))
        return Request(number, prompt.text, ids, samples)

    def stream_seed(self, params: SamplingParams, number: int, sample: int) -> int:
        """The seed of a sample's random stream: the request's own, or the engine's and the request's number."""
        # The leading number keeps the two kinds apart: shorter entropy is filled up with zeros.
        entropy = (0, params.seed, sample) if params.seed is not None else (1, self.seed, number, sample)
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _encode(self, prompt: str) -> list[int]:
        if self.tokenizer is None:
            raise RequestError(f"{self.path} has no tokenizer; give token ids instead of text")
        return list(self.tokenizer(prompt)["input_ids"])

    def _kept(self, ids: list[int], params: SamplingParams) -> list[int]:
        """The last tokens of a prompt that is to be truncated."""
        kept, limit = params.truncate_prompt_tokens, self.max_model_len
        if kept is None:
            return ids
        if kept >= limit:
            raise RequestError(
                f"truncate_prompt_tokens={kept} and the context holds {limit} with the answer: lower it, or give -1 for as many "
                "as fit"
            )
        if kept == -1 and (kept := limit - (params.max_tokens or 1)) < 1:
            raise RequestError(
                f"truncate_prompt_tokens=-1 keeps nothing, for max_tokens={params.max_tokens} fills the context of {limit}: "
                "lower that"
            )
        return ids[-kept:]

    def _grammars(self) -> GrammarMaker:
        if self._grammar_maker is None:
            if self.tokenizer is None:
                raise RequestError(f"{self.path} has no tokenizer to follow structured_outputs with")
            self._grammar_maker = GrammarMaker(self.tokenizer, self.config.vocab_size, self.config.eos_token_ids)
        return self._grammar_maker

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if not params.bad_words:
            return ()
        if self.tokenizer is None:
            raise RequestError(f"{self.path} has no tokenizer to encode bad_words with; use logit_bias with -inf")
        words = bad_word_ids(self.tokenizer, params.bad_words)
        for ids in words:
            check_ids("bad_words", ids, self.config.vocab_size)
        return tuple(map(tuple, words))

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        limit = self.max_model_len
        if not ids:
            raise RequestError("the prompt is empty: give at least one token")
        if len(ids) >= limit:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and the context holds {limit} with the answer: shorten it, or raise "
                f"max_model_len (the model's own limit is {self.config.max_position})"
            )
        of_params = {name: getattr(params, name) or () for name in ("logit_bias", "allowed_token_ids", "stop_token_ids")}
        for name, tokens in (("prompt", ids), *of_params.items()):
            check_ids(name, tokens, self.config.vocab_size)
        if params.stops and self.tokenizer is None:
            raise RequestError(f"{self.path} has no tokenizer to find stop strings with; use stop_token_ids")


def _check_that_some_are_allowed(params: SamplingParams, stop_ids: Iterable[int], bad_words: Iterable[tuple[int, ...]]) -> None:
    if params.allowed_token_ids is None:
        return
    forbidden = {word[0] for word in bad_words if len(word) == 1} | {*(stop_ids if params.min_tokens else ())}
    forbidden |= {token for token, bias in (params.logit_bias or {}).items() if bias == -math.inf}
    if forbidden.issuperset(params.allowed_token_ids):
        raise RequestError("all of allowed_token_ids are forbidden by logit_bias, bad_words or min_tokens: allow another")

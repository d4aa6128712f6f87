"""Completions in the form that evaluation asks: what a prompt's own tokens are worth, and at most the likeliest one after it.

The scorer answers them as the engine would. While it is at some, those that come wait, and are then scored together: what they
have in common runs once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from jaxllm.execution.sampling import RAW_LOGPROBS
from jaxllm.generation.request import Request
from jaxllm.generation.scheduler import Scheduler
from jaxllm.llm import LLM
from jaxllm.requests.outputs import Logprob
from jaxllm.requests.sampling_params import SamplingParams
from jaxllm.scoring.scorer import Score
from jaxllm.serving.generation import in_thread


def is_for_scorer(llm: LLM, requests: list[Request]) -> bool:
    """Would the scorer give the same answer, though not to the bit?"""
    if llm.batch_invariant or llm.logprobs_mode != RAW_LOGPROBS:
        return False
    if any(request.samples[0].sequence.cache_salt for request in requests):
        return False
    return all(len(one.ids) <= llm.max_score_len and _is_plain(one.samples[0].sequence.params) for one in requests)


def _is_plain(params: SamplingParams) -> bool:
    """Greedy, one token, log-probabilities of no more than the likeliest, and nothing that changes it."""
    if params.temperature != 0 or params.prompt_logprobs not in (0, 1):
        return False
    free: dict[str, Any] = {name: getattr(params, name) for name in ("prompt_logprobs", "truncate_prompt_tokens", "seed")}
    free |= {name: getattr(params, name) for name in ("top_p", "top_k", "min_p", "skip_special_tokens", "ignore_eos")}
    return params == SamplingParams(temperature=0, max_tokens=1, logprobs=params.prompt_logprobs, **free)


class PromptScores:
    """Scores prompts of one model for an event loop."""

    def __init__(self, llm: LLM, scheduler: Scheduler):
        self._llm, self._scheduler = llm, scheduler
        self._waiting: list[tuple[Request, asyncio.Future[None]]] = []
        self._work: asyncio.Task[None] | None = None

    async def answer(self, requests: list[Request]) -> None:
        """Give requests, which must be for the scorer, their prompts' log-probabilities and their token."""
        loop = asyncio.get_running_loop()
        waiting = [(request, loop.create_future()) for request in requests]
        self._waiting += waiting
        if self._work is None:
            self._work = asyncio.create_task(self._run())
        await asyncio.gather(*(done for _, done in waiting))

    async def _run(self) -> None:
        while waiting := [one for one in self._waiting if not one[1].cancelled()]:
            self._waiting = []
            await in_thread(partial(self._score, waiting, asyncio.get_running_loop().call_soon_threadsafe))
        self._work = None

    def _score(self, waiting: list[tuple[Request, asyncio.Future[None]]], tell: Callable[..., Any]) -> None:
        """Score all of them, each told as soon as it is; where that fails, each of the others by itself."""
        left = dict(enumerate(waiting))
        try:
            # Any last token will do: what is wanted is the likeliest in its place.
            packing = self._llm.pack([(one.ids[:1], [[*one.ids[1:], 0]]) for one, _ in waiting])
            for i, score in self._llm.run_packing(packing):
                request, done = left.pop(i)
                self._take(request, score)
                tell(_settle, done, None)
        except Exception as error:
            if len(waiting) == 1:
                tell(_settle, waiting[0][1], error)
            else:
                for one in left.values():
                    self._score([one], tell)

    def _take(self, request: Request, score: Score) -> None:
        sample = request.samples[0]
        *before, (token, logprob) = zip(score.top_token_ids, score.top_logprobs, strict=True)
        for own, own_logprob, (best, best_logprob) in zip(request.ids[1:], score.token_logprobs, before, strict=False):
            rank = 1 if own == best else 2  # or more, which nobody is told
            choices = {own: Logprob(own_logprob, rank)}
            choices.setdefault(best, Logprob(best_logprob, 1))
            sample.sequence.of_prompt.append(choices)
        self._scheduler.append(sample.sequence, token, {token: Logprob(logprob, 1)})
        sample.update()


def _settle(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)

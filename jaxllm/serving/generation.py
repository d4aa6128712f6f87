"""An `LLM` for asyncio: requests go to the engine's thread, and what they gain comes back to the event loop piece by piece."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxllm.generation.request import Request, Sample
from jaxllm.llm import LLM
from jaxllm.requests.outputs import Logprob

T = TypeVar("T")


@dataclass(frozen=True)
class Delta:
    """What sample `index` of request `request` has gained.

    The tokens are those that the text so far was made of: none is taken back, and a last one may come with less text, or none.
    """

    request: int
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None


class Tail:
    """The end of a sample, from where it was last looked at. Used on the engine's thread, which is writing the rest."""

    def __init__(self, request: int, index: int, sample: Sample):
        self.request, self.index, self.sample = request, index, sample
        self._characters = self._tokens = 0
        self._ended = False

    def take(self) -> Delta | None:
        """What is new; None if nothing is."""
        sample, sequence = self.sample, self.sample.sequence
        ended, tokens = sequence.finish_reason is not None, sample.num_read
        if self._ended or not (ended or tokens > self._tokens or len(sample.shown) > self._characters):
            return None
        text, ids = sample.shown[self._characters :], sequence.tokens[self._tokens : tokens]
        logprobs = None if sequence.params.logprobs is None else sample.logprobs(self._tokens, tokens)
        self._characters, self._tokens, self._ended = len(sample.shown), tokens, ended
        return Delta(self.request, self.index, text, ids, logprobs, sequence.finish_reason, sequence.stop_reason)


async def deltas(llm: LLM, requests: list[Request], steps: int) -> AsyncGenerator[list[Delta]]:
    """Run requests, with news of them after at most `steps` tokens. Leaving early, or being cancelled, cancels them."""
    loop = asyncio.get_running_loop()
    news: asyncio.Queue[list[Delta] | BaseException] = asyncio.Queue()
    tails = [Tail(r, i, sample) for r, request in enumerate(requests) for i, sample in enumerate(request.samples)]

    def tell(error: BaseException | None) -> None:  # on the engine's thread
        found = error or [delta for tail in tails if (delta := tail.take()) is not None]
        if found:
            with suppress(RuntimeError):  # the event loop is closed: nobody waits any more
                loop.call_soon_threadsafe(news.put_nowait, found)

    running = len(tails)
    submission = llm.submit(requests, steps, tell)
    try:
        while running:
            found = await news.get()
            if isinstance(found, BaseException):
                raise found
            running -= sum(delta.finish_reason is not None for delta in found)
            yield found
    finally:
        if running:
            submission.cancel()


async def in_thread(work: Callable[[], T]) -> T:
    """The result of what would hold the event loop up: tokenizing, scoring."""
    return await asyncio.to_thread(work)


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None, and the work cancelled, if the client goes away before."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, left):
            one.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


def now() -> int:
    """Seconds since 1970, as OpenAI stamps its answers."""
    return int(time.time())

"""The one thread that owns an engine: any number of threads submit to it and wait for their own requests.

It lives while there is something to do, or an iteration that may ask for more. A step is queued behind the one that runs
wherever it does not depend on that one's tokens, so that the devices go on while texts are made of them.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

from jaxllm.execution.steps import MAX_STEPS
from jaxllm.generation.engine import Engine
from jaxllm.generation.request import Request, Sample
from jaxllm.generation.scheduler import ScheduledStep
from jaxllm.generation.sequence import Sequence

STREAM_STEPS = 8  # tokens between two looks at a text that is streamed
STOPPING_STEPS = 16  # the same, where a stop string may end it: what is decoded past that is wasted

T = TypeVar("T")


class Submission:
    """Requests on their way. Iterating waits for each piece of news and says how many samples have not ended.

    Leaving the loop early, or an exception in it, cancels them. `on_news` is called instead, if given, on the engine's thread,
    with what ended them, if something did.
    """

    def __init__(
        self,
        loop: EngineLoop,
        requests: list[Request],
        steps: int,
        on_news: Callable[[BaseException | None], None] | None = None,
    ):
        self.samples = [sample for request in requests for sample in request.samples]
        self.steps = steps  # most tokens between two pieces of news
        if any(sample.sequence.params.stops for sample in self.samples):
            self.steps = min(steps, STOPPING_STEPS)
        self.unfinished = len(self.samples)
        self.waits_for = ""  # the program that is loaded or compiled now
        self.error: BaseException | None = None
        self._loop, self._on_news = loop, on_news
        self._news = threading.Event()
        if not self.samples:
            self.tell()

    def __iter__(self) -> Generator[int]:
        try:
            while True:
                self._news.wait()
                self._news.clear()
                if self.error is not None:
                    raise self.error
                unfinished = self.unfinished
                yield unfinished
                if not unfinished:
                    return
        finally:
            if self.unfinished and self.error is None:
                self.cancel()

    def cancel(self) -> None:
        """End what has not ended, after the step that runs."""
        self._loop.cancel(self)

    def tell(self) -> None:
        """There is news. Called by the loop."""
        self._news.set()
        if self._on_news is not None:
            self._on_news(self.error)


class EngineLoop:
    """Requests and jobs of any thread, run by one.

    Args:
      engine: makes the engine, on that thread, before its first use.
      check: called on the thread that asks for something; what it raises refuses that.
    """

    def __init__(self, engine: Callable[[], Engine], check: Callable[[], None] = lambda: None):
        self._make_engine, self._check = engine, check
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)  # of the inbox, of iterations that end, of closing
        self._inbox: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._iterations = 0
        self._jobs: set[Future[Any]] = set()
        self._alive = 0.0  # when the thread last began a turn, by `time.monotonic`
        # What follows is the thread's own.
        self._samples: dict[int, tuple[Sample, Submission]] = {}  # those that have not ended
        self._engine_is_made = False
        _LOOPS.add(self)

    # For any thread

    def submit(
        self, requests: list[Request], steps: int = MAX_STEPS, on_news: Callable[[BaseException | None], None] | None = None
    ) -> Submission:
        """Run requests, with news of them after at most so many tokens."""
        submission = Submission(self, requests, steps, on_news)
        self._post(lambda: self._add(submission))
        return submission

    def say(self, program: str) -> None:
        """Tell all that a program is got ready. For the engine's thread."""
        for submission in {id(submission): submission for _, submission in self._samples.values()}.values():
            submission.waits_for = program
            submission.tell()

    def cancel(self, submission: Submission) -> None:
        """End what has not ended, after the step that runs."""
        self._post(lambda: self._drop(submission))

    def run(self, job: Callable[[], T]) -> T:
        """The result of something else that uses the devices, between two steps: in another order on each they would wait."""
        done: Future[T] = Future()

        def do() -> None:
            try:
                done.set_result(job())
            except BaseException as error:
                done.set_exception(error)

        self._jobs.add(done)
        try:
            self._post(do)
            return done.result()
        finally:
            self._jobs.discard(done)

    def iterate(self, results: Generator[T]) -> Generator[T]:
        """The results, each made between two steps, and all on one thread, whose programs run one after another.

        Those of two threads would run side by side, and XLA's on a CPU then give wrong numbers (jaxlib 0.10.2: of products some
        rows): a thread must not end, and another begin, while results that are to come are being computed.
        """
        end = object()
        with self._lock:
            self._iterations += 1
        try:
            while (result := self.run(lambda: next(results, end))) is not end:
                yield result  # type: ignore[misc]
        finally:
            if threading.current_thread() is self._thread:  # the garbage collector's choice
                results.close()
            elif not self._closing:
                self.run(results.close)
            with self._lock:
                self._iterations -= 1
                self._news.notify()

    def abandon(self, error: BaseException) -> None:
        """Tell all who wait that nothing will come. For where the engine's thread is stuck within a step."""
        for submission in {id(submission): submission for _, submission in [*self._samples.values()]}.values():
            submission.error = error
            submission.tell()
        for job in [*self._jobs]:
            with suppress(InvalidStateError):
                job.set_exception(error)

    @property
    def seconds_without_step(self) -> float:
        """How long ago a turn was begun that has not ended; 0 where there is nothing to do."""
        return 0.0 if self._thread is None else max(time.monotonic() - self._alive, 0.0)

    def join(self) -> None:
        """Wait until there is nothing to do."""
        while (thread := self._thread) is not None:
            thread.join()

    def close(self) -> None:
        """Stop after the step that runs."""
        with self._lock:
            self._closing = True
            self._news.notify()
        self.join()

    def _post(self, message: Callable[[], None]) -> None:
        self._check()
        with self._lock:
            self._inbox.append(message)
            self._news.notify()
            if self._thread is None and not self._closing:
                self._alive = time.monotonic()
                self._thread = threading.Thread(target=self._work, name="jaxllm-engine", daemon=True)
                self._thread.start()

    # On its own thread

    def _work(self) -> None:
        while True:
            with self._lock:
                while self._iterations and not (self._inbox or self._busy or self._closing):
                    self._alive = math.inf
                    self._news.wait()
                messages = list(self._inbox)
                self._inbox.clear()
                if self._closing or not (messages or self._busy):
                    self._thread = None
                    return
            self._alive = time.monotonic()
            try:
                for message in messages:
                    message()
                if self._busy:
                    self._turn()
            except BaseException as error:  # nobody is to wait for ever
                self._fail(self._waiting(), error)

    @property
    def _busy(self) -> bool:
        return bool(self._samples) or (self._engine_is_made and self._engine.busy)

    def _add(self, submission: Submission) -> None:
        try:
            scheduler = self._engine.scheduler
        except BaseException as error:
            submission.error = error
            submission.tell()
            return
        self._engine_is_made = True
        for sample in submission.samples:
            self._samples[sample.sequence.id] = sample, submission
            scheduler.add(sample.sequence)

    @property
    def _engine(self) -> Engine:
        return self._make_engine()

    def _drop(self, submission: Submission) -> None:
        for sample in submission.samples:
            if self._samples.pop(sample.sequence.id, None) is not None:
                self._engine.scheduler.cancel(sample.sequence.id)
        if not self._samples:
            self._engine.scheduler.release_finished()

    def _turn(self) -> None:
        """Run a step, and tell whom it concerns."""
        engine = self._engine
        try:
            engine.step(min((submission.steps for _, submission in self._samples.values()), default=1))
        except Exception as error:
            self._fail(_sequences(engine.current) or self._waiting(), error)
        else:
            self._tell(_sequences(engine.current))

    def _waiting(self) -> list[Sequence]:
        return [sample.sequence for sample, _ in self._samples.values()]

    def _tell(self, sequences: Iterable[Sequence]) -> None:
        """Make text of new tokens, and tell the submissions that have some."""
        concerned: dict[int, Submission] = {}
        for sequence in sequences:
            if sequence.id not in self._samples:
                continue  # cancelled
            sample, submission = self._samples[sequence.id]
            if sequence.error is not None:
                self._fail([sequence], sequence.error)
                continue
            try:
                if (found := sample.update()) is not None:
                    self._engine.scheduler.finish(sequence, "stop", found.stop, keep=found.keep)
            except Exception as error:
                self._fail([sequence], error)
                continue
            if sequence.finish_reason is not None:
                del self._samples[sequence.id]
                submission.unfinished -= 1
            concerned[id(submission)] = submission
        self._engine.scheduler.release_finished()
        for submission in concerned.values():
            submission.waits_for = ""
            submission.tell()

    def _fail(self, sequences: Iterable[Sequence], error: BaseException) -> None:
        """End the submissions of these sequences with an error."""
        for sequence in sequences:
            if sequence.id in self._samples:
                _, submission = self._samples[sequence.id]
                submission.error = error
                self._drop(submission)
                submission.tell()


def _sequences(step: ScheduledStep) -> list[Sequence]:
    """Those that a step gives tokens to, or to whose prompts it does something."""
    return [chunk.sequence for chunk in step.prefill] or list(step.decode)


_LOOPS: weakref.WeakSet[EngineLoop] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before the interpreter ends: a thread that still runs then may crash it."""
    for loop in list(_LOOPS):
        with suppress(Exception):
            loop.close()

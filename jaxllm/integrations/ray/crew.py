"""Workers and their tasks: who is idle takes the next one, and what a worker that died had is given to another."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from jaxllm.requests.outputs import RequestError

ATTEMPTS = 3  # workers that may die over a task before it is given up
FRUITLESS = 3  # deaths for each worker, with no task done in between, before the job is given up
MOST_SAID = 300  # characters of Ray's own words on a death


@dataclass(frozen=True)
class Death:
    """How a worker ended."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """Why a task was given up."""

    reason: str


class Crew:
    """Actors with `start()`, which says what they are, and `run(task)`; each has one task at a time.

    A worker that dies is replaced, where there is room for it: the others go on meanwhile. Close it, or use it in `with`: it
    ends the workers.

    Args:
      make: makes an actor.
    """

    def __init__(self, make: Callable[[], Any], size: int):
        self._make, self.size = make, size
        self._calls: dict[Any, tuple[Any, int | None]] = {}  # what will come -> its worker, and the task
        self._idle: list[Any] = []
        self._facts: list[Any] = []
        self._fruitless = 0
        for _ in range(size):
            self._hire()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        for worker in [*self._idle, *(worker for worker, _ in self._calls.values())]:
            ray.kill(worker)
        self._idle, self._calls = [], {}

    @property
    def facts(self) -> Any:
        """What the first worker that started is. Raises as `run` does."""
        while not self._facts:
            self._next()
        return self._facts[0]

    def run(self, tasks: Sequence[Any]) -> Generator[tuple[int, Any]]:
        """(index of a task, its result or Failed), as they come.

        Raises the ValueError or OSError of the first worker's start, and RequestError where workers die and nothing comes of it.
        """
        pending, deaths = deque(range(len(tasks))), Counter[int]()
        left = len(tasks)
        while left:
            while pending and self._idle:
                worker, task = self._idle.pop(), pending.popleft()
                self._calls[worker.run.remote(tasks[task])] = (worker, task)
            ended, result = self._next()
            if ended is None:
                continue
            if isinstance(result, Death):
                deaths[ended] += 1
                if deaths[ended] < ATTEMPTS:
                    pending.appendleft(ended)
                    continue
                result = Failed(f"{ATTEMPTS} workers died over it, the last of them so: {result.reason}")
            left -= 1
            yield ended, result

    def _next(self) -> tuple[int | None, Any]:
        """A task that ended and its result, or its worker's Death; no task where a worker started, or did not."""
        [call], _ = ray.wait([*self._calls], num_returns=1)
        worker, task = self._calls.pop(call)
        try:
            result = ray.get(call)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else None
            if task is None and not self._facts and isinstance(cause, ValueError | OSError):
                raise cause from None  # a sentence for the user, which every other worker would say too
            # What a task may raise, its worker has caught: what comes here may have broken the device.
            death = Death(_reason(error))
            self._replace(worker, death)
            return task, death
        self._idle.append(worker)
        if task is None:
            self._meet(result)
        else:
            self._fruitless = 0
        return task, result

    def _meet(self, facts: Any) -> None:
        if self._facts and facts != self._facts[0]:
            raise RequestError(f"workers differ ({self._facts[0]} and {facts}): take nodes of one kind, or name layout and dtype")
        self._facts.append(facts)

    def _hire(self) -> None:
        worker = self._make()
        self._calls[worker.start.remote()] = (worker, None)

    def _replace(self, worker: Any, death: Death) -> None:
        ray.kill(worker)  # it may live, on a node that is out of reach
        self._fruitless += 1
        if self._fruitless > FRUITLESS * self.size:
            raise RequestError(
                f"{self._fruitless} workers died one after another and did nothing ({death.reason}): see Ray's logs, and give "
                "each worker more memory or more devices"
            )
        self._hire()


def _reason(error: RayError) -> str:
    """What a worker raised, or what Ray says of its end."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    return " ".join(str(error).split())[:MOST_SAID]

"""What runs on a node: a model, in a process of its own, that generates, scores or answers requests.

Each class is made into an actor. The model is made by `start`, not by the constructor, so that its errors come back as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ray

from checkpoints.checkpoint import open_tokenizer
from checkpoints.hub import TOKENIZER_PATTERNS, resolve
from jaxllm.execution.steps import MAX_STEPS
from jaxllm.generation.loop import Submission
from jaxllm.generation.request import Request
from jaxllm.integrations.ray.cluster import Place
from jaxllm.integrations.ray.crew import Crew
from jaxllm.llm import LLM
from jaxllm.requests.outputs import RequestError, RequestOutput
from jaxllm.requests.prompts import parse_prompt
from jaxllm.requests.sampling_params import SamplingParams
from jaxllm.scoring.scorer import Cut, Packing, Score
from sharding.mesh import virtual_cpu_devices

MOST_WAITING = 1 << 30


@dataclass(frozen=True)
class Model:
    """A model that is yet to be made: its name, the options of `LLM`, and how many devices a CPU is split into."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    virtual_devices: int | None = None

    @classmethod
    def of(cls, name: str | Path, options: Mapping[str, Any], virtual_devices: int | None = None) -> Model:
        """`name` as workers find it, whatever folder they run in."""
        here = Path(name).expanduser()
        return cls(str(here.resolve() if here.exists() else name), dict(options), virtual_devices)

    def make(self, **options: Any) -> LLM:
        """The LLM. Raises what it raises."""
        if self.virtual_devices is not None:
            virtual_cpu_devices(self.virtual_devices)
        return LLM(self.name, **self.options, **options)

    def tokenizer(self) -> Any:
        """The tokenizer that workers will have; nothing else of the model is fetched. Raises CheckpointError."""
        other = self.options.get("tokenizer")
        if other is None:
            return open_tokenizer(resolve(self.name, None, TOKENIZER_PATTERNS, self.options.get("revision")))
        return open_tokenizer(resolve(other, None, TOKENIZER_PATTERNS)) if isinstance(other, (str, Path)) else other


class Facts(NamedTuple):
    """What all workers of a job have alike.

    Attributes:
      devices: of each worker.
      cut: how they pack what they score.
      max_score_len: tokens that they score, at most.
    """

    dtype: str
    layout: str
    devices: int
    cut: Cut
    max_score_len: int

    @classmethod
    def of(cls, llm: LLM) -> Facts:
        plan = llm.plan
        return cls(plan.dtype, plan.layout.name, plan.layout.mesh.size, llm.scorer.cut, llm.max_score_len)


class Prompts(NamedTuple):
    """A task of a `Generator`: rows by their numbers, of which they draw their seeds, as one process would number them."""

    rows: list[int]
    prompts: list[Any]
    params: list[SamplingParams | None]


class Generator:
    """Generates."""

    def __init__(self, model: Model):
        self.model = model

    def start(self) -> Facts:
        self.llm = self.model.make(wait=False)
        return Facts.of(self.llm)

    def run(self, task: Prompts) -> list[RequestOutput | str]:
        """Each row's output, or why it has none. Raises what ended all of them: the next worker may do better."""
        running = [self._submit(*one) for one in zip(*task, strict=True)]
        ended = [one if isinstance(one, str) else _ended(*one) for one in running]
        errors = [one for one in ended if isinstance(one, Exception)]
        if errors and not any(isinstance(one, RequestOutput) for one in ended):
            raise errors[0]
        return [f"{type(one).__name__}: {one}" if isinstance(one, Exception) else one for one in ended]

    def _submit(self, row: int, prompt: Any, params: SamplingParams | None) -> tuple[Request, Submission] | str:
        llm = self.llm
        try:
            [request] = llm.make_requests([parse_prompt(prompt)], [params or llm.get_default_sampling_params()], [row])
        except RequestError as error:
            return str(error)
        return request, llm.submit([request], MAX_STEPS)


def _ended(request: Request, news: Submission) -> RequestOutput | Exception:
    """The output, once it is there; a step that fails ends its own requests alone."""
    try:
        for _ in news:
            pass
    except Exception as error:
        return error
    return request.output()


class ScoreWorker:
    """Scores parts of a packing."""

    def __init__(self, model: Model):
        self.model = model

    def start(self) -> Facts:
        self.llm = self.model.make(workload="score", max_num_seqs=1, wait=False)
        return Facts.of(self.llm)

    def run(self, packing: Packing) -> list[tuple[int, Score | str]]:
        """Each wanted pair with its score, or why it has none."""
        try:
            return list(self.llm.run_packing(packing))
        except RequestError:  # one pair's; the others are asked for alone, in the same steps
            return [(pair, self._one(packing, pair)) for pair in sorted(packing.wanted)]

    def _one(self, packing: Packing, pair: int) -> Score | str:
        try:
            [(_, score)] = self.llm.run_packing(packing.only([pair]))
            return score
        except RequestError as error:
            return str(error)


class BatchWorker:
    """Answers lines of a batch file, as the server would."""

    def __init__(self, model: Model, names: Sequence[str]):
        self.model, self.names = model, names

    def start(self) -> Facts:
        from jaxllm.serving.app import make_app
        from jaxllm.serving.server import Server, Settings

        server = Server(Settings(self.names, max_waiting=MOST_WAITING), self.model.make)
        server.load()
        if server.failure is not None:
            raise server.failure
        self.app = make_app(server)
        self.loop = asyncio.new_event_loop()  # one for all tasks: what waits in the app is bound to it
        self.at_once = 2 * server.llm.plan.max_num_seqs
        return Facts.of(server.llm)

    def run(self, lines: Sequence[Any]) -> list[tuple[Any, int, Any]]:
        """(line, status, body) of each."""
        from jaxllm.serving.batch_file import run_batch

        found: list[tuple[Any, int, Any]] = []
        self.loop.run_until_complete(run_batch(self.app, lines, self.at_once, lambda *answer: found.append(answer)))
        return found


def crew_of(kind: Callable[..., Any], place: Place, *arguments: Any) -> Crew:
    """Workers of a class, at a place that is filled in."""
    actor = ray.remote(kind).options(**place.options())
    return Crew(lambda: actor.remote(*arguments), place.workers or 1)

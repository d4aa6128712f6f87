"""The model behind the API: loading, ready or stuck; who may use it, and how many at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from jaxllm.generation.scheduler import Scheduler
from jaxllm.llm import LLM
from jaxllm.serving.errors import ApiError
from jaxllm.serving.generation import now
from jaxllm.serving.messages import response_template
from jaxllm.serving.metrics import Metrics
from jaxllm.serving.prompt_scores import PromptScores
from jaxllm.serving.protocol import Sampled

STUCK_SECONDS = 300.0  # in which a step ends, the compilation of a large model's programs included
RETRY_SECONDS = 1
LAST_WORDS_SECONDS = 2.0  # for answers that say that nothing more will come


@dataclass(frozen=True)
class Settings:
    """How a server is set up.

    Attributes:
      names: under which requests ask for the model; answers carry the first.
      api_keys: one of which requests must bring; none: all may come.
      max_waiting: samples that may wait for their turn beside those that run, before requests are turned away.
      max_body_bytes: of a request.
      trust_request_templates: whether a request may bring a chat template of its own.
      profile_dir: where profiles go that requests ask for; None: they may not.
    """

    names: Sequence[str]
    api_keys: Sequence[str] = ()
    max_waiting: int = 1024
    max_body_bytes: int = 32 << 20
    trust_request_templates: bool = False
    profile_dir: str | None = None


class Server:
    """One model, from before it is loaded.

    Args:
      make: makes the LLM; called once, by `load`.
    """

    def __init__(self, settings: Settings, make: Callable[[], LLM]):
        self.settings = settings
        self._make = make
        self._llm: LLM | None = None
        self.scheduler: Scheduler | None = None
        self.failure: BaseException | None = None
        self.loss: ApiError | None = None
        self.metrics = Metrics(self)
        self.started = now()
        self.admitted = 0  # samples that have not ended
        self._profile, self._profiling = threading.Lock(), False

    # Loading

    def load(self) -> None:
        """Make the LLM; what goes wrong is kept in `failure`."""
        try:
            llm = self._make()
            self.scheduler = llm.engine.scheduler
            self._llm = llm
            if llm.group is not None:
                llm.group.on_loss = self._lost
        except BaseException as error:
            self.failure = error

    def load_beside(self, done: Callable[[], None]) -> None:
        """Load on a thread of its own, and then call `done` there."""

        def work() -> None:
            self.load()
            done()

        threading.Thread(target=work, name="jaxllm-load", daemon=True).start()

    def _lost(self, sentence: str) -> None:
        """Another of the model's processes has ended, and this one will: who waits is told why."""
        self.loss = ApiError(503, sentence)
        if self._llm is not None:
            self._llm.abandon(self.loss)
        time.sleep(LAST_WORDS_SECONDS)

    @property
    def llm(self) -> LLM:
        """Raises ApiError while it is loaded, or where that failed."""
        if self.loss is not None:
            raise self.loss
        if self.failure is not None:
            raise ApiError(503, f"the model could not be loaded: {self.failure}")
        if self._llm is None:
            raise ApiError(503, "the model is being loaded: try again soon", headers={"Retry-After": str(RETRY_SECONDS)})
        return self._llm

    # Requests

    @cached_property
    def response_template(self) -> dict[str, Any] | None:
        """How the model's answers are written."""
        return response_template(self.llm.get_tokenizer())

    @cached_property
    def prompt_scores(self) -> PromptScores:
        """What scores prompts for their own sake."""
        return PromptScores(self.llm, self.llm.engine.scheduler)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for another model than the one that is served."""
        if name is not None and name not in self.settings.names:
            known = ", ".join(self.settings.names)
            raise ApiError(404, f"there is no model {name!r}: this server has {known}", param="model", code="model_not_found")

    def name_of(self, body: Sampled) -> str:
        """What the answer calls the model."""
        return body.model or self.settings.names[0]

    @contextmanager
    def admit(self, samples: int) -> Iterator[None]:
        """While so many samples are on their way. Raises ApiError where too many are."""
        room = self.llm.plan.max_num_seqs + self.settings.max_waiting
        if self.admitted + samples > room:
            raise ApiError(
                429,
                f"{self.admitted} answers are on their way and {room} is the most: try again later",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        self.admitted += samples
        try:
            yield
        finally:
            self.admitted -= samples

    # Profiles

    def start_profile(self) -> None:
        """Raises ApiError where none may be written, or one is."""
        folder = self._profile_dir
        with self._profile:
            if self._profiling:
                raise ApiError(409, "a profile is being written: POST /stop_profile ends it")
            jax.profiler.start_trace(folder)
            self._profiling = True

    def stop_profile(self) -> str:
        """The folder of the profile. Raises ApiError where none was begun."""
        folder = self._profile_dir
        with self._profile:
            if not self._profiling:
                raise ApiError(409, "no profile is being written: POST /start_profile begins one")
            self._profiling = False
            jax.profiler.stop_trace()
        return folder

    @property
    def _profile_dir(self) -> str:
        if self.settings.profile_dir is None:
            raise ApiError(404, "this server writes no profiles: start it with --profile-dir")
        return self.settings.profile_dir

    # Health

    def health(self) -> tuple[int, dict[str, Any]]:
        """A status and what it stands for."""
        if self.failure is not None:
            return 503, {"status": "failed", "message": str(self.failure)}
        if self.loss is not None:
            return 503, {"status": "failed", "message": self.loss.detail}
        if self._llm is None:
            return 503, {"status": "loading"}
        waited = self._llm.seconds_without_step
        if waited > STUCK_SECONDS:
            return 503, {"status": "stuck", "message": f"no step has ended for {waited:.0f} s, and {self.admitted} answers wait"}
        return 200, {"status": "ok"}

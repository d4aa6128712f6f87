"""What Prometheus is told, with vLLM's meanings under `jaxllm:`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from jaxllm.generation.request import Request
from jaxllm.generation.scheduler import Scheduler, Statistics
from jaxllm.serving.generation import Delta

if TYPE_CHECKING:
    from jaxllm.serving.server import Server

SECONDS = (
    0.001,
    0.005,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
    30,
    60,
    120,
)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """The metrics of one server."""

    def __init__(self, server: Server):
        self._server = server
        self.registry = CollectorRegistry()
        self._gauge("num_requests_running", "Sequences that run.", lambda s: len(s.running))
        self._gauge("num_requests_waiting", "Sequences that wait for room.", lambda s: len(s.waiting))
        self._gauge("kv_cache_usage_perc", "The part of the cache's pages that are held, from 0 to 1.", lambda s: s.pages_held)
        self._statistic("prefix_cache_queries", "Tokens of prompts that were looked for in the cache.", lambda s: s.prompt_tokens)
        self._statistic("prefix_cache_hits", "Of these, the tokens that were found.", lambda s: s.shared_tokens)
        self._statistic("num_preemptions", "How often a sequence gave its pages back.", lambda s: s.preempted)
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens of answers.")
        self.successes = self._counter("request_success", "Samples by how they ended.", ("finished_reason",))
        self.first_token = self._seconds("time_to_first_token_seconds", "From a request to its first token.")
        self.between_tokens = self._seconds("inter_token_latency_seconds", "Between two tokens of a sample, of one step's alike.")
        self.whole = self._seconds("e2e_request_latency_seconds", "From a request to its end.")
        self.prompt_lengths = Histogram(
            "jaxllm:request_prompt_tokens", "Tokens of a prompt.", buckets=TOKENS, registry=self.registry
        )
        self.answer_lengths = Histogram(
            "jaxllm:request_generation_tokens", "Tokens of a sample.", buckets=TOKENS, registry=self.registry
        )

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, what: str, of: Callable[[Scheduler], float]) -> None:
        gauge = Gauge(f"jaxllm:{name}", what, registry=self.registry)
        gauge.set_function(lambda: of(self._server.llm.engine.scheduler) if self._server.ready else 0.0)

    def _statistic(self, name: str, what: str, of: Callable[[Statistics], float]) -> None:
        self._gauge(name, what, lambda scheduler: of(scheduler.statistics))

    def _counter(self, name: str, what: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"jaxllm:{name}", what, labels, registry=self.registry)

    def _seconds(self, name: str, what: str) -> Histogram:
        return Histogram(f"jaxllm:{name}", what, buckets=SECONDS, registry=self.registry)

    def watch(self, requests: Sequence[Request]) -> Watch:
        """What looks on while requests are answered."""
        return Watch(self, requests)


class Watch:
    """Looks on while requests are answered."""

    def __init__(self, metrics: Metrics, requests: Sequence[Request]):
        self._metrics, self._began = metrics, time.perf_counter()
        self._last: dict[tuple[int, int], float] = {}
        self._counts: dict[tuple[int, int], int] = {}
        for request in requests:
            metrics.prompt_tokens.inc(len(request.ids))
            metrics.prompt_lengths.observe(len(request.ids))

    def see(self, deltas: Sequence[Delta]) -> None:
        """What samples have gained just now."""
        m, now = self._metrics, time.perf_counter()
        for delta in deltas:
            key, tokens = (delta.request, delta.index), len(delta.token_ids)
            self._counts[key] = self._counts.get(key, 0) + tokens
            m.generation_tokens.inc(tokens)
            if tokens and key not in self._last:
                m.first_token.observe(now - self._began)
                self._last[key] = now
            elif tokens:
                for _ in range(tokens):
                    m.between_tokens.observe((now - self._last[key]) / tokens)
                self._last[key] = now
            if delta.finish_reason is not None:
                m.whole.observe(now - self._began)
                m.answer_lengths.observe(self._counts[key])
                m.successes.labels(delta.finish_reason).inc()

"""What Prometheus is told, with vLLM's meanings under `jaxllm:`."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from jaxllm.generation.request import Request
from jaxllm.serving.generation import Delta

if TYPE_CHECKING:
    from jaxllm.serving.server import Server

# fmt: off
SECONDS = (0.001, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1,
           0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60, 120)
# fmt: on
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Histogram(Collector):
    """Prometheus's own takes a value at a time, and eight tokens that come together have the same.

    Args:
      buckets: upper bounds, in order.
    """

    def __init__(self, name: str, what: str, buckets: Sequence[float]):
        self._name, self._what, self._bounds = name, what, buckets
        self._counts, self._sum = [0] * (len(buckets) + 1), 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """So many times the same value."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[Metric]:
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(names, map(float, accumulate(self._counts)), strict=True))
        yield HistogramMetricFamily(self._name, self._what, buckets=buckets, sum_value=self._sum)


class OfEngine(Collector):
    """What the engine itself counts, as it stands when it is asked."""

    def __init__(self, server: Server):
        self._server = server

    def collect(self) -> Iterator[Metric]:
        scheduler = self._server.scheduler
        if scheduler is None:
            return
        for name, what, value in (
            ("num_requests_running", "Sequences that run.", len(scheduler.running)),
            ("num_requests_waiting", "Sequences that wait for room.", len(scheduler.waiting)),
            ("kv_cache_usage_perc", "The part of the cache's pages that are held, from 0 to 1.", scheduler.pages_held),
        ):
            yield GaugeMetricFamily(f"jaxllm:{name}", what, value)
        so_far = scheduler.statistics
        for name, what, value in (
            ("prefix_cache_queries", "Tokens of prompts that were looked for in the cache.", so_far.prompt_tokens),
            ("prefix_cache_hits", "Of these, the tokens that were found.", so_far.shared_tokens),
            ("num_preemptions", "How often a sequence gave its pages back.", so_far.preempted),
        ):
            yield CounterMetricFamily(f"jaxllm:{name}", what, value)


class Metrics:
    """The metrics of one server."""

    def __init__(self, server: Server):
        self.registry = CollectorRegistry()
        self.registry.register(OfEngine(server))
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens of answers.")
        self.successes = self._counter("request_success", "Samples by how they ended.", ("finished_reason",))
        self.first_token = self._histogram("time_to_first_token_seconds", "From a request to its first token.", SECONDS)
        self.between_tokens = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a sample, of one step's alike.", SECONDS
        )
        self.whole = self._histogram("e2e_request_latency_seconds", "From a request to its end.", SECONDS)
        self.queue = self._histogram("request_queue_time_seconds", "From a request to its sample's start.", SECONDS)
        self.prefill = self._histogram("request_prefill_time_seconds", "From a sample's start to its first token.", SECONDS)
        self.decode = self._histogram("request_decode_time_seconds", "From a sample's first token to its end.", SECONDS)
        self.prompt_lengths = self._histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self.answer_lengths = self._histogram("request_generation_tokens", "Tokens of a sample.", TOKENS)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"jaxllm:{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: Sequence[float]) -> Histogram:
        found = Histogram(f"jaxllm:{name}", what, buckets)
        self.registry.register(found)
        return found

    def watch(self, requests: Sequence[Request]) -> Watch:
        """What looks on while requests are answered."""
        return Watch(self, requests)


class Watch:
    """Looks on while requests are answered."""

    def __init__(self, metrics: Metrics, requests: Sequence[Request]):
        self._metrics, self._began = metrics, time.perf_counter()
        self._requests = requests
        self._first: dict[tuple[int, int], float] = {}
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
                self._first[key] = self._last[key] = now
            elif tokens:
                m.between_tokens.observe((now - self._last[key]) / tokens, tokens)
                self._last[key] = now
            if delta.finish_reason is not None:
                self._end(key, delta.finish_reason, now)

    def _end(self, key: tuple[int, int], reason: str, now: float) -> None:
        m, (request, index) = self._metrics, key
        m.whole.observe(now - self._began)
        m.answer_lengths.observe(self._counts[key])
        m.successes.labels(reason).inc()
        admitted = self._requests[request].samples[index].sequence.admitted
        if admitted is not None and key in self._first:
            m.queue.observe(max(admitted - self._began, 0.0))
            m.prefill.observe(max(self._first[key] - admitted, 0.0))
            m.decode.observe(now - self._first[key])

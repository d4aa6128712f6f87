"""Requests as they come to a server: prompts and answers of ShareGPT-like lengths, all at once or one by one.

The lengths are lognormal, as those of conversations are, scaled so that their mean is the one asked for. Prompts are random
tokens. What was measured of each request becomes tokens a second and percentiles. Plain Python and numpy.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

FEWEST = 4  # tokens of a prompt or an answer; ShareGPT's shorter ones are left out of benchmarks
FIRST_ID = 5  # the tokens before it are special in many vocabularies
SIGMA = 1.0  # of the lognormal
PERCENTILES = (50, 90, 99)


class Request(NamedTuple):
    """A prompt, the number of tokens it is answered with, and when it arrives, in seconds after the start."""

    prompt: list[int]
    new_tokens: int
    arrival: float


class Times(NamedTuple):
    """Seconds after the start at which a request had its first and its last token."""

    first: float
    last: float


class Served(NamedTuple):
    """What a server did: the times of each request, and whatever it counts, such as `cached_tokens`."""

    times: list[Times]
    counts: dict[str, float]


class Lengths(NamedTuple):
    """Mean and maximum of a number of tokens."""

    mean: float
    most: int

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """`count` lognormal lengths between FEWEST and the maximum, whose own mean is the one asked for to a tenth or so."""
        shape = np.exp(SIGMA * rng.standard_normal(count))
        low, high = 0.0, float(self.most) / shape.min()
        for _ in range(60):  # the mean grows with the scale
            scale = (low + high) / 2
            low, high = (scale, high) if self._fit(scale * shape).mean() < self.mean else (low, scale)
        return [int(length) for length in self._fit(high * shape)]

    def _fit(self, lengths: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(lengths), FEWEST, self.most)


@dataclass(frozen=True)
class Workload:
    """Requests of the same lengths and arrivals in every run, with other tokens in each.

    Attributes:
      count: requests.
      prompt, new: tokens of a prompt, the shared ones not counted, and of its answer.
      vocab_size: of the model.
      rate: requests a second, as a Poisson process; None: all at once.
      shared_prefix: tokens that all prompts begin with, in every run, as with a system prompt; a cache of prefixes has them from
        the warm run on, and nothing else, since the tokens after them are new in each run.
      seed: of everything.
    """

    count: int
    prompt: Lengths
    new: Lengths
    vocab_size: int
    rate: float | None = None
    shared_prefix: int = 0
    seed: int = 0
    prompt_lengths: list[int] = field(init=False)
    new_lengths: list[int] = field(init=False)
    arrivals: list[float] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        gaps = rng.exponential(1.0, self.count)
        object.__setattr__(self, "prompt_lengths", self.prompt.draw(rng, self.count))
        object.__setattr__(self, "new_lengths", self.new.draw(rng, self.count))
        object.__setattr__(self, "arrivals", (np.cumsum(gaps) / self.rate if self.rate else 0 * gaps).tolist())

    @classmethod
    def of(cls, args: argparse.Namespace, vocab_size: int) -> Workload:
        """As the options of `bench.throughput` say."""
        prompt, new = Lengths(*args.prompt), Lengths(*args.tokens)
        return cls(args.requests, prompt, new, vocab_size, args.rate, args.shared_prefix, args.seed)

    def requests(self, run: int) -> list[Request]:
        """The requests of the run of that number, in the order of their arrival."""
        shared = self._tokens(np.random.default_rng(self.seed), self.shared_prefix)
        rng = np.random.default_rng((self.seed, run))
        each = zip(self.prompt_lengths, self.new_lengths, self.arrivals, strict=True)
        return [Request(shared + self._tokens(rng, length), new, arrival) for length, new, arrival in each]

    def _tokens(self, rng: np.random.Generator, count: int) -> list[int]:
        tokens: list[int] = rng.integers(FIRST_ID, self.vocab_size, count).tolist()
        return tokens

    def describe(self) -> dict[str, object]:
        """The workload in numbers."""
        arrivals = "at once" if self.rate is None else f"{self.rate:g} a second"
        return {
            "requests": self.count,
            "arrivals": arrivals,
            "shared_prefix": self.shared_prefix,
            "seed": self.seed,
            "prompt_tokens": _distribution(self.prompt_lengths),
            "new_tokens": _distribution(self.new_lengths),
        }


def _distribution(lengths: list[int]) -> dict[str, float]:
    named = percentiles(lengths)
    return {"mean": statistics.fmean(lengths), "least": min(lengths), **named, "most": max(lengths), "total": sum(lengths)}


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """The 50th, 90th and 99th percentile, interpolated, as `p50`, `p90`, `p99`."""
    found = np.percentile(list(values), PERCENTILES)
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)}


def summary(requests: list[Request], served: Served) -> dict[str, float]:
    """Rates and latencies of a run, in seconds.

    TTFT is the time from a request's arrival to its first token, TPOT the time of each token after that.
    """
    seconds = max(times.last for times in served.times)
    each = list(zip(requests, served.times, strict=True))
    ttft = [times.first - request.arrival for request, times in each]
    tpot = [(times.last - times.first) / (request.new_tokens - 1) for request, times in each]
    return {
        "seconds": seconds,
        "requests_per_second": len(requests) / seconds,
        "new_tokens_per_second": sum(request.new_tokens for request in requests) / seconds,
        **{f"ttft_{p}": value for p, value in percentiles(ttft).items()},
        **{f"tpot_{p}": value for p, value in percentiles(tpot).items()},
        **served.counts,
    }

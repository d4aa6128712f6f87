"""Penalties, bad words and allowed ids over many tokens: what vLLM's rules make of each step's logits, however many a call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_checkpoint import write_tiny

from checkpoints.checkpoint import Checkpoint, open_checkpoint
from checkpoints.load import load
from jaxllm.decoder.cache_spec import Pool
from jaxllm.execution.sampling import LOGPROBS_MODES
from jaxllm.execution.steps import MAX_STEPS, Steps
from jaxllm.generation.engine import Engine
from jaxllm.generation.sequence import Sequence
from jaxllm.requests.sampling_params import SamplingParams
from sharding.layout import make_layout

V = 97
TOKENS = 24
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79]
Words = tuple[tuple[int, ...], ...]
LIKELY = {7: 9.0, 8: 8.5, 9: 8.0, 10: 7.5}  # tokens that come again and again

TWO_ARE_LEFT: dict[str, object] = {
    "allowed_token_ids": [7, 20, 21],
    "logit_bias": {7: -np.inf, 30: 50.0},
    "presence_penalty": 2.0,
}
CONTROLS: dict[str, tuple[dict[str, object], Words]] = {
    "nothing": ({}, ()),
    "presence": ({"presence_penalty": 1.7, "logit_bias": LIKELY}, ()),
    "frequency": ({"frequency_penalty": 0.9, "logit_bias": LIKELY}, ()),
    "a reward": ({"frequency_penalty": -0.4, "presence_penalty": -1.0}, ()),
    "all penalties": ({"presence_penalty": 0.6, "frequency_penalty": 0.3, "repetition_penalty": 1.4, "logit_bias": LIKELY}, ()),
    "bad words": ({"logit_bias": LIKELY}, ((7, 7), (8,), (7, 9, 7), (9, 9), (7, 9, 10, 7), (9, 7, 9))),
    "bad words and penalties": ({"logit_bias": LIKELY, "frequency_penalty": 0.5}, ((7, 8), (8, 7, 9))),
    "allowed": ({"allowed_token_ids": [7, 8, 20, 21, 22, 90], "frequency_penalty": 1.5}, ()),
    "allowed and biased": (TWO_ARE_LEFT, ((21, 20, 20),)),
}


def expected_logits(raw: np.ndarray, generated: list[int], params: SamplingParams, words: Words) -> np.ndarray:
    """vLLM's changes of one row of logits, in its order, up to the temperature."""
    x = raw.astype(np.float64)
    if params.allowed_token_ids is not None:
        x[[i for i in range(V) if i not in params.allowed_token_ids]] = -np.inf
    for *before, last in words:
        if before == generated[len(generated) - len(before) :]:
            x[last] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    counts = np.bincount(generated, minlength=V)
    seen = (counts > 0) | np.isin(np.arange(V), PROMPT)
    x[seen] = np.where(x > 0, x / params.repetition_penalty, x * params.repetition_penalty)[seen]
    return x - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_tiny(Path(tmp_path_factory.mktemp("controls"))))


@pytest.fixture(scope="module")
def make_engine(checkpoint: Checkpoint) -> Callable[..., Engine]:
    def make(mode: str, devices: int = 1, layout: str = "tensor") -> Engine:
        where = make_layout(layout, jax.devices()[:devices], checkpoint.config.hidden_size)
        params = load(checkpoint.source, checkpoint.rules, checkpoint.config, where, "float32")
        steps = Steps(checkpoint.config, where, "float32", LOGPROBS_MODES[mode])
        pool = Pool.of(checkpoint.config, 128, 128 * len(CONTROLS), len(CONTROLS))
        return Engine(steps, params, pool=pool, max_num_seqs=len(CONTROLS))

    return make


def run(engine: Engine, steps: int, logprobs: int | None = None) -> dict[str, Sequence]:
    """All controls side by side, at most so many tokens a call."""
    sequences = {}
    for i, (name, (controls, words)) in enumerate(CONTROLS.items()):
        params = SamplingParams(temperature=0, logprobs=logprobs, **controls)  # type: ignore[arg-type]
        sequences[name] = Sequence(i, PROMPT, params, TOKENS, (), i, words)
        engine.scheduler.add(sequences[name])
    while any(s.finish_reason is None for s in sequences.values()):
        engine.step(steps)
    engine.scheduler.release_finished()
    return sequences


def logits_of(sequence: Sequence) -> np.ndarray:
    """What was reported of all tokens [step, V]."""
    return np.array([[choices[token].logprob for token in range(V)] for choices in sequence.logprobs])


@pytest.fixture(scope="module")
def raw(make_engine: Callable[..., Engine]) -> dict[str, Sequence]:
    return run(make_engine("raw_logits"), MAX_STEPS, logprobs=-1)


@pytest.mark.parametrize("name", CONTROLS)
def test_each_token_is_the_likeliest_that_the_rules_leave(raw: dict[str, Sequence], name: str) -> None:
    sequence, words = raw[name], CONTROLS[name][1]
    for step, logits in enumerate(logits_of(sequence)):
        expected = expected_logits(logits, sequence.tokens[:step], sequence.params, words)
        best, second = np.sort(expected)[[-1, -2]]
        assert best - second > 1e-4 or np.isneginf(second)
        assert sequence.tokens[step] == expected.argmax(), step


def test_the_controls_change_what_is_generated(raw: dict[str, Sequence]) -> None:
    tokens = {name: sequence.tokens for name, sequence in raw.items()}
    assert len({tuple(ids) for ids in tokens.values()}) == len(CONTROLS)
    assert set(tokens["allowed"]) <= {7, 8, 20, 21, 22, 90} and len(set(tokens["allowed"])) > 3
    assert set(tokens["allowed and biased"]) == {20, 21}
    for name, (_, words) in CONTROLS.items():
        runs = {tuple(tokens[name][i : i + n]) for n in range(1, 5) for i in range(TOKENS)}
        assert not runs.intersection(words)


@pytest.mark.parametrize("steps", [1, 3, MAX_STEPS])
def test_many_tokens_a_call_are_those_of_one_a_call(
    make_engine: Callable[..., Engine], raw: dict[str, Sequence], steps: int
) -> None:
    found = run(make_engine("raw_logprobs"), steps)
    assert {name: s.tokens for name, s in found.items()} == {name: s.tokens for name, s in raw.items()}


def test_controls_in_rows_on_several_devices(make_engine: Callable[..., Engine], raw: dict[str, Sequence]) -> None:
    found = run(make_engine("raw_logprobs", 4, "replicated-2x2"), MAX_STEPS)
    assert {name: s.tokens for name, s in found.items()} == {name: s.tokens for name, s in raw.items()}


def test_processed_logits_are_those_after_all_controls(make_engine: Callable[..., Engine], raw: dict[str, Sequence]) -> None:
    for name, sequence in run(make_engine("processed_logits"), MAX_STEPS, logprobs=-1).items():
        before = raw[name]
        assert sequence.tokens == before.tokens
        for step, (found, logits) in enumerate(zip(logits_of(sequence), logits_of(before), strict=True)):
            expected = expected_logits(logits, before.tokens[:step], before.params, CONTROLS[name][1])
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_all_logprobs_beside_a_few(make_engine: Callable[..., Engine], raw: dict[str, Sequence]) -> None:
    engine = make_engine("raw_logprobs")
    everything, few = (
        Sequence(i, PROMPT, SamplingParams(temperature=0, logprobs=n), TOKENS, (), 0) for i, n in enumerate((-1, 2))
    )
    for sequence in (everything, few):
        engine.scheduler.add(sequence)
    while engine.scheduler.busy:
        engine.step()
    assert everything.tokens == few.tokens == raw["nothing"].tokens
    for choices, some, logits in zip(everything.logprobs, few.logprobs, logits_of(raw["nothing"]), strict=True):
        assert [choice.rank for choice in choices.values()] == list(range(1, V + 1))  # the chosen one is the likeliest
        assert sum(np.exp(choice.logprob) for choice in choices.values()) == pytest.approx(1, abs=1e-5)
        assert list(some.items()) == list(choices.items())[:2]
        expected = logits - np.logaddexp.reduce(logits)
        np.testing.assert_allclose([choices[token].logprob for token in range(V)], expected, atol=1e-5)

"""Rows that pass longrope's short context, each at a time of its own, gain what they gain alone."""

from __future__ import annotations

import numpy as np
import pytest
from families import records, write
from tiny import random_row

from jaxllm import LLM, SamplingParams
from jaxllm.requests.outputs import RequestOutput

SHORT = 120  # tokens that are turned by the short factors
LENGTHS = (30, 100, SHORT - 1, SHORT, SHORT + 1, 90)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    one = records()["phi3 longrope"]
    folder = write(tmp_path_factory.mktemp("longrope"), one.config, one.shapes)
    llm = LLM(folder, layout="tensor", devices=1, max_model_len=256, max_num_seqs=4)
    assert llm.config.short_context == SHORT
    return llm


def test_crossing_beside_others_is_as_alone(llm: LLM) -> None:
    """With two samples a request, log-probabilities, a stop id, and fewer slots than sequences."""
    prompts = [random_row(i, [n], 0, 61).prompt for i, n in enumerate(LENGTHS)]
    params = [
        SamplingParams(temperature=0.9, seed=i, n=2, max_tokens=40, logprobs=2, stop_token_ids=[7]) for i in range(len(LENGTHS))
    ]
    together = llm.generate(prompts, params)
    for prompt, how, output in zip(prompts, params, together, strict=True):
        (alone,) = llm.generate([prompt], how)
        _assert_same(output, alone)
    assert any(len(prompt) < SHORT < len(prompt) + 40 for prompt in prompts)


def test_an_answer_may_end_where_the_short_context_does(llm: LLM) -> None:
    prompt = random_row(9, [SHORT - 2], 0, 61).prompt
    longer = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))[0].outputs[0].token_ids
    for tokens in (1, 2, 3, 4):
        output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))[0].outputs[0]
        assert output.token_ids == longer[:tokens] and output.finish_reason == "length"


def _assert_same(one: RequestOutput, other: RequestOutput) -> None:
    for ours, theirs in zip(one.outputs, other.outputs, strict=True):
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        assert ours.logprobs is not None and theirs.logprobs is not None
        for mine, its in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert mine.keys() == its.keys()
            np.testing.assert_allclose([x.logprob for x in mine.values()], [x.logprob for x in its.values()], atol=1e-4)

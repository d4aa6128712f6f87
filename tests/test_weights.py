"""Weights handed over in memory: the model is that of a file of them, and no step has some of the old and some of the new."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_checkpoint import CONFIG, write_tiny, write_tokenizer

from checkpoints.errors import CheckpointError
from jaxllm import LLM, RequestOutput, SamplingParams

SIZES = {"vocab_size": 258, "max_position_embeddings": 512}
GREEDY = SamplingParams(temperature=0, max_tokens=40, logprobs=0)
PROMPTS = [[*range(7 * i, 7 * i + 70 + i)] for i in range(5)]
ROUNDS = [pytest.param(6), pytest.param(100, marks=pytest.mark.full)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_tiny(tmp_path_factory.mktemp("weights"), **SIZES))


@pytest.fixture(scope="module")
def trees(folder: Path) -> list[dict[str, Any]]:
    """Weights of two models of one form."""
    first = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(1)
    second = {name: x + np.float32(0.3) * rng.standard_normal(x.shape).astype(np.float32) * x.std() for name, x in first.items()}
    return [{name: jnp.asarray(x) for name, x in tree.items()} for tree in (first, second)]


def make(folder: Path, tree: Any, **options: Any) -> LLM:
    return LLM.from_arrays(folder, tree, devices=1, max_num_seqs=4, max_model_len=512, **options)


def tokens(outputs: list[RequestOutput]) -> list[tuple[list[int], list[float]]]:
    found = []
    for output in outputs:
        [one] = output.outputs
        assert one.logprobs is not None
        logprobs = [choices[token].logprob for token, choices in zip(one.token_ids, one.logprobs, strict=True)]
        found.append((one.token_ids, [round(x, 3) for x in logprobs]))
    return found


def test_it_is_the_model_of_the_file(folder: Path, trees: list[dict[str, Any]], tmp_path: Path) -> None:
    llm, filed = make(folder, trees[0]), LLM(folder, devices=1, max_num_seqs=4, max_model_len=512)
    assert tokens(llm.generate(["abc"], GREEDY)) == tokens(filed.generate(["abc"], GREEDY))
    llm.save(tmp_path / "kept", to="safetensors")
    for name, x in load_file(tmp_path / "kept" / "model.safetensors").items():
        np.testing.assert_array_equal(x, trees[0][name])
    assert not any(x.is_deleted() for x in trees[0].values())


def test_without_a_folder(trees: list[dict[str, Any]], tmp_path: Path) -> None:
    llm = LLM.from_arrays(CONFIG | SIZES, trees[1], devices=2, layout="tensor", max_model_len=64)
    [output] = llm.generate([[1, 2, 3]], GREEDY)
    with pytest.raises(ValueError, match="revision and hf_overrides are of a model that is yet to be opened"):
        LLM.from_arrays(CONFIG | SIZES, trees[1], hf_overrides={"rope_theta": 2.0})
    with pytest.raises(ValueError, match="the tree of weights has no tokenizer"):
        llm.generate("abc")
    llm.save(tmp_path / "kept")
    [again] = LLM(tmp_path / "kept", devices=1, max_model_len=64).generate([[1, 2, 3]], GREEDY)
    assert again.outputs[0].token_ids == output.outputs[0].token_ids


def test_after_an_update_it_is_the_model_of_the_new_ones(folder: Path, trees: list[dict[str, Any]]) -> None:
    llm, fresh = make(folder, trees[0]), make(folder, trees[1])
    old = tokens(llm.generate(PROMPTS, GREEDY))
    assert llm.generate(PROMPTS[0], GREEDY)[0].num_cached_tokens == 64
    scored = [([5, 6], [[7, 8], [9]])]
    before, compiled = llm.score(scored), llm.compiled
    llm.update_weights(trees[1])
    assert llm.generate(PROMPTS[0], GREEDY)[0].num_cached_tokens == 0
    new = tokens(llm.generate(PROMPTS, GREEDY))
    assert new == tokens(fresh.generate(PROMPTS, GREEDY)) != old
    assert llm.score(scored) == fresh.score(scored) != before
    llm.update_weights(trees[0], donate=False)
    assert tokens(llm.generate(PROMPTS, GREEDY)) == old and llm.compiled == compiled


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_what_runs_goes_on_after_its_tokens(folder: Path, trees: list[dict[str, Any]], batch_invariant: bool) -> None:
    llm = make(folder, trees[0], batch_invariant=batch_invariant)
    long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    [alone] = llm.generate([PROMPTS[0]], long)
    [request] = llm.make_requests(prompts_of([PROMPTS[0]]), [long])
    updated = threading.Event()

    def update(error: BaseException | None) -> None:  # on the engine's thread
        if len(request.samples[0].sequence.tokens) >= 20 and not updated.is_set():
            updated.set()
            threading.Thread(target=llm.update_weights, args=(trees[1],)).start()

    submission = llm.submit([request], 1, update)
    while submission.unfinished:
        threading.Event().wait(0.01)
    got = request.output().outputs[0].token_ids
    kept = next(i for i, (a, b) in enumerate(zip(got, alone.outputs[0].token_ids, strict=True)) if a != b)
    assert updated.is_set() and 20 <= kept < 200 and len(got) == 200
    rest = SamplingParams(temperature=0, max_tokens=200 - kept, ignore_eos=True)
    [going_on] = make(folder, trees[1], batch_invariant=batch_invariant).generate([PROMPTS[0] + got[:kept]], rest)
    assert going_on.outputs[0].token_ids == got[kept:]


def memory(llm: LLM) -> int:
    """Bytes of all arrays, while nothing runs."""
    llm._loop.join()
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def prompts_of(ids: list[list[int]]) -> Any:
    from jaxllm.requests.prompts import parse_prompts

    return parse_prompts(ids)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_updates_under_load(folder: Path, trees: list[dict[str, Any]], rounds: int) -> None:
    """A token and its log-probability are of one model, and so is all of a scoring run; nothing is left behind."""
    llm = make(folder, trees[0])
    one = SamplingParams(temperature=0, max_tokens=1, logprobs=0)
    scored = [(prompt[:40], [prompt[40:]]) for prompt in PROMPTS]
    allowed_tokens, allowed_scores = [], []
    for tree in (trees[1], trees[0]):
        llm.update_weights(tree)
        allowed_tokens.append([tokens(llm.generate([prompt], one))[0] for prompt in PROMPTS])
        allowed_scores.append([[round(x.logprob, 2) for x in found] for found in llm.score(scored)])
    stop = threading.Event()
    seen: list[tuple[int, Any]] = []
    scores: list[Any] = []

    def generate(i: int) -> None:
        while not stop.is_set():
            seen.append((i, tokens(llm.generate([PROMPTS[i]], one))[0]))

    def score() -> None:
        while not stop.is_set():
            scores.append([[round(x.logprob, 2) for x in found] for found in llm.score(scored)])

    def stream() -> None:
        while not stop.is_set():
            assert len(llm.generate(PROMPTS[:2], SamplingParams(max_tokens=30, ignore_eos=True))) == 2

    before = memory(llm)
    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(generate, 0), pool.submit(generate, 1), pool.submit(score), pool.submit(stream)]
        try:
            for i in range(rounds):
                llm.update_weights(trees[(i + 1) % 2])
        finally:
            stop.set()
        for one_work in work:
            one_work.result()
    assert scores and all(one in allowed_scores for one in scores)
    assert len(seen) > 2 and all(found in [allowed[i] for allowed in allowed_tokens] for i, found in seen)
    assert memory(llm) <= before
    last = make(folder, trees[rounds % 2])
    assert tokens(llm.generate(PROMPTS, GREEDY)) == tokens(last.generate(PROMPTS, GREEDY))
    llm._loop.join()
    llm.engine.scheduler.check_integrity()


def test_a_tree_that_does_not_fit_changes_nothing(folder: Path, trees: list[dict[str, Any]]) -> None:
    llm = make(folder, trees[0])
    before = tokens(llm.generate(PROMPTS[:1], GREEDY))
    with pytest.raises(CheckpointError, match=r"the tree of weights lacks tensors lm_head.weight"):
        llm.update_weights({name: x for name, x in trees[1].items() if name != "lm_head.weight"}, donate=True)
    assert not any(x.is_deleted() for x in trees[1].values())
    assert tokens(llm.generate(PROMPTS[:1], GREEDY)) == before

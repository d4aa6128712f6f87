"""Law 4: scores of what is shared are those of each request alone, in every layout; and those of transformers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import DATA, SHARED
from tiny import Row, random_row, reference, write
from tiny_checkpoint import write_tiny, write_tokenizer

from checkpoints.checkpoint import open_checkpoint
from checkpoints.errors import CheckpointError
from checkpoints.load import load
from jaxllm import LLM, RequestError, SamplingParams
from jaxllm.decoder import tree_attention as trees
from jaxllm.decoder.attention import AttentionSpec
from jaxllm.evaluation.multiple_choice import read_questions
from jaxllm.execution.batch import TARGETS, Scored
from jaxllm.execution.steps import Steps
from jaxllm.scoring.scorer import Scorer, Shape
from jaxllm.scoring.trie import Trie, pack
from sharding.layout import make_layout

Pairs = list[tuple[list[int], list[int]]]
LAYOUTS = [("tensor", 1), ("tensor", 4), ("replicated", 4), ("gathered", 3), ("gathered", 4), ("gathered-2x2", 4)]


def scorer(path: Path, layout: str, devices: int, row_length: int = 256) -> Scorer:
    checkpoint = open_checkpoint(path)
    laid_out = make_layout(layout, jax.devices()[:devices], checkpoint.config.hidden_size)
    params = load(checkpoint.source, checkpoint.rules, checkpoint.config, laid_out, "float32")
    return Scorer(Steps(checkpoint.config, laid_out, "float32"), lambda: params, row_length)


def scores(scorer: Scorer, pairs: Pairs) -> list[list[float]]:
    found = dict(scorer.run(scorer.pack(pairs)))
    assert sorted(found) == list(range(len(pairs)))
    for (_, continuation), (_, score) in zip(pairs, sorted(found.items()), strict=True):
        assert score.token_ids == continuation and score.logprob == pytest.approx(sum(score.token_logprobs))
    return [found[i].token_logprobs for i in range(len(pairs))]


def transformers_scores(path: Path, pairs: Pairs) -> list[tuple[list[float], bool]]:
    found = []
    for context, continuation in pairs:
        logits = reference(path, Row([[*context, *continuation]], []))[len(context) - 1 : -1]
        logprobs = logits - np.logaddexp.reduce(logits.astype(np.float64), axis=-1, keepdims=True)
        greedy = bool((logits.argmax(-1) == continuation).all())
        found.append((logprobs[np.arange(len(continuation)), continuation].tolist(), greedy))
    return found


def shared_pairs(seed: int, vocab: int) -> Pairs:
    """Contexts and endings that begin alike, some of them equal; and more targets at one token than one place has."""
    rng = np.random.default_rng(seed)
    start = rng.integers(vocab, size=40).tolist()
    pairs: Pairs = []
    for _ in range(8):
        context = start[: rng.integers(1, 40)] + rng.integers(vocab, size=rng.integers(1, 30)).tolist()
        ending = rng.integers(vocab, size=3).tolist()
        pairs += [(context, ending + rng.integers(vocab, size=rng.integers(1, 9)).tolist()) for _ in range(4)]
    pairs += [(start, [i]) for i in range(2 * TARGETS + 1)]
    return pairs + pairs[:2]


@pytest.mark.parametrize(("layout", "devices"), LAYOUTS)
def test_scores_are_those_of_transformers(tmp_path_factory: pytest.TempPathFactory, layout: str, devices: int) -> None:
    pytest.importorskip("torch")
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 45, "vocab_size": 61}
    path = write(tmp_path_factory, sizes | {"attention_bias": True})
    pairs = shared_pairs(devices, 61)
    # What the model continues with itself, so that some continuations are greedy.
    context = random_row(0, [9], 0, 61).prompt
    best = int(reference(path, Row([context], []))[-1].argmax())
    pairs += [(context, [best]), (context, [(best + 1) % 61])]
    one = scorer(path, layout, devices)
    packing = one.pack(pairs)
    assert packing.tokens < packing.unshared and len(packing.rows) > 1
    found = dict(one.run(packing))
    expected = transformers_scores(path, pairs)
    for i, (logprobs, greedy) in enumerate(expected):
        np.testing.assert_allclose(found[i].token_logprobs, logprobs, atol=1e-4, rtol=0)
        assert found[i].is_greedy == greedy
    assert {greedy for _, greedy in expected} == {True, False}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return scorer(write_tiny(tmp_path_factory.mktemp("score")), "tensor", 1, row_length=128)


tokens = st.integers(0, 2)
pairs_of_tokens = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=9), st.lists(tokens, min_size=1, max_size=6)), min_size=2, max_size=40
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs_of_tokens)
def test_shared_equals_unshared(small: Scorer, pairs: Pairs) -> None:
    together = scores(small, pairs)
    for pair, found in zip(pairs, together, strict=True):
        np.testing.assert_allclose(found, scores(small, [pair])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("spec", [AttentionSpec(8**-0.5, 0, None), AttentionSpec(0.5, 2.0, 70)], ids=["plain", "window"])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_both_forms_of_attention_agree(kv_heads: int, spec: AttentionSpec) -> None:
    rng = np.random.default_rng(kv_heads)
    given = [[*([1] * n), *rng.integers(5, size=rng.integers(1, 150))] for n in (0, 5, 90, 200) for _ in range(9)]
    for row in pack(Trie([s for s in given if s]), 512, 512):
        q, k, v = (jax.numpy.asarray(rng.normal(size=(512, heads, 8)), "float32") for heads in (3, kv_heads, kv_heads))
        index = np.arange(512)
        seen = (index[None, :] <= index[:, None]) & (index[:, None] < row.end[None, :])
        seen &= row.position[:, None] - row.position[None, :] < (spec.window or 512)
        dots = np.einsum("qnh,knh->nqk", q, np.repeat(k, 3 // kv_heads, axis=1)) * spec.scale
        dots = spec.softcap * np.tanh(dots / spec.softcap) if spec.softcap else dots
        weights = np.exp(np.where(seen, dots, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("nqk,knh->qnh", weights, np.repeat(v, 3 // kv_heads, axis=1))
        pairs = trees.tile_pairs(row.end)
        width = int(np.diff(pairs[0]).max())
        position, end = jax.numpy.asarray(row.position), jax.numpy.asarray(row.end)
        by_pairs = trees.by_pairs(spec, q, k, v, position, end, *map(jax.numpy.asarray, pairs))
        by_lists = trees.by_lists(spec, width, q, k, v, position, end, *map(jax.numpy.asarray, pairs))
        np.testing.assert_allclose(by_lists, expected, atol=1e-5)
        np.testing.assert_allclose(by_pairs, expected, atol=1e-5)


# The real model on real questions; what lm-eval says of them is recorded by record_hellaswag.py.

HELLASWAG = SHARED / "hellaswag_every50.jsonl"
RECORD: list[list[float]] = json.loads((DATA / "smollm2_hellaswag.json").read_text())


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize(("layout", "devices"), [("tensor", 1), ("tensor", 4), ("gathered", 4), ("replicated", 4)])
def test_hellaswag_is_scored_as_lm_eval_scores_it(layout: str, devices: int) -> None:
    if not HELLASWAG.exists():
        pytest.skip(f"HellaSwag's questions are not at {HELLASWAG}")
    try:
        llm = LLM("smollm2-135m", layout=layout, devices=devices, dtype="float32", max_num_seqs=1)
    except CheckpointError as error:
        pytest.skip(f"SmolLM2-135M cannot be fetched: {error}")
    questions = read_questions(HELLASWAG)
    assert len(questions) == len(RECORD) == 201
    few = questions[:6]
    scores = llm.score([(q.query, [" " + choice for choice in q.choices]) for q in few])
    for question, found, expected in zip(few, scores, RECORD, strict=False):
        np.testing.assert_allclose([s.logprob for s in found], expected, atol=2e-3, rtol=0)
        lengths = [len(choice) for choice in question.choices]
        assert np.argmax([s.logprob for s in found]) == np.argmax(expected)
        assert np.argmax(np.divide([s.logprob for s in found], lengths)) == np.argmax(np.divide(expected, lengths))


# Through the library's door


def test_llm_scores_texts_and_ids(tmp_path: Path) -> None:
    sizes = {"vocab_size": 258, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 257}
    llm = LLM(write_tokenizer(write_tiny(tmp_path / "model", **sizes)), devices=1, max_num_seqs=1)
    ids = [list(text.encode()) for text in ("a question", " yes", " no")]
    told: list[tuple[int, int]] = []
    [by_text] = llm.score([("a question ", ["yes", "no"])], progress=lambda *done: told.append(done))
    assert sorted(told) == [(1, 2), (2, 2)]
    [by_id] = llm.score([(ids[0], ids[1:])])  # the space that ended the context belongs to the continuations
    assert [s.token_ids for s in by_text] == ids[1:]
    assert by_text == by_id
    assert llm.score([]) == []
    [[empty]] = llm.score([("", ["yes"])])
    [[begun]] = llm.score([([256], [list(b"yes")])])
    assert empty == begun
    assert str(llm.pair_encoder).startswith("texts start without <s>")
    for context, continuation, said in [
        ([], [1], "request 0, continuation 0: its context is empty"),
        ([1], [], "request 0, continuation 0: its continuation is empty"),
        ([1], [258], "request 0, continuation 0 holds token id 258"),
        ([1] * 60, [1] * 6, "request 0, continuation 0 and its context have 66 tokens, and the model takes 65"),
    ]:
        with pytest.raises(RequestError, match=said):
            llm.score([(context, [continuation])])
    # Cut from the left, a long context is what is left of it.
    [[cut]] = llm.score([([7] * 9 + [1] * 59, [[1] * 6])], truncate=True)
    [[short]] = llm.score([([1] * 59, [[1] * 6])])
    assert cut == short


def test_what_was_queued_has_ended_when_scoring_is_left(small: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[Scored] = []
    program = small._program

    def kept(shape: Shape) -> Callable[..., Scored]:
        def run(*args: Any) -> Scored:
            queued.append(program(shape)(*args))
            return queued[-1]

        return run

    monkeypatch.setattr(small, "_program", kept)
    packing = small.pack([([i], [i + 1] * 200) for i in range(8)])
    run = small.run(packing)
    next(run)
    run.close()
    assert 1 < len(queued) < len(packing.rows) and all(one.is_ready() for one in jax.tree.leaves(queued))


def test_a_packing_is_run_by_one_thread(tmp_path: Path) -> None:
    """Programs of two threads run side by side, and jaxlib 0.10.2's on a CPU then give other numbers."""
    llm = LLM(write_tiny(tmp_path), devices=1)
    threads = []

    def results() -> Generator[int]:
        for i in range(6):
            threads.append(threading.current_thread())
            yield i
        threads.append(threading.current_thread())

    for i in (iterated := llm._loop.iterate(results())):
        time.sleep(0.05)  # in which a thread would end that has nothing to do
        if i == 3:
            llm.generate([5, 6], SamplingParams(max_tokens=2))
    assert len(threads) == 7 and len({*threads}) == 1
    iterated = llm._loop.iterate(results())
    next(iterated)
    iterated.close()
    llm._loop.join()
    assert llm.seconds_without_step == 0 and llm.score([([5], [[6]])])


def test_logits_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    one = scorer(write_tiny(tmp_path / "model"), "tensor", 1)
    leaves = one.params()
    one.params = lambda: [leaf * np.nan for leaf in leaves]
    with pytest.raises(RequestError, match="request 0: the model's logits are not numbers"):
        dict(one.run(one.pack([([1, 2], [3])])))

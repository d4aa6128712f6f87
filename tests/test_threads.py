"""One LLM used by several threads at once; what a forked process and a pickle are told."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from tiny_checkpoint import write_tiny, write_tokenizer

from jaxllm import LLM, RequestError, SamplingParams

LETTERS = {ord(c): 12.0 for c in "abcde "}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"vocab_size": 258, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257}
    return write_tokenizer(write_tiny(tmp_path_factory.mktemp("threads"), **sizes))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    llm = LLM(folder, devices=2, layout="replicated", max_num_seqs=4)
    yield llm
    llm._loop.join()
    assert not llm.engine.scheduler.busy
    llm.engine.scheduler.check_integrity()


def params(i: int) -> SamplingParams:
    return SamplingParams(seed=i, max_tokens=8 + 3 * i, logit_bias=LETTERS, stop="ab" if i % 3 == 0 else ())


def ask(llm: LLM, i: int) -> Any:
    """Request i of many kinds, whose answer depends on nothing else."""
    match i % 4:
        case 0:
            return [o.outputs[0].text for o in llm.generate(["abc", "de", "f" * (i + 1)], params(i))]
        case 1:
            return "".join(llm.stream("abc" * i, params(i)))
        case 2:
            return [s.token_logprobs for [s] in llm.score([(f"a question {i}", [" yes"]), ([256, 97], [[98, 99]])])]
        case _:
            return llm.chat([{"role": "user", "content": "hi" * i}], params(i))[0].outputs[0].token_ids


def test_threads_get_what_each_gets_alone(llm: LLM) -> None:
    alone = [ask(llm, i) for i in range(8)]
    barrier = threading.Barrier(8)

    def all_at_once(i: int) -> Any:
        barrier.wait()
        return ask(llm, i)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(all_at_once, range(8))) == alone


def test_tasks_get_what_each_gets_alone(llm: LLM) -> None:
    alone = [ask(llm, i) for i in range(6)]

    async def together() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(ask, llm, i) for i in range(6)))

    assert asyncio.run(together()) == alone


def test_the_first_use_may_come_from_several_threads(folder: Path) -> None:
    fresh = LLM(folder, devices=1, max_num_seqs=1)
    barrier = threading.Barrier(4)

    def first(_: int) -> tuple[list[str], Any]:
        barrier.wait()
        return [o.outputs[0].text for o in fresh.generate("abc", params(1))], fresh.engine

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(first, range(4)))
    assert len({id(engine) for _, engine in found}) == 1
    assert all(texts == found[0][0] for texts, _ in found)


def test_a_mistake_in_one_thread_is_that_threads_own(llm: LLM) -> None:
    def ask_or_fail(i: int) -> Any:
        if i % 2:
            return ask(llm, i - 1)
        with pytest.raises(RequestError, match="outside the vocabulary"):
            llm.generate([[5, 999]], params(i))
        return None

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask_or_fail, range(8)))
    assert found[1::2] == [ask(llm, i) for i in (0, 2, 4, 6)]


def test_a_stream_may_be_left_in_another_thread_than_it_began_in(llm: LLM) -> None:
    stream = llm.stream("abc", SamplingParams(seed=1, max_tokens=200, logit_bias=LETTERS))
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(stream.close).result()
    llm._loop.join()
    assert not llm.engine.scheduler.running


@pytest.mark.parametrize("use", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_llm_is_not_pickled_or_copied(llm: LLM, use: Any) -> None:
    with pytest.raises(TypeError, match=r"^an LLM holds devices and cannot be pickled or copied: make it in the process that"):
        use(llm)


FORK = """
import json, os, sys
from jaxllm import LLM, RequestError, SamplingParams
llm = LLM(sys.argv[1], devices=1)
greedy = SamplingParams(temperature=0)
before = llm.generate("abc", greedy)[0].outputs[0].text
stream = llm.stream("abc", greedy)
child = os.fork()
if child == 0:
    calls = [lambda: llm.generate("abc", greedy), lambda: list(llm.stream("abc", greedy)), lambda: llm.score([("a", [" b"])]),
             lambda: llm.chat([{"role": "user", "content": "a"}]), lambda: next(stream)]
    for call in calls:
        try:
            call()
        except RequestError as error:
            print(json.dumps(str(error)), flush=True)
    os._exit(0)
os.waitpid(child, 0)
assert llm.generate("abc", greedy)[0].outputs[0].text == before
"""


def test_a_forked_process_is_told_in_a_sentence(folder: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}  # jax warns of the fork
    done = subprocess.run([sys.executable, "-c", FORK, str(folder)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == 5 and len(set(said)) == 1
    assert said[0].startswith("this LLM belongs to process ") and "make the LLM in the process that uses it" in said[0]

"""Clients that leave, texts of many scripts, and whatever the API's own schema lets one ask: nothing is lost, nothing hangs."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.result import Ok
from servers import serving
from tiny_checkpoint import write_tiny, write_tokenizer

from jaxllm import LLM, SamplingParams
from jaxllm.serving.app import make_app
from jaxllm.serving.server import Server, Settings

SIZES = {"vocab_size": 258, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257}
CLIENTS = 16
HANGS = 120  # seconds, after which an answer hangs; it may need programs of its own, and run to the context's end
# Emoji, CJK, marks that combine.
SCRIPTS = "[ab \U0001f600\U0001f1f0\u65e5\u672c\u8a9e\ud55c\uae00\u00e9\u0301\u0915\u094d\u0937]{20,40}"
STOPS = [None, "\u672c", ["\U0001f600a", "\u0301"], ["\u8a9e\ud55c", "b a"]]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(write_tokenizer(write_tiny(tmp_path_factory.mktemp("faults"), **SIZES)), devices=1, max_num_seqs=4)


@pytest.fixture(scope="module")
def server(llm: LLM) -> Server:
    server = Server(Settings(["tiny"]), lambda: llm)
    server.load()
    return server


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with serving(server) as client:
        yield client


def idle(llm: LLM, server: Server) -> None:
    """Nothing is on its way, and every page is back."""
    limit = time.monotonic() + 20
    while server.admitted:
        assert time.monotonic() < limit
        time.sleep(0.01)
    llm._loop.join()
    assert not llm.engine.scheduler.busy and llm.engine.scheduler.pages_held == 0
    llm.engine.scheduler.check_integrity()


@pytest.mark.parametrize("leavers", [60, pytest.param(1000, marks=pytest.mark.full)])
def test_clients_that_leave_take_nothing_with_them(llm: LLM, server: Server, http: httpx.Client, leavers: int) -> None:
    """In the middle of a stream, at its start, or while they wait; and who stays is answered."""
    body = {"prompt": "abc", "max_tokens": 200, "seed": 1, "ignore_eos": True}
    [wanted] = llm.generate("abc", SamplingParams(seed=1, max_tokens=200, ignore_eos=True))

    async def leave(client: httpx.AsyncClient, moment: random.Random) -> None:
        stream = body | {"stream": True, "n": moment.choice([1, 1, 3])}
        try:
            async with (
                asyncio.timeout(moment.choice([0.001, 0.01, 0.1, 5])),
                client.stream("POST", "/v1/completions", json=stream) as answer,
            ):
                lines = answer.aiter_lines()
                for _ in range(moment.randrange(8)):
                    await anext(lines, None)
        except TimeoutError:
            pass

    async def everyone() -> list[httpx.Response]:
        rng, places = random.Random(0), asyncio.Semaphore(CLIENTS)
        async with httpx.AsyncClient(base_url=http.base_url, timeout=120, trust_env=False) as client:

            async def one(moment: random.Random) -> None:
                async with places:
                    await leave(client, moment)

            stay = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(3)]
            await asyncio.gather(*(one(random.Random(rng.random())) for _ in range(leavers)))
            return list(await asyncio.gather(*stay))

    answers = asyncio.run(everyone())
    assert [answer.json()["choices"][0]["text"] for answer in answers] == [wanted.outputs[0].text] * 3
    idle(llm, server)


@pytest.mark.parametrize("cases", [60, pytest.param(1000, marks=pytest.mark.full)])
def test_a_stream_joined_is_what_generate_says(llm: LLM, server: Server, http: httpx.Client, cases: int) -> None:
    """Over characters of several tokens and stop strings among them; the tokens are the same too."""
    form: Any = {"regex": SCRIPTS}

    def asked(case: int) -> dict[str, Any]:
        return {"seed": case, "max_tokens": 90, "stop": STOPS[case % len(STOPS)], "include_stop_str_in_output": case % 3 == 0}

    params = [SamplingParams(**asked(i), structured_outputs=form) for i in range(cases)]
    wanted = [output.outputs[0] for output in llm.generate(["abc"] * cases, params, use_tqdm=False)]

    async def stream(client: httpx.AsyncClient, places: asyncio.Semaphore, case: int) -> tuple[str, list[int], str]:
        text, ids, reason = "", list[int](), ""
        body = {"prompt": "abc", "stream": True, "return_token_ids": True, "structured_outputs": form} | asked(case)
        async with places, client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    [choice] = json.loads(line[6:])["choices"]
                    text, ids, reason = text + choice["text"], ids + choice["token_ids"], choice["finish_reason"] or reason
        return text, ids, reason

    async def everyone() -> list[tuple[str, list[int], str]]:
        places = asyncio.Semaphore(CLIENTS)
        async with httpx.AsyncClient(base_url=http.base_url, timeout=120, trust_env=False) as client:
            return await asyncio.gather(*(stream(client, places, i) for i in range(cases)))

    assert asyncio.run(everyone()) == [(one.text, one.token_ids, one.finish_reason) for one in wanted]
    assert len({one.finish_reason for one in wanted}) == 2 or cases < 20
    idle(llm, server)


@pytest.mark.parametrize("examples", [10, pytest.param(1000, marks=pytest.mark.full)])
def test_whatever_is_asked_is_answered(llm: LLM, server: Server, examples: int) -> None:
    """Of each endpoint so many requests of the API's own schema, and of what is none: no error of the server."""
    app = make_app(server)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        _ask(result.ok(), examples)
    idle(llm, server)


def _ask(operation: Any, examples: int) -> None:
    strategy = operation.as_strategy() | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

    @given(case=strategy)
    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate], derandomize=True
    )
    def ask(case: Any) -> None:
        answer = case.call(timeout=HANGS)
        assert answer.status_code < 500, answer.text
        assert "Traceback" not in answer.text

    ask()

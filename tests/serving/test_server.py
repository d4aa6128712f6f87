"""The OpenAI API of a tiny model: OpenAI's own client and the engine say the same, mistakes are told, nothing is lost."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from servers import serving
from tiny_checkpoint import write_tiny, write_tokenizer

from jaxllm import LLM, SamplingParams
from jaxllm.requests.outputs import RequestError
from jaxllm.serving.server import Server, Settings

SIZES = {"vocab_size": 258, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257}
LETTERS = {ord(c): 12.0 for c in "abcde "}
BIASES: Any = {str(token): bias for token, bias in LETTERS.items()}
MESSAGES = [{"role": "user", "content": "hi"}]
DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(write_tokenizer(write_tiny(tmp_path_factory.mktemp("served"), **SIZES)), devices=2, max_num_seqs=4)


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    server = Server(Settings(["tiny", "other"], max_waiting=8), lambda: llm)
    server.load()
    yield server
    llm._loop.join()
    assert server.admitted == 0 and not llm.engine.scheduler.busy
    llm.engine.scheduler.check_integrity()


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with serving(server) as client:
        yield client


def test_a_completion_is_what_the_engine_says(llm: LLM, client: openai.OpenAI) -> None:
    [wanted] = llm.generate("abc", SamplingParams(seed=3, n=2, max_tokens=9, logprobs=2, logit_bias=LETTERS))
    asked: dict[str, Any] = {"model": "tiny", "prompt": "abc", "seed": 3, "n": 2, "max_tokens": 9, "logprobs": 2}
    found = client.completions.create(**asked, logit_bias=BIASES)
    assert [choice.text for choice in found.choices] == [output.text for output in wanted.outputs]
    assert [choice.index for choice in found.choices] == [0, 1] and found.model == "tiny"
    assert found.usage and (found.usage.prompt_tokens, found.usage.completion_tokens) == (3, 18)
    for choice, output in zip(found.choices, wanted.outputs, strict=True):
        assert choice.finish_reason == output.finish_reason == "length"
        assert choice.logprobs is not None and output.logprobs is not None
        chosen = [choices[token].logprob for token, choices in zip(output.token_ids, output.logprobs, strict=True)]
        assert choice.logprobs.token_logprobs == pytest.approx(chosen)
        assert "".join(choice.logprobs.tokens or []) == output.text
        likeliest = [{c.decoded_token: c.logprob for c in choices.values() if c.rank <= 2} for choices in output.logprobs]
        assert [pytest.approx(one) for one in likeliest] == choice.logprobs.top_logprobs
        assert choice.logprobs.text_offset == list(range(9))


@pytest.mark.parametrize("stop", [None, "ab", ["d", "ce"]])
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_joined_is_the_whole(client: openai.OpenAI, n: int, stop: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": ["abc", [97, 98]], "seed": 1, "n": n, "max_tokens": 40, "stop": stop}
    asked |= {"logit_bias": BIASES, "logprobs": 1}
    whole = client.completions.create(**asked)
    texts, tokens, ends, usage = [""] * 2 * n, [0] * 2 * n, [None] * 2 * n, None
    options: dict[str, Any] = {"include_usage": True, "continuous_usage_stats": n == 3}
    for chunk in client.completions.create(**asked, stream=True, stream_options=options):  # type: ignore[call-overload]
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += len(choice.logprobs.tokens or []) if choice.logprobs else 0
            ends[choice.index] = choice.finish_reason
        assert usage.completion_tokens == sum(tokens) if n == 3 else usage is None or not chunk.choices
    assert texts == [choice.text for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert tokens == [len(choice.logprobs.tokens or []) for choice in whole.choices if choice.logprobs]
    assert usage and whole.usage and usage.completion_tokens == whole.usage.completion_tokens == sum(tokens)


def test_a_chat_is_what_the_engine_says(llm: LLM, client: openai.OpenAI) -> None:
    [wanted] = llm.chat(MESSAGES, SamplingParams(seed=5, max_tokens=12, logit_bias=LETTERS))
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "seed": 5, "max_completion_tokens": 12}
    asked["logit_bias"] = BIASES
    found = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    [choice] = found.choices
    assert choice.message.content == wanted.outputs[0].text and choice.message.role == "assistant"
    assert choice.logprobs and choice.logprobs.content
    assert "".join(one.token for one in choice.logprobs.content) == wanted.outputs[0].text
    assert all(len(one.top_logprobs) == 3 and one.bytes == list(one.token.encode()) for one in choice.logprobs.content)
    pieces = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    assert pieces[0].role == "assistant" and pieces[0].content == ""
    assert "".join(piece.content or "" for piece in pieces) == wanted.outputs[0].text


def test_an_echo_has_the_prompts_log_probabilities(llm: LLM, client: openai.OpenAI) -> None:
    """As lm-eval's local-completions asks for them."""
    prompts = [[97, 98, 99, 100, 101], [97, 98, 99, 101], [101], [1, *[97, 98] * 60]]
    steps = llm.statistics.steps
    asked: dict[str, Any] = {"model": "tiny", "prompt": prompts, "echo": True, "logprobs": 1, "seed": 1, "temperature": 0}
    found = client.completions.create(**asked, max_tokens=1)
    assert llm.statistics.steps == steps, "the scorer does it"
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1, logprobs=1, prompt_logprobs=1))
    for choice, output in zip(found.choices, outputs, strict=True):
        generated = output.outputs[0]
        assert output.prompt_logprobs and generated.logprobs
        ids, of_tokens = [*output.prompt_token_ids, *generated.token_ids], [*output.prompt_logprobs, *generated.logprobs]
        logprobs = choice.logprobs
        assert logprobs and logprobs.token_logprobs and logprobs.top_logprobs and logprobs.top_logprobs[0] is None
        assert logprobs.token_logprobs[0] is None
        for token, one, number, top in zip(
            ids[1:], of_tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True
        ):
            assert one and number == pytest.approx(one[token].logprob, abs=1e-5)
            assert top == {c.decoded_token: pytest.approx(c.logprob, abs=1e-5) for c in one.values() if c.rank == 1}
        prompt = llm.tokenizer.decode(output.prompt_token_ids)
        assert (choice.text, choice.finish_reason) == (prompt + generated.text, generated.finish_reason)
    alone = client.completions.create(**asked, max_tokens=0)
    assert alone.usage and alone.usage.completion_tokens == 0
    for choice, one in zip(found.choices, alone.choices, strict=True):
        assert choice.logprobs and one.logprobs and one.logprobs.tokens
        assert one.logprobs.token_logprobs == (choice.logprobs.token_logprobs or [])[: len(one.logprobs.tokens)]
        assert one.text == "".join(one.logprobs.tokens) and one.finish_reason == "length"


def test_prompts_that_come_together_are_scored_together(llm: LLM, http: httpx.Client) -> None:
    asked = {"echo": True, "logprobs": 1, "temperature": 0, "max_tokens": 1}
    prompts = [[*range(97, 97 + length)] for length in range(2, 14)]
    runs: list[int] = []
    pack = llm.pack

    def slowly(some: Any) -> Any:
        runs.append(len(some))
        time.sleep(0.2)
        return pack(some)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(prompts)) as pool:
        patch.setattr(llm, "pack", slowly)
        found = list(pool.map(lambda ids: http.post("/v1/completions", json=asked | {"prompt": ids}, timeout=60).json(), prompts))
    assert sum(runs) == len(prompts) and len(runs) < len(prompts) / 2
    longest = found[-1]["choices"][0]["logprobs"]["token_logprobs"]
    for one, ids in zip(found, prompts, strict=True):
        assert one["choices"][0]["logprobs"]["token_logprobs"][1 : len(ids)] == pytest.approx(longest[1 : len(ids)], abs=1e-5)


def test_a_score_that_fails_ends_its_own_request(llm: LLM, http: httpx.Client) -> None:
    run = llm.run_packing

    def fail_with_101(packing: Any) -> Any:
        time.sleep(0.1)
        for i, score in run(packing):
            if any(101 in ids for ids in packing.pairs[i]):
                raise RequestError("no numbers")
            yield i, score

    asked = {"echo": True, "logprobs": 1, "temperature": 0, "max_tokens": 1}
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(8) as pool:
        patch.setattr(llm, "run_packing", fail_with_101)
        prompts = [[97, 98 + i] for i in range(8)]
        found = list(pool.map(lambda ids: http.post("/v1/completions", json=asked | {"prompt": ids}).status_code, prompts))
    assert found == [200, 200, 200, 400, 200, 200, 200, 200]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_log_probabilities_of_a_prompt_come_with_their_ranks(http: httpx.Client, path: str) -> None:
    asked: dict[str, Any] = {"prompt": "abc", "messages": MESSAGES, "prompt_logprobs": 1, "max_tokens": 1, "temperature": 0}
    asked.pop("messages" if path == "/v1/completions" else "prompt")
    found = http.post(path, json=asked).json()
    first, *rest = (found["choices"][0] if path == "/v1/completions" else found)["prompt_logprobs"]
    assert first is None and rest
    for one in rest:
        assert 1 <= len(one) <= 2 and {choice["rank"] for choice in one.values()} >= {1}
        assert all(choice["logprob"] <= 0 and isinstance(choice["decoded_token"], str) for choice in one.values())
    refused = http.post(path, json=asked | {"stream": True})
    assert refused.status_code == 400 and "prompt_logprobs" in refused.json()["error"]["message"]


def test_an_answer_without_a_limit_ends_with_the_context(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="tiny", messages=MESSAGES, logit_bias=BIASES, seed=1)  # type: ignore[arg-type]
    assert found.usage and found.usage.total_tokens == 256 and found.choices[0].finish_reason == "length"


def test_tokens_and_back(http: httpx.Client) -> None:
    found = http.post("/tokenize", json={"prompt": "abc", "return_token_strs": True}).json()
    assert found == {"count": 3, "max_model_len": 256, "tokens": [97, 98, 99], "token_strs": ["a", "b", "c"]}
    assert http.post("/detokenize", json={"tokens": [97, 98, 99]}).json() == {"prompt": "abc"}
    assert http.post("/tokenize", json={"messages": MESSAGES}).json()["count"] == len("user: hi\nassistant:")
    info = http.get("/tokenizer_info").json()
    assert info["vocab_size"] == 258 and "assistant:" in info["chat_template"]


def test_scores_are_those_of_the_library(llm: LLM, http: httpx.Client) -> None:
    requests = [{"context": "abc", "continuations": [" d", "ef"]}, {"context": [97], "continuations": [[98, 99]]}]
    found = http.post("/score", json={"requests": requests}).json()["scores"]
    wanted = llm.score([("abc", [" d", "ef"]), ([97], [[98, 99]])])
    assert [[one["token_logprobs"] for one in scores] for scores in found] == [[s.token_logprobs for s in row] for row in wanted]


def test_about_the_server(http: httpx.Client, client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").id == "other"
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/version").json()["version"]
    said = http.get("/metrics").text
    assert (
        "jaxllm:num_requests_running 0.0" in said
        and "jaxllm:prefix_cache_queries_total " in said
        and 'jaxllm:request_success_total{finished_reason="length"}' in said
    )
    counted = {
        name: re.search(rf"jaxllm:{name}_count (\d+)", said)
        for name in ("request_queue_time_seconds", "request_decode_time_seconds")
    }
    assert all(found and float(found[1]) > 0 for found in counted.values())


def test_the_dashboard_shows_what_there_is(http: httpx.Client) -> None:
    said = http.get("/metrics").text
    names = set(re.findall(r"jaxllm:\w+", DASHBOARD.read_text()))
    assert len(names) > 15 and all(f"\n{name}" in said for name in names), [name for name in names if f"\n{name}" not in said]


def test_the_page_loads_nothing_from_elsewhere(http: httpx.Client) -> None:
    answer = http.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"(?:src|href)=|https?:|innerHTML|\bimport\b", answer.text)


def test_a_profile_is_written_where_that_is_allowed(llm: LLM, http: httpx.Client, tmp_path: Path) -> None:
    assert http.post("/start_profile").status_code == 404
    server = Server(Settings(["tiny"], profile_dir=str(tmp_path)), lambda: llm)
    server.load()
    with serving(server) as allowed:
        assert allowed.post("/stop_profile").status_code == 409
        assert allowed.post("/start_profile").status_code == 200
        assert allowed.post("/start_profile").status_code == 409
        allowed.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3})
        assert allowed.post("/stop_profile").json()["folder"] == str(tmp_path)
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.parametrize("endpoint", ["completions", "chat/completions"])
def test_a_salt_keeps_prompts_apart(http: httpx.Client, endpoint: str) -> None:
    text = f"{endpoint:-<150}"
    body: dict[str, Any] = {"prompt": text} if endpoint == "completions" else {"messages": [{"role": "user", "content": text}]}
    body |= {"max_tokens": 1, "priority": -1}
    cached = []
    for salt in ({"cache_salt": "a"}, {"cache_salt": "a"}, {}):
        usage = http.post(f"/v1/{endpoint}", json=body | salt).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 128, 0]


REFUSALS: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    ("completions", {"prompt": "a", "model": "nope"}, 404, "model", "there is no model 'nope': this server has tiny, other"),
    ("completions", {"prompt": "a", "temperature": -1.0}, 400, "temperature", "temperature=-1.0: a finite number from 0 up"),
    ("completions", {"prompt": "a" * 256}, 400, None, "the prompt has 256 tokens"),
    ("completions", {"prompt": "a", "max_tokens": 256}, 400, "max_tokens", "ask for 255 at most"),
    ("completions", {"prompt": "a" * 300}, 400, None, "the prompt has 300 tokens and the context holds 256"),
    ("completions", {"prompt": "a", "max_tokens": "5"}, 422, "max_tokens", "it should be a valid integer"),
    ("completions", {"prompt": [[97, 999]]}, 400, "prompt", "outside the vocabulary"),
    ("completions", {"prompt": {}}, 422, "prompt", "it should be a valid string, or should be a valid list"),
    ("completions", {}, 422, "prompt", "prompt: it Field required"),
    ("completions", {"prompt": "a", "suffix": "b"}, 400, "suffix", "the model continues a text and fills no gap"),
    ("completions", {"prompt": "a", "tools": [{}]}, 400, "tools", "tools are for /v1/chat/completions"),
    ("completions", {"prompt": "a", "stream_options": {}}, 400, "stream_options", "set stream"),
    ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "'x' is no token id"),
    ("chat/completions", {"messages": []}, 422, "messages", "at least 1 item"),
    ("chat/completions", {"messages": MESSAGES, "top_logprobs": 1}, 400, "top_logprobs", "set logprobs"),
    ("chat/completions", {"messages": MESSAGES, "chat_template": "x"}, 400, "chat_template", "may not bring one"),
    ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, 400, "messages", "content"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "said"), REFUSALS)
def test_a_mistake_is_told(
    http: httpx.Client, path: str, body: dict[str, Any], status: int, param: str | None, said: str
) -> None:
    answer = http.post(f"/v1/{path}", json=body)
    error = answer.json()["error"]
    assert answer.status_code == status and said in error["message"] and "\n" not in error["message"]
    assert error["param"] == param and error["type"].endswith("_error")


def test_a_body_that_is_no_json_is_told(http: httpx.Client) -> None:
    for body in ("{", "[]", "5", ""):
        answer = http.post("/v1/completions", content=body)
        assert answer.status_code in (400, 422) and answer.json()["error"]["message"]
    assert http.get("/nothing").json()["error"]["type"] == "not_found_error"
    assert http.get("/v1/completions").status_code == 405


def test_fields_that_are_not_understood_are_named(http: httpx.Client) -> None:
    body = {"prompt": "a", "max_tokens": 1, "user": "me", "frobnicate": 1, "tools": []}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == "frobnicate"


def until(condition: Any) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_leaves_nothing(llm: LLM, server: Server, http: httpx.Client, stream: bool) -> None:
    body = {"prompt": "abc", "max_tokens": 250, "n": 3, "stream": stream, "logit_bias": BIASES, "seed": 1}
    if stream:
        with http.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=body, timeout=0.05)
    until(lambda: server.admitted == 0)
    llm._loop.join()
    llm.engine.scheduler.check_integrity()


def test_too_many_are_turned_away(server: Server, http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a", "n": 13})
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_an_error_within_one_request_leaves_the_others(llm: LLM, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = llm.tokenizer.decode
    poison = ord("z")

    def failing(ids: Any, **options: Any) -> str:
        if poison in ids:
            raise RuntimeError("poisoned")
        return str(decode(ids, **options))

    monkeypatch.setattr(llm.tokenizer, "decode", failing)
    found: dict[str, httpx.Response] = {}

    def ask(prompt: str) -> None:
        body = {"prompt": prompt, "max_tokens": 20, "logit_bias": BIASES, "seed": 1}
        found[prompt] = http.post("/v1/completions", json=body)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in ("abc", "az", "de")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[prompt].status_code for prompt in ("abc", "az", "de")] == [200, 500, 200]
    assert found["az"].json()["error"]["type"] == "server_error" and "poisoned" not in found["az"].text
    with http.stream("POST", "/v1/completions", json={"prompt": "az", "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert "poisoned" not in lines[0] and lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))["error"]["type"] == "server_error"


def test_an_answer_may_have_a_form(http: httpx.Client) -> None:
    """Streamed too; a schema that cannot be followed is refused before anything runs."""
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": MESSAGES, "max_tokens": 100, "seed": 1, "response_format": form}
    text = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert json.loads(text)["a"] in (1, 2)
    with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in events) == text
    form["json_schema"]["schema"] = {"type": "objekt"}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "structured_outputs"


def test_a_key_is_asked_for(llm: LLM) -> None:
    server = Server(Settings(["tiny"], api_keys=["one", "two"], max_body_bytes=200), lambda: llm)
    server.load()
    with serving(server) as http:
        for wrong in ("", "Bearer wrong", "one", "Bearer \u00fc"):
            answer = http.get("/v1/models", headers={b"Authorization": wrong.encode()})
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/v1/models", headers={"Authorization": "Bearer two"}).status_code == 200
        assert http.get("/health").status_code == http.get("/metrics").status_code == 200
        key = {"Authorization": "Bearer one"}
        large = json.dumps({"prompt": "a" * 300}).encode()
        assert http.post("/v1/completions", content=large, headers=key).status_code == 413
        assert http.post("/v1/completions", content=iter([large]), headers=key).status_code == 413  # without a length


def test_it_listens_before_it_is_loaded(llm: LLM) -> None:
    go = threading.Event()

    def make() -> LLM:
        go.wait()
        return llm

    server, done = Server(Settings(["tiny"]), make), threading.Event()
    with serving(server) as http:
        server.load_beside(done.set)
        assert http.get("/health").json() == {"status": "loading"}
        answer = http.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert http.get("/metrics").status_code == 200
        go.set()
        done.wait()
        assert http.get("/health").status_code == 200


def test_a_model_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    server = Server(Settings(["tiny"]), lambda: LLM(tmp_path))
    server.load()
    with serving(server) as http:
        assert http.get("/health").status_code == 503 and "config.json" in http.get("/health").json()["message"]

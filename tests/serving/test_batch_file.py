"""`jaxllm run-batch`: each answer is the library's, whole lines, and what was interrupted goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import write_tiny, write_tokenizer

from jaxllm import LLM, RequestError, SamplingParams
from jaxllm.commands.cli import main
from jaxllm.serving.batch_file import Answers, read_batch

SIZES = {"vocab_size": 258, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257}
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def request(i: int, url: str = COMPLETION, **body: Any) -> dict[str, Any]:
    body = {"model": "any", "prompt": "abc" * (i + 1), "max_tokens": 6, "seed": i} | body
    if url == CHAT:
        del body["prompt"]
    return {"custom_id": f"r{i}", "method": "POST", "url": url, "body": body}


def write(path: Path, requests: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in requests))
    return path


def read(path: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({one["custom_id"] for one in found}) == len(found)
    return {one["custom_id"]: one["response"] for one in found}


def test_a_file_is_answered_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tokenizer(write_tiny(tmp_path / "model", **SIZES))
    requests = [request(i) for i in range(5)]
    requests += [request(5, CHAT, messages=[{"role": "user", "content": "hi"}]), request(6, temperature=-1)]
    given, out = write(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    command = ["run-batch", str(folder), "-i", str(given), "-o", str(out), "--max-num-seqs", "2", "--devices", "1"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"7 requests, 0 of them answered before, 1 refused: {out}\n"
    first = read(out)
    llm = LLM(folder, devices=1, max_num_seqs=2)
    for i in range(5):
        [wanted] = llm.generate("abc" * (i + 1), SamplingParams(max_tokens=6, seed=i))
        assert first[f"r{i}"]["body"]["choices"][0]["text"] == wanted.outputs[0].text
    assert first["r5"]["body"]["object"] == "chat.completion"
    assert first["r6"]["status_code"] == 400 and "temperature" in first["r6"]["body"]["error"]["message"]
    # Killed while it wrote, with an answer that was none.
    *whole, last = out.read_text().splitlines(keepends=True)
    broken = json.loads(whole[0])
    broken["response"]["status_code"] = 500
    out.write_text(json.dumps(broken) + "\n" + "".join(whole[1:]) + last[:-9])
    assert main(command) == 0
    assert capsys.readouterr().out == f"7 requests, 5 of them answered before, 1 refused: {out}\n".replace(
        "1 refused", f"{int(json.loads(last)['response']['status_code'] >= 400)} refused"
    )
    again = read(out)
    assert again.keys() == first.keys()
    for name, one in again.items():
        same = ("choices", "error")
        assert {k: v for k, v in one["body"].items() if k in same} == {k: v for k, v in first[name]["body"].items() if k in same}
    assert main(command) == 0
    assert "7 of them answered before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no requests"),
        ("{", "line 1 is not JSON"),
        ("5", "line 1: give {"),
        (json.dumps(request(0)) + "\n" + json.dumps(request(0)), "line 2: custom_id 'r0' is that of another line too"),
        (json.dumps(request(0) | {"url": "/v1/files"}), "there are POST requests to /v1/chat/completions"),
        (json.dumps(request(0) | {"x": 1}), "has the key 'x'"),
        (json.dumps(request(0, stream=True)), "no stream is asked for"),
        (json.dumps(request(0) | {"custom_id": 5}), "custom_id of .* is of type int"),
    ],
)
def test_what_is_no_batch_is_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        read_batch(path)


@pytest.mark.parametrize(
    ("text", "message"), [("5\n", "line 1 is no answer"), ('{"id": "x", "response": {"status_code": 200}}\n', "another request")]
)
def test_another_file_is_left_as_it_is(tmp_path: Path, text: str, message: str) -> None:
    lines = read_batch(write(tmp_path / "in.jsonl", [request(0)]))
    out = tmp_path / "out.jsonl"
    out.write_text(text)
    with pytest.raises(RequestError, match=message):
        Answers(out, lines)
    assert out.read_text() == text

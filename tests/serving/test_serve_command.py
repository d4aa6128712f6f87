"""`jaxllm serve` as a process: where it listens, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from processes import environment_in
from tiny_checkpoint import write_tiny, write_tokenizer

from jaxllm.commands.cli import main
from jaxllm.serving.run import listen

SIZES = {"vocab_size": 258, "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257}
BODY = {"prompt": "abc", "max_tokens": 400, "stream": True, "ignore_eos": True}


@contextmanager
def serve(folder: Path, xdg: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server that is ready, and what asks it."""
    command = [sys.executable, "-m", "jaxllm", "serve", str(folder), "--uds", str(xdg / "socket"), *options]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment_in(xdg), stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.readline() == f"listening on unix:{xdg / 'socket'}, loading {folder}\n"
        assert process.stdout.readline() == f"ready: {folder}\n", process.stderr.read()
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(xdg / "socket")), base_url="http://it", timeout=60) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_it_drains_when_it_is_told_to_end(tmp_path: Path) -> None:
    """What was admitted is answered, another signal ends it at once, and after SIGKILL another server takes its place."""
    folder = write_tokenizer(write_tiny(tmp_path / "model", **SIZES))
    for signals, whole in ((1, True), (2, False)):
        with serve(folder, tmp_path, "--max-num-seqs", "4") as (process, client), ExitStack() as stack:
            asked = [BODY | {"seed": i, "max_tokens": 300 + 10 * i} for i in range(12)]  # more than run at once
            answers = [stack.enter_context(client.stream("POST", "/v1/completions", json=body)) for body in asked]
            streams = [answer.iter_lines() for answer in answers]
            next(streams[0])
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.1)  # two that come together are one
            for lines in streams if whole else ():
                *_, last, done = [line for line in lines if line]
                assert done == "data: [DONE]"
                assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
            assert process.wait(20) == (0 if whole else 1)
            assert process.stderr is not None
            assert process.stderr.read() == ("" if whole else "ended before all was answered\n")


def test_a_port_in_use_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(tmp_path), "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"jaxllm: cannot listen on 127.0.0.1:{port} (")
    assert said.endswith("is another server there? Choose another\n")


def test_what_a_killed_server_left_is_removed_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(path)
    with listen("", 0, path), pytest.raises(OSError, match="is another server there"), listen("", 0, path):
        pass
    assert not Path(path).exists()


def test_a_model_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path), "--port", "0"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("listening on http://127.0.0.1:") and err.startswith(f"jaxllm: {tmp_path} ")

"""Several processes give what one gives with as many devices, each reads its own bytes, and none outlives another."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import member
import numpy as np
import pytest
from paths import ROOT
from processes import environment_in
from tiny_checkpoint import write_tiny, write_tiny_with_tokenizer

from jaxllm import LLM

DEVICES = 2  # of each process
BOUND = 30.0  # seconds in which all have ended
Processes = list[subprocess.Popen[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def started(tmp_path: Path, commands: list[list[str]]) -> Iterator[Processes]:
    """A process for each command line of Python; none of them is left."""
    env = environment_in(tmp_path / "xdg") | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}", "PYTHONUNBUFFERED": "1"}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    pipe = subprocess.PIPE
    found = [subprocess.Popen([sys.executable, *command], env=env, stdout=pipe, stderr=pipe, text=True) for command in commands]
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.communicate()


def members(folder: Path, layout: str, count: int, *rest: str) -> list[list[str]]:
    where = f"127.0.0.1:{free_port()}"
    said = [str(folder), layout, where, str(count)]
    return [["-m", "member", *said, str(i), str(DEVICES), "{}", *rest] for i in range(count)]


@pytest.mark.parametrize(
    ("layout", "count"),
    [("gathered-2x2", 2), *(pytest.param(*case, marks=pytest.mark.full) for case in
     (("tensor", 2), ("gathered", 2), ("tensor", 4), ("gathered", 4), ("gathered-2x4", 4)))],
)  # fmt: skip
def test_processes_give_what_one_does(folder: Path, tmp_path: Path, layout: str, count: int) -> None:
    with started(tmp_path, members(folder, layout, count, str(tmp_path / "saved"))) as processes:
        said = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, [errors[-2000:] for _, errors in said]
    found = [json.loads(out.splitlines()[-1]) for out, _ in said]
    one = LLM(folder, layout=layout, devices=DEVICES * count, max_model_len=256, max_num_seqs=4)
    expected = member.results(one)
    assert found[0]["tokens"] == expected["tokens"]
    for name in ("logprobs", "scores", "vectors"):
        if one.plan.layout.model <= 2:
            assert found[0][name] == expected[name], name
        else:  # processes add up more than two devices' shares in another order
            pairs = zip(found[0][name], expected[name], strict=True)
            assert all(np.allclose(*pair, rtol=0, atol=1e-5) for pair in pairs), name
    read, alone = [one["bytes_read"] for one in found], one.checkpoint.source.bytes_read
    assert 0 < max(read) < alone and alone <= sum(read) <= 1.1 * alone  # norms are read by each
    again = LLM(tmp_path / "saved", devices=1, max_model_len=256)
    np.testing.assert_allclose(again.embed(member.PROMPTS), one.embed(member.PROMPTS), atol=1e-5)


def test_who_ends_is_named_by_the_others(folder: Path, tmp_path: Path) -> None:
    ends(folder, tmp_path, victim=1, after=None)


@pytest.mark.full
@pytest.mark.parametrize("case", range(20))
def test_whoever_ends_whenever(folder: Path, tmp_path: Path, case: int) -> None:
    rng = random.Random(case)
    ends(folder, tmp_path, victim=rng.randrange(3), after=rng.uniform(0, 20), number=rng.choice([signal.SIGKILL, signal.SIGSTOP]))


def ends(folder: Path, tmp_path: Path, victim: int, after: float | None, number: int = signal.SIGKILL) -> None:
    """Of processes one ends, or is stuck, so many seconds after they have met, or when they are under load."""
    count = 2 if after is None else 3
    with started(tmp_path, members(folder, "tensor", count, str(tmp_path / "saved"), "stay")) as processes:
        if after is None:
            wait_for_line(processes[0], "ready")
        else:
            for process in processes:
                wait_for_line(process, "joined")
            time.sleep(after)
        processes[victim].send_signal(number)
        others = [process for i, process in enumerate(processes) if i != victim]
        said = [process.communicate(timeout=BOUND)[1] for process in others]
    assert [process.returncode for process in others] == [1] * (count - 1)
    assert all(f"process {victim} " in errors for errors in said)


def wait_for_line(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None and any(found.startswith(line) for found in process.stdout)


def test_a_server_of_two_processes_drains(tmp_path: Path) -> None:
    folder, port = write_tiny_with_tokenizer(tmp_path / "tiny"), free_port()
    options = ["--layout", "tensor", "--virtual-devices", str(DEVICES), "--max-model-len", "256", "--max-num-seqs", "4"]
    command = ["-m", "jaxllm", "serve", str(folder), *options, "--port", str(port), "--processes", "2"]
    command += ["--coordinator", f"127.0.0.1:{free_port()}", "--process-id"]
    body = {"prompt": "abc", "max_tokens": 100, "stream": True, "ignore_eos": True}
    with started(tmp_path, [[*command, "0"], [*command, "1"]]) as processes:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client:
            wait_for(client)
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                processes[0].terminate()
                assert [*lines][-2] == "data: [DONE]"
        assert [process.wait(BOUND) for process in processes] == [0, 0]


def wait_for(client: httpx.Client) -> None:
    """Until it answers."""
    deadline = time.monotonic() + 120
    while True:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_processes_that_are_set_up_otherwise_all_say_so(folder: Path, tmp_path: Path) -> None:
    where = f"127.0.0.1:{free_port()}"
    commands = [
        ["-m", "member", str(folder), layout, where, "2", str(i), "1", "{}"] for i, layout in enumerate(("tensor", "gathered"))
    ]
    with started(tmp_path, commands) as processes:
        errors = [process.communicate(timeout=BOUND + 30)[1] for process in processes]
    for text in errors:
        assert "process 1 has another layout than process 0 (gathered over 2 devices, not tensor over 2 devices)" in text

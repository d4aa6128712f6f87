"""Law 6: a warm start compiles nothing, and says so."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from jax._src.compilation_cache import compress_executable
from processes import environment_in
from tiny_checkpoint import write_tiny, write_tokenizer

from jaxllm.execution.compile_cache import WholeEntries

PROGRAM = """
import json, sys
from jaxllm import LLM, SamplingParams, virtual_cpu_devices
from jaxllm.execution.compile_counter import COUNTER

virtual_cpu_devices(2)
llm = LLM(sys.argv[1], max_num_seqs=4)
params = [SamplingParams(temperature=0, max_tokens=8), SamplingParams(seed=1, top_p=0.9, max_tokens=8, logprobs=1)]
outputs = llm.generate([[3, 4, 5], [6] * 260], params)
tokens = [o.outputs[0].token_ids for o in outputs]
print(json.dumps({"misses": COUNTER.misses, "hits": COUNTER.hits, "seconds": COUNTER.seconds, "tokens": tokens}))
"""


def run_python(xdg: Path, *command: str, **environment: str) -> str:
    """Standard output of a Python process with a cache folder of its own."""
    env = environment_in(xdg) | environment
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, cwd=xdg)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def start(folder: Path, xdg: Path, **environment: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run_python(xdg, "-c", PROGRAM, str(folder), **environment).splitlines()[-1])
    return result


WARM = """
import json, sys
from jaxllm import LLM, SamplingParams, virtual_cpu_devices
from jaxllm.execution.compile_counter import COUNTER

virtual_cpu_devices(2)
llm = LLM(sys.argv[1], layout="tensor", max_num_seqs=2, max_model_len=256)
greedy, random = SamplingParams(temperature=0, max_tokens=100), SamplingParams(seed=1, top_p=0.9, max_tokens=5)
llm.generate([[3] * 100], greedy)
llm.generate([[3, 4, 5], [6] * 140], [greedy, random])
print(json.dumps({"misses": COUNTER.misses, "hits": COUNTER.hits}))
"""


@pytest.mark.slow
def test_after_a_warmup_nothing_is_compiled(tmp_path: Path) -> None:
    """Growing caches, prompts and answers of all lengths, greedy and sampling."""
    folder = write_tiny(tmp_path / "model", max_position_embeddings=512, num_hidden_layers=1)
    command = ["-m", "jaxllm", "warmup", str(folder), "--virtual-devices", "2", "--layout", "tensor"]
    command += ["--max-num-seqs", "2", "--max-model-len", "256"]
    assert "up to 2 sequences of 256 tokens" in run_python(tmp_path, *command)
    warm = json.loads(run_python(tmp_path, "-c", WARM, str(folder)).splitlines()[-1])
    assert warm["misses"] == 0 and warm["hits"] > 5
    assert ": 0 compiled in " in run_python(tmp_path, *command)


@pytest.mark.slow
def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", max_position_embeddings=512)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: start(folder, tmp_path), range(2))
    assert first["tokens"] == second["tokens"]
    assert start(folder, tmp_path)["misses"] == 0


def test_a_cold_start_in_a_terminal_shows_what_it_does(tmp_path: Path) -> None:
    """A bar of what is loaded, and each program that is compiled."""
    folder = write_tokenizer(write_tiny(tmp_path / "model", vocab_size=300))
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (24, 80))
    command = [sys.executable, "-m", "jaxllm", "generate", str(folder), "hello", "--max-tokens", "2"]
    with subprocess.Popen(command, env=environment_in(tmp_path), stdout=subprocess.PIPE, stderr=there, cwd=tmp_path) as process:
        os.close(there)
        shown = b""
        with contextlib.suppress(OSError):  # Linux's way to say that the other side is closed
            while chunk := os.read(here, 1 << 16):
                shown += chunk
        os.close(here)
    assert process.returncode == 0
    assert b"loading:" in shown
    assert b"prefill of 32 tokens" in shown and b"decode of 1 rows" in shown


def cache_command(xdg: Path, *options: str) -> str:
    return run_python(xdg, "-m", "jaxllm", "cache", *options)


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", max_position_embeddings=512)
    cold = start(folder, tmp_path)
    assert cold["misses"] > 4 and cold["seconds"] > 0
    assert len(list((tmp_path / "jaxllm" / "compiled").glob("*-cache"))) == cold["misses"]
    warm = start(folder, tmp_path)
    assert warm["misses"] == 0
    assert warm["hits"] >= cold["misses"]
    assert warm["tokens"] == cold["tokens"]
    for entry in (tmp_path / "jaxllm" / "compiled").glob("*-cache"):  # as a process that was killed may leave them
        entry.write_bytes(entry.read_bytes()[:-9])
    assert start(folder, tmp_path)["misses"] == cold["misses"]
    assert start(folder, tmp_path)["misses"] == 0
    folder_of_programs = tmp_path / "jaxllm" / "compiled"
    (folder_of_programs / "notes.txt").write_text("mine")
    listed, cleared, empty = (cache_command(tmp_path, *options) for options in ([], ["--clear"], []))
    first = f"{folder_of_programs}: {cold['misses']} programs, "
    assert listed.startswith(first) and cleared.startswith(first) and ", removed" in cleared
    assert "jit__decode " in listed and "jit__prefill " in listed
    assert empty == f"{folder_of_programs}: 0 programs, 0.0 MB\n"
    assert os.listdir(folder_of_programs) == ["notes.txt"]
    # A folder that the user has chosen is kept to.
    elsewhere = start(folder, tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert elsewhere["misses"] == cold["misses"] == len(list((tmp_path / "own").glob("*-cache")))


def test_an_entry_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = WholeEntries(str(tmp_path), max_size=-1)
    write = type(cache.path).write_bytes

    def interrupted(path: Path, data: bytes) -> int:
        write(path, data[:5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(cache.path), "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.put("k", compress_executable(b"program"))
    assert not list(tmp_path.iterdir())
    cache.put("k", compress_executable(b"program"))
    assert cache.get("k") == compress_executable(b"program")


@pytest.mark.parametrize("rest", [slice(0, 0), slice(0, 12), slice(3, None)])
def test_a_broken_entry_is_said_once_and_made_anew(tmp_path: Path, rest: slice, caplog: pytest.LogCaptureFixture) -> None:
    cache = WholeEntries(str(tmp_path), max_size=-1)
    whole = compress_executable(b"program")
    (tmp_path / "k-cache").write_bytes(whole[rest])
    assert cache.get("k") is None
    assert [record.message for record in caplog.records] == [f"{tmp_path}/k-cache was broken and is made anew"]
    cache.put("k", whole)
    assert cache.get("k") == whole


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = WholeEntries(str(tmp_path / "gone"), max_size=-1)
    (tmp_path / "gone").rmdir()
    for key in ("a", "b"):
        cache.put(key, compress_executable(b"program"))
    (said,) = [record.message for record in caplog.records]
    assert said == f"compiled programs cannot be kept in {tmp_path}/gone (No such file or directory)"

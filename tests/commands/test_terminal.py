"""Commands as a person uses them: progress, answers, Ctrl-C, pipes, and encodings that lack characters."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import environment_in, start
from terminals import Person, shown
from tiny_checkpoint import write_tiny, write_tokenizer

from jaxllm import LLM, SamplingParams
from jaxllm.commands.cli import main
from jaxllm.commands.model_options import LAYOUTS
from jaxllm.commands.terminal import Terminal
from sharding.layout import NAMES

ONE = ["--virtual-devices", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"vocab_size": 258, "max_position_embeddings": 1024, "bos_token_id": 256, "eos_token_id": 257}
    return write_tokenizer(write_tiny(tmp_path_factory.mktemp("terminal"), **sizes))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The caches of these processes: each program is compiled once."""
    return tmp_path_factory.mktemp("home")


def jaxllm(xdg: Path, *arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A process of its own, with these bytes to read."""
    command = [sys.executable, "-m", "jaxllm", *arguments]
    return subprocess.run(command, env=environment_in(xdg) | environment, input=stdin, capture_output=True, cwd=xdg)


class Screen(io.StringIO):
    """A terminal's standard error."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise io.UnsupportedOperation


def answer_of(folder: Path, *, max_tokens: int = 6, **params: Any) -> str:
    return LLM(folder, devices=1).generate("abc", SamplingParams(temperature=0, max_tokens=max_tokens))[0].outputs[0].text


# Progress


def test_progress_is_gone_when_the_answer_comes() -> None:
    screen = Screen()
    terminal = Terminal(screen)
    with terminal.watching():
        terminal.loaded(1, 4)
        terminal.say("prefill of 16 tokens")
        logging.getLogger("elsewhere").info("not ours")
    terminal.say("decode of 1 rows")  # in the middle of an answer
    assert "loading: 25 %" in screen.getvalue() and "prefill of 16 tokens ..." in screen.getvalue()
    assert "decode" not in screen.getvalue()
    assert shown(screen.getvalue()) == ""


def test_a_stream_shows_progress_before_its_first_piece_alone() -> None:
    screen = Screen()
    terminal = Terminal(screen)

    def pieces() -> Any:
        for piece in ("one", " two"):
            terminal.say(f"before {piece}")
            yield piece

    for piece in terminal.until_first(pieces()):
        screen.write(piece)
    assert "before one" in screen.getvalue()
    assert shown(screen.getvalue()) == "one two"


def test_a_warning_has_a_line_of_its_own() -> None:
    screen = Screen()
    terminal = Terminal(screen)
    with terminal.warnings(), terminal.watching():
        terminal.say("prefill of 16 tokens")
        logging.getLogger("jaxllm").warning("`%s` is not known", "some_key")
    assert [shown(line) for line in screen.getvalue().split("\n")] == ["jaxllm: `some_key` is not known", ""]


@pytest.mark.slow
def test_an_answer_is_not_cut_by_what_is_compiled(folder: Path, tmp_path: Path) -> None:
    """Its cache grows on the way, and each size has a program."""
    person = Person(tmp_path, "chat", str(folder), *ONE, "--max-tokens", "300")
    person.sees("> ")
    person.types("hello\n")
    person.sees("\n.*\n> ", begin=len(person.raw))
    person.types("\n")
    assert person.waits() == 0
    assert b"loading:" in person.raw and b"prefill of " in person.raw
    assert "positions" not in person.seen and "loading" not in person.seen


# Ctrl-C


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(folder: Path, home: Path) -> None:
    person = Person(home, "chat", str(folder), *ONE, "--max-tokens", "900", "--max-model-len", "1000")
    person.sees("> ")
    person.types("hello\n")
    person.sees("hello\r\n(.*\r +\r)?..........", begin=0)
    person.presses_ctrl_c()
    person.sees("\n> $")
    assert "stopped" not in person.seen
    person.types("again\n")
    person.sees("again\r\n(.*\r +\r)?.", begin=0)
    person.presses_ctrl_c()
    person.sees("again[^>]*\n> $")
    person.presses_ctrl_c()
    assert person.waits() == 130
    assert person.seen.endswith("stopped\n") and "Traceback" not in person.seen


@pytest.mark.slow
def test_a_message_too_many_is_left_out(folder: Path, home: Path) -> None:
    lines = f"hello\n{'x' * 80}\nbye\n".encode()
    done = jaxllm(home, "chat", str(folder), *ONE, "--max-tokens", "4", "--max-model-len", "90", stdin=lines)
    assert done.returncode == 0
    assert done.stdout.count(b"\n") == 2
    said = done.stderr.decode()
    assert re.fullmatch(r"jaxllm: with this message the conversation has \d+ tokens, and the context holds 90 .*\n", said), said


def test_a_system_message_comes_first(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["hello", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", str(folder), "--devices", "1", "--max-tokens", "6", "--system", "be brief"]) == 0
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    answer = LLM(folder, devices=1).chat(messages, SamplingParams(temperature=0, max_tokens=6))[0].outputs[0].text
    assert capsys.readouterr().out == answer + "\n"


# Before anything runs


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["score", "--help"]], ids=" ".join)
def test_help_and_version_do_without_jax(tmp_path: Path, arguments: list[str]) -> None:
    program = (
        f"import sys; from jaxllm.commands import cli; sys.argv[1:] = {arguments}\ntry: cli.main()\nexcept SystemExit: pass\n"
    )
    program += "print([m for m in sys.modules if m.split('.')[0] in ('jax', 'flax', 'numpy', 'transformers', 'tqdm')])"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], env=environment_in(tmp_path), capture_output=True, text=True)
    assert time.perf_counter() - began < 2  # 0.12 s; other tests run beside it
    assert done.stdout.endswith("[]\n") and done.stderr == "", done.stderr


def test_the_help_names_the_layouts_there_are() -> None:
    assert LAYOUTS == NAMES


@pytest.mark.parametrize("first", ["import jaxllm", "import checkpoints.convert", "from jaxllm import LLM"])
def test_the_cuda_plugin_says_nothing_where_there_is_no_gpu(tmp_path: Path, first: str) -> None:
    env = environment_in(tmp_path)
    for name in ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"):
        env.pop(name, None)
    done = subprocess.run([sys.executable, "-c", f"{first}; import jax; jax.devices()"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# Prompts


def test_standard_input_is_a_prompt(folder: Path, home: Path) -> None:
    options = [*ONE, "--max-tokens", "6"]
    expected = f"abc{answer_of(folder)}\n".encode()
    for arguments in (["-"], []):
        done = jaxllm(home, "generate", str(folder), *arguments, *options, stdin=b"\xef\xbb\xbfabc\n")
        assert (done.returncode, done.stdout) == (0, expected), done.stderr


def generated(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    assert main(["generate", str(folder), "--devices", "1", "--max-tokens", "6", "--json", *options]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts.txt", "\ufeffabc\r\n\r\n日本\n"),
        ("prompts.jsonl", '\ufeff{"prompt": "abc"}\n{"prompt": "\\u65e5本", "id": 1}\n'),
    ],
)
def test_a_file_of_prompts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    found = generated(folder, capsys, "x", "--prompts", str(tmp_path / name))
    assert [one["prompt"] for one in found] == ["x", "abc", "日本"]


def test_json_has_a_line_for_each_sample(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampling = ["--temperature", "1", "--seed", "3", "--min-p", "0.1", "--repetition-penalty", "1.3"]
    found = generated(folder, capsys, "abc", "-n", "2", *sampling)
    params = SamplingParams(n=2, temperature=1, seed=3, min_p=0.1, repetition_penalty=1.3, max_tokens=6)
    outputs = LLM(folder, devices=1).generate("abc", params)[0].outputs
    assert found == [
        {
            "prompt": "abc",
            "index": i,
            "text": one.text,
            "token_ids": one.token_ids,
            "finish_reason": one.finish_reason,
            "stop_reason": one.stop_reason,
        }
        for i, one in enumerate(outputs)
    ]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"fine\nb\xffd\n", "a.txt, line 2 is not UTF-8 (invalid start byte, byte 2, 0xff)"),
        ("a.txt", b"\n\n", "a.txt has no prompt"),
        ("a.jsonl", b'{"prompt": "fine"}\n"text"\n', 'a.jsonl, line 2 is no JSON object with a "prompt"'),
        ("a.jsonl", b'{"prompt": 5}\n', "a.jsonl, line 1 is no JSON object"),
    ],
)
def test_a_bad_file_of_prompts_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    assert main(["generate", "no-model", "--prompts", str(tmp_path / name)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("jaxllm: ") and err.count("\n") == 1 and message in err


def test_no_prompt_at_a_terminal_is_a_sentence(tmp_path: Path) -> None:
    person = Person(tmp_path, "generate", "no-model")
    assert person.waits() == 1
    assert person.seen == "jaxllm: no prompt: give it as an argument, pipe it in, or name a file of prompts with --prompts\n"


# Options on their way


def test_options_may_stand_before_the_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "./no-model", "--max-tokens", "5", "hi"]) == 1
    assert "no-model does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["generate", "./no-model", "--max-token", "5", "--nonsense", "hi"])
    assert ended.value.code == 2 and "unrecognized arguments: --nonsense hi" in capsys.readouterr().err


def test_options_of_the_model_are_passed_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {}

    def refuse(model: str, **options: Any) -> None:
        asked.update(options)
        raise ValueError(model)

    monkeypatch.setattr("jaxllm.llm.LLM", refuse)
    options = ["--hf-overrides", '{"rope_theta": 5.0}', "--revision", "main", "--tokenizer", "other"]
    assert main(["generate", "some-model", "hi", *options]) == 1
    assert asked["hf_overrides"] == {"rope_theta": 5.0}
    assert (asked["revision"], asked["tokenizer"]) == ("main", "other")
    asked.clear()
    assert main(["generate", "some-model", "hi"]) == 1
    assert not asked.keys() & {"hf_overrides", "revision", "tokenizer"}
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["generate", "some-model", "hi", "--hf-overrides", "[1]"])
    assert ended.value.code == 2 and "is no JSON object" in capsys.readouterr().err


def test_a_plan_reads_the_config_as_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    def resolved(model: str, **options: Any) -> str:
        asked.append(options)
        return model

    def read(path: str, **options: Any) -> None:
        asked.append(options)
        raise ValueError(path)

    monkeypatch.setattr("checkpoints.hub.resolve_config", resolved)
    monkeypatch.setattr("checkpoints.checkpoint.read_config", read)
    for command in (["plan", "some-model", "--on", "H100"], ["warmup", "some-model"]):
        asked.clear()
        assert main([*command, "--hf-overrides", "{}", "--revision", "v1"]) == 1
        assert asked == [{"revision": "v1"}, {"hf_overrides": {}}]
    assert main(["plan", "llama-30b", "--on", "H100", "--revision", "v1"]) == 1
    assert "llama-30b is a published shape" in capsys.readouterr().err


# What is written


def test_characters_that_a_terminal_lacks_are_escaped(folder: Path, home: Path) -> None:
    done = jaxllm(home, "generate", str(folder), *ONE, "--max-tokens", "6", stdin="é\n".encode(), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"\\xe9") and done.stdout.endswith(b"\n")


def test_a_closed_pipe_ends_it_quietly(folder: Path, home: Path) -> None:
    with start(home, "generate", str(folder), "abc", *ONE, "--max-tokens", "6") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(120) == 1
        assert process.stderr.read() == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jaxllm", "families"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=environment_in(tmp_path), stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "jaxllm: [Errno 28] No space left on device\n")

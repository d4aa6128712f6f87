"""The command line: what it prints, its exit codes, and one sentence for each mistake, never a traceback."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from processes import start
from tiny_checkpoint import write_tiny, write_tokenizer

from jaxllm import LLM, SamplingParams
from jaxllm.commands.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"vocab_size": 258, "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257}
    return write_tokenizer(write_tiny(tmp_path_factory.mktemp("cli"), **sizes))


def test_generate_prints_prompt_and_answer_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "abc", "x", "--devices", "1", "--max-tokens", "9"]) == 0
    llm = LLM(folder, devices=1)
    answers = llm.generate(["abc", "x"], SamplingParams(temperature=0, max_tokens=9))
    out, err = capsys.readouterr()
    assert out == "".join(f"{a.prompt}{a.outputs[0].text}\n" for a in answers)
    assert err == ""


def test_options_reach_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", "1.5", "--top-p", "0.9", "--top-k", "50", "--seed", "3", "--max-tokens", "20"]
    where = ["--devices", "2", "--layout", "gathered", "--dtype", "bfloat16", "--max-model-len", "64"]
    assert main(["generate", str(folder), "abc", *options, *where]) == 0
    llm = LLM(folder, devices=2, layout="gathered", dtype="bfloat16", max_model_len=64)
    params = SamplingParams(temperature=1.5, top_p=0.9, top_k=50, seed=3, max_tokens=20)
    assert capsys.readouterr().out == "abc" + llm.generate("abc", params)[0].outputs[0].text + "\n"


def test_a_chat_remembers(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["hello", "and then?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", str(folder), "--devices", "1", "--max-tokens", "6"]) == 0
    llm = LLM(folder, devices=1)
    messages, expected = [], ""
    for line in ("hello", "and then?"):
        messages.append({"role": "user", "content": line})
        answer = llm.chat(messages, SamplingParams(temperature=0, max_tokens=6))[0].outputs[0].text
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert capsys.readouterr().out == expected


@pytest.mark.slow
def test_the_demo_streams_and_reports(folder: Path, tmp_path: Path) -> None:
    process = start(tmp_path, "demo", "--max-tokens", "12", model=folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err == ""  # quiet: stderr is no terminal
    assert out.startswith("> Why is the sky blue?")
    for fact in (
        r"layout tensor: 1 x 4 \(data x model\) over 4 cpu devices, float32",
        r"\d+ MiB of weights a device",
        r"load \d+\.\d s, compile \d+\.\d s \([1-9]\d* programs compiled",
        r"first token \d+\.\d s after the start, then \d+ tokens/s",
    ):
        assert re.search(fact, out), fact


def break_file(folder: Path, to: Path, name: str) -> Path:
    shutil.copytree(folder, to)
    whole = (to / name).read_bytes()
    (to / name).write_bytes(whole[: len(whole) // 2])
    return to


def change_config(folder: Path, to: Path, **changes: object) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/model", "hi"], "/no/such/model"),
        (["MODEL", "hi", "--layout", "diagonal"], "diagonal"),
        (["MODEL", "hi", "--devices", "99"], r"99 devices asked for, 8 there .*virtual-devices"),
        (["MODEL", "hi", "--virtual-devices", "4"], "already running with 8 CPU devices"),
        (["MODEL", "hi", "--virtual-devices", "-1"], "-1 virtual devices: ask for 1 to 512"),
        (["MODEL", "hi", "--virtual-devices", "100000"], "100000 virtual devices: ask for 1 to 512"),
        (["MODEL", "hi", "--devices", "-1"], r"-1 devices asked for, 8 there \(cpu\): ask for 1 to 8\n"),
        (["MODEL", "hi", "--dtype", "int3"], "int3.*float32, bfloat16, float16"),
        (["MODEL", "hi", "--max-model-len", "9999"], "9999 exceeds the model's context of 512"),
        (["MODEL", "hi", "--top-p", "2"], "top_p"),
        (["MODEL", "hi", "--max-tokens", "-3"], "max_tokens"),
        (["MODEL", ""], "the prompt is empty"),
        (["MODEL", "a" * 600], "600 tokens and the context holds 512"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    arguments = [str(folder) if a == "MODEL" else a for a in arguments]
    devices = [] if any("devices" in a for a in arguments) else ["--devices", "1"]
    assert main(["generate", *arguments, *devices]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jaxllm: ") and err.count("\n") == 1
    assert re.search(message, err), err


def test_a_broken_model_is_answered_in_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = {
        "model.safetensors": break_file(folder, tmp_path / "a", "model.safetensors"),
        "config.json": break_file(folder, tmp_path / "b", "config.json"),
        "its tokenizer": break_file(folder, tmp_path / "c", "tokenizer.json"),
        "num_hidden_layers": change_config(folder, tmp_path / "d", num_hidden_layers="two"),
        "`quantization`": change_config(folder, tmp_path / "e", quantization={"group_size": 64, "bits": 4}),
        "no_such_model": change_config(folder, tmp_path / "f", model_type="no_such_model"),
        "embed_tokens": change_config(folder, tmp_path / "g", vocab_size=300),
        "layers.2": change_config(folder, tmp_path / "h", num_hidden_layers=3),
    }
    for name, path in broken.items():
        assert main(["generate", str(path), "hi", "--devices", "1"]) == 1, name
        out, err = capsys.readouterr()
        assert out == "" and name in err
        assert err.startswith("jaxllm: ") and err.count("\n") == 1, err


def test_memory_that_ran_out_is_a_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.\nand more\n")

    monkeypatch.setattr("jaxllm.llm.LLM.generate", full)
    assert main(["generate", str(folder), "hi", "--devices", "1"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "123 bytes" in err and "--max-model-len" in err


@pytest.mark.slow
def test_ctrl_c_ends_it_and_leaves_the_caches_whole(folder: Path, tmp_path: Path) -> None:
    arguments = ["generate", str(folder), "abc", "--virtual-devices", "2", "--max-tokens", "400"]
    process = start(tmp_path, *arguments)
    while process.poll() is None and not list(tmp_path.glob("jaxllm/compiled/*-cache")):
        time.sleep(0.01)  # until it is in the middle of compiling
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "stopped\n"
    process = start(tmp_path, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and out.startswith("abc") and err == ""

"""Every example runs on the model that it is given, and says what it set out to say."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from processes import environment_in
from tiny_checkpoint import write_tiny, write_tokenizer

from sharding.mesh import pick_devices

EXAMPLES = ROOT / "examples"
LINES = range(10, 41)  # of an example
LONGER = {"distil_a_draft": range(10, 91)}  # it has a model and a trainer of its own

# What each prints of a tiny model, as regular expressions.
SAID = {
    "chat": [r"> Name a fruit\.\n.", r"> What colour is it\?\n."],
    "convert_and_verify": [r"(\d+) of \1 parameters are equal\n$"],
    "log_probabilities": [r"then (.* -\d+\.\d\d, )*.* -\d+\.\d\d\n", r"together -\d+\.\d\d\n$"],
    "offline_generation": [r"'Once upon a time'\n  0: .* \(24 tokens, ended by length\)\n  1: "],
    "own_benchmark": [r"(right|wrong): The capital of France is (Paris|Rome|Berlin) \(-\d", r"accuracy \d\.\d\d\n$"],
    "plan_ahead": [r"on 4xH100\n", r"  tensor +\d+\.\d\d GiB of weights a device, +\d+ tokens/s, \d+ sequences\n"],
}
# Not with eight devices, or strict about ranks, as it is here.
IN_A_PROCESS = {
    "distil_a_draft": [r"epoch 0: loss .*, held-out log-probability -\d.*\n(.*\n)*epoch 2: .*\nthe draft goes on: '"],
    "four_devices": [r"tensor: 1 x 4 .*\n  (.*)\ngathered-2x2: 2 x 2 .*\n  \1\n$"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"vocab_size": 258, "max_position_embeddings": 256, "num_hidden_layers": 1, "bos_token_id": 256}
    return write_tokenizer(write_tiny(tmp_path_factory.mktemp("examples"), **sizes))


def test_every_example_is_run() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted([*SAID, *IN_A_PROCESS])


@pytest.mark.parametrize("name", sorted([*SAID, *IN_A_PROCESS]))
def test_an_example_is_short_and_says_how_it_is_run(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) in LONGER.get(name, LINES)
    assert f"\npython examples/{name}.py [MODEL]" in text
    assert "smollm2-135m" in text


@pytest.mark.parametrize("name", sorted(SAID))
def test_an_example(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "argv", [name, str(model)])
    monkeypatch.setattr("jaxllm.llm.pick_devices", lambda devices: pick_devices(devices or 1))  # not all eight: less to compile
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert [pattern for pattern in SAID[name] if not re.search(pattern, out)] == [], out


@pytest.mark.parametrize("name", sorted(IN_A_PROCESS))
def test_an_example_in_a_process(name: str, model: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), str(model)]
    result = subprocess.run(command, cwd=tmp_path, env=environment_in(tmp_path), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert [pattern for pattern in IN_A_PROCESS[name] if not re.search(pattern, result.stdout)] == [], result.stdout

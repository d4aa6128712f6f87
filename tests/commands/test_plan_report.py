"""`jaxllm plan`: what it prints, as a table and as JSON, from a config alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_checkpoint import CONFIG

from checkpoints.checkpoint import read_config
from jaxllm.commands.cli import main
from jaxllm.planning.compiled_report import BATCHES
from jaxllm.planning.plan import CONTEXT, cache_bytes
from jaxllm.planning.presets import PRESETS
from sharding.hardware import absent_devices
from sharding.layout import make_layout


def test_the_challenge(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-30b", "--on", "4xV100-32GB"]) == 0
    head, *rest = capsys.readouterr().out.splitlines()
    assert head == "llama-30b: 32.53 B parameters in float16, 1560 KiB of cache a token; 4 x V100-32GB of 31.7 GiB"
    rows = {line.split()[0]: line.split()[1:] for line in rest if line[:1].islower()}
    weights, sequence = rows["tensor"][:2]
    assert (weights, sequence) == ("15.15", "0.76")
    assert rows["replicated"][4:] == ["-"] * 7  # it does not fit: no times
    assert "-" not in rows["gathered"][:8]
    assert rest[-2].startswith("to generate, auto takes tensor, 64 sequences of up to 2048 tokens, 18 of that length")
    assert rest[-1] == "to score, auto takes gathered"


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-30b", "--on", "2x RTX 4090"]) == 1
    generate, score = capsys.readouterr().out.splitlines()[-2:]
    assert generate.startswith("to generate does not fit: ")
    assert score.startswith("to score does not fit: ")
    assert "what would: 4 such devices; 2 x A100-40GB" in generate


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-7b", "--on", "2xH100", "--dtype", "bfloat16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dtype"], found["hardware"]["name"]) == ("bfloat16", "H100")
    layouts = {one["layout"]: one for one in found["layouts"]}
    assert set(layouts) == {"replicated", "gathered", "tensor"}
    assert layouts["replicated"]["weight_bytes"] == 2 * PRESETS["llama-7b"].num_params
    assert [step["batch"] for step in layouts["tensor"]["steps"]] == [1, 8, 64]
    assert all(step["tokens_per_second"] > 0 for step in layouts["tensor"]["steps"])
    assert found["auto"]["generate"]["layout"] == "tensor"
    assert found["auto"]["score"]["fits"]


def test_a_config_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"dtype": "bfloat16"}))
    assert main(["plan", str(tmp_path), "--on", "V100"]) == 0
    assert "parameters in float16" in capsys.readouterr().out  # a V100 has no bfloat16


@pytest.mark.parametrize(
    ("model", "on", "message"),
    [
        ("llama-30b", "4xH1000", "unknown hardware 'H1000'; there are V100-32GB"),
        ("llama-30b", "0xH100", "name a count from 1 to 64"),
        ("./nothing", "H100", "does not exist; give a folder"),
        ("{folder}", "H100", "config.json: `hidden_size` is missing; add it"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, on: str, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"}))
    assert main(["plan", model.format(folder=tmp_path), "--on", on]) == 1
    error = capsys.readouterr().err
    assert error.startswith("jaxllm: ") and error.count("\n") == 1
    assert message in error


def test_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["plan", "llama-30b", "--on", "4xV100", "--plot", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_compiled_steps_stand_beside_the_estimates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"dtype": "bfloat16"}))
    command = ["plan", str(tmp_path), "--on", "2xH100", "--compile", "--layout", "tensor", "--json"]
    code, said = main(command), capsys.readouterr()
    if "needs jax's CUDA plugin" in said.err:
        pytest.skip(said.err)
    assert code == 0, said.err
    found = json.loads(said.out)
    steps = {step["name"]: step for step in found["compiled"]["tensor"]}
    assert [name.split()[0] for name in steps] == ["prefill", "decode", "decode", "score"]
    estimate = next(one for one in found["layouts"] if one["layout"] == "tensor")
    decode = steps["decode of 1 rows"]
    reduces = next(c for c in decode["collectives"] if c["kind"] == "all-reduce")
    assert reduces["count"] == 2 * CONFIG["num_hidden_layers"] + 1
    config = read_config(tmp_path)
    layout = make_layout("tensor", absent_devices("2xH100"), config.hidden_size)
    context = min(CONTEXT, config.max_position)
    assert decode["alias_bytes"] == cache_bytes(config, layout, "bfloat16", max(BATCHES), context)
    assert 0 < decode["argument_bytes"] - decode["alias_bytes"] - estimate["weight_bytes"] < 2000  # the batch
    assert decode["copies"] == []


def test_devices_without_a_description_cannot_be_compiled_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "smollm2-135m", "--on", "2xH100-PCIe", "--compile"]) == 1
    assert "no description of H100-PCIe to compile for; there are a100-40gb" in capsys.readouterr().err

"""Checkpoints become folders that transformers loads: bit for bit, whole or absent, in bounded memory."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from layers import layered
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import CONFIG, write_tiny, write_tokenizer

from checkpoints import convert as convert_module
from checkpoints import safetensors_writer, view
from checkpoints.checkpoint import open_checkpoint
from checkpoints.convert import FORMATS, PEAK_BYTES, convert, prepare, round_to
from checkpoints.errors import CheckpointError
from checkpoints.families import read_hf
from checkpoints.families.llama import write_config
from checkpoints.names import axis_sizes
from checkpoints.parameters import names_of_parameters
from checkpoints.safetensors_writer import header, write_file
from checkpoints.target import Entry
from checkpoints.verify import compare
from jaxllm.commands.cli import main
from jaxllm.config import ModelConfig, RopeConfig
from jaxllm.planning.presets import PRESETS


def run(source: Path, target: Path, *options: str) -> int:
    return main(["convert", str(source), str(target), *options])


def as_dtype(folder: Path, dtype: Any) -> Path:
    tensors = {name: x.astype(dtype) for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def loaded(folder: Path) -> dict[str, np.ndarray]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("slice_numbers", [1 << 24, 100])
def test_a_folder_becomes_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, slice_numbers: int
) -> None:
    monkeypatch.setattr(view, "SLICE", slice_numbers)
    source = as_dtype(write_tokenizer(write_tiny(tmp_path / "source", vocab_size=258)), dtype)
    (source / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert run(source, tmp_path / "target", "--max-shard-size", "20kB") == 0
    target = tmp_path / "target"
    before, after = loaded(source), loaded(target)
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert x.dtype == after[name].dtype and x.tobytes() == after[name].tobytes(), name
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in before.values())
    assert set(index["weight_map"]) == set(before) and len(set(index["weight_map"].values())) > 2
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"} <= set(os.listdir(target))
    assert open_checkpoint(target).config == replace(open_checkpoint(source).config, dtype=open_checkpoint(target).config.dtype)
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


def test_rounding_is_numpys_and_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tiny(tmp_path / "source")
    assert run(source, tmp_path / "target", "--dtype", "bfloat16") == 0
    assert "equal to the source bit for bit, rounded to bfloat16" in capsys.readouterr().out
    after = loaded(tmp_path / "target")
    assert all(x.astype(ml_dtypes.bfloat16).tobytes() == after[name].tobytes() for name, x in loaded(source).items())
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(CheckpointError, match="w holds 7e\\+04, beyond what float16 can"):
        round_to(np.array([1, -7e4, np.inf], np.float32), np.dtype(np.float16), "w")
    assert np.isinf(round_to(np.array([1, np.inf], np.float32), np.dtype(np.float16), "w")[1])


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_it_with_the_same_logits(tmp_path: Path, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "attention_bias": True, "mlp_bias": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "source")
    assert run(tmp_path / "source", tmp_path / "target") == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, again.eval()(ids).logits)


@pytest.mark.parametrize(
    "config",
    [
        PRESETS["smollm2-135m"],
        PRESETS["llama-30b"],
        *(
            ModelConfig(64, 16, 32, 2, 4, 2, 4, 128, rope=rope, activation="gelu_tanh", eos_token_ids=(1, 2), mlp_bias=True)
            for rope in (
                RopeConfig("linear", 500.0, 2.0, 128),
                RopeConfig("dynamic", 500.0, 2.0, 128),
                RopeConfig("llama3", 500.0, 8.0, 64, 1.0, 4.0),
                RopeConfig("yarn", 500.0, 4.0, 32, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5, truncate=False),
            )
        ),
    ],
)
def test_a_config_that_is_written_reads_the_same(config: ModelConfig) -> None:
    written = json.loads(json.dumps(write_config(config)))
    read = read_hf(written, "config.json")[1]
    assert config.rope is not None and read.rope is not None
    if config.rope.kind in ("default", "linear", "dynamic"):  # no use for it
        read = replace(read, rope=replace(read.rope, original_max_position=config.rope.original_max_position))
    assert read == config


def test_what_cannot_be_converted_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tiny(tmp_path / "source")
    (tmp_path / "there").mkdir()
    assert run(source, tmp_path / "there") == 1
    assert "exists: choose another target, or overwrite it with --force" in capsys.readouterr().err
    assert run(source, tmp_path / "there", "--force") == 0
    assert loaded(tmp_path / "there").keys() == loaded(source).keys()
    assert run(source, source, "--force") == 1
    assert "holds the source itself, or would" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert run(source, tmp_path / "mine", "--force") == 1
    assert "is no checkpoint" in capsys.readouterr().err
    (tmp_path / "mine").rename(tmp_path / "target.partial")
    assert run(source, tmp_path / "target") == 1
    assert "is in the way, and not from a conversion" in capsys.readouterr().err
    (tmp_path / "target.partial").rename(tmp_path / "mine")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"odd": np.zeros(3, np.float32)}, source / "model.safetensors")
    assert run(source, tmp_path / "target") == 1
    assert "no use for: odd" in capsys.readouterr().err
    save_file(tensors | {"model.layers.0.mlp.up_proj.bias": np.zeros(40, np.float32)}, source / "model.safetensors")
    assert run(source, tmp_path / "target") == 1  # a rule knows it, the config does not
    assert "no use for: model.layers.0.mlp.up_proj.bias" in capsys.readouterr().err
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors")
    assert run(source, tmp_path / "target") == 1
    assert "lacks tensors model.layers.0.mlp.up_proj.weight" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["mine", "source", "there"]


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tiny(tmp_path / "source")
    assert run(source, tmp_path / "target", "--dry-run", "--dtype", "float16") == 0
    size = sum(x.nbytes for x in loaded(source).values())
    assert f"{size:,} bytes -> {size // 2:,} bytes, 21 tensors in 1 file\n" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["source"]


def test_two_on_one_target_refuse_each_other(tmp_path: Path) -> None:
    job = prepare(open_checkpoint(write_tiny(tmp_path / "source")), tmp_path / "target")
    with convert_module._exclusive_lock(job), pytest.raises(CheckpointError, match="written by another process"):
        convert(job)
    convert(job)


def test_a_target_that_appears_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepare(open_checkpoint(write_tiny(tmp_path / "source")), tmp_path / "target")
    monkeypatch.setattr(convert_module, "_check", lambda job: job.target.mkdir())
    with pytest.raises(CheckpointError, match="target exists"):
        convert(job)


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepare(open_checkpoint(write_tiny(tmp_path / "source")), tmp_path / "target")
    monkeypatch.setattr(convert_module, "_check", lambda job: (tmp_path / "source" / "config.json").touch())
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        convert(job)
    assert not job.target.exists()


def test_a_full_disk_is_told_and_what_is_whole_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(write_tiny(tmp_path / "source"))
    job = prepare(source, tmp_path / "target", max_shard_bytes=20_000)
    written: list[str] = []
    room = 2

    def fill_up(path: Path, *arguments: Any) -> None:
        if len(written) == room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_file(path, *arguments)
        written.append(path.name)

    monkeypatch.setattr(safetensors_writer, "write_file", fill_up)
    with pytest.raises(CheckpointError, match=r"the disk is full .* goes on from what is complete"):
        convert(job)
    assert not job.target.exists()
    room = len(job.groups)
    convert(job)
    assert sorted(written) == sorted(job.groups)  # each once


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_that_cannot_grow_is_told_and_the_next_run_goes_on(tmp_path: Path, to: str) -> None:
    source = open_checkpoint(write_tiny(tmp_path / "source", vocab_size=512, hidden_size=96, num_attention_heads=12))
    job = prepare(source, tmp_path / "target", to=to)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"target cannot be written \(.*File too large"):
            convert(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not job.target.exists()
    convert(job)
    assert all(one.equal for one in compare(source, open_checkpoint(job.target)))


def test_what_may_not_be_read_or_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        place = Path(name)
        place.chmod(0o777)
        with nobody():
            write_tiny(place / "open")
            write_tiny(place / "closed")
            (place / "closed" / "model.safetensors").chmod(0)
            (place / "full").mkdir()
            (place / "full").chmod(0o500)
            for source, target, named in (("closed", "target", "model.safetensors"), ("open", "full/target", "target")):
                for to in FORMATS:
                    assert run(place / source, place / target, "--to", to) == 1
                    err = capsys.readouterr().err
                    assert err.count("\n") == 1 and named in err and "Permission denied" in err
        assert sorted(os.listdir(place)) == ["closed", "full", "open"] and not os.listdir(place / "full")


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """As a user who may not do everything; what is imported late must be there, as Python's own files may be root's alone."""
    importlib.import_module("checkpoints.orbax_writer")
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_another_job_starts_over_and_damage_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(write_tiny(tmp_path / "source"))
    job = prepare(source, tmp_path / "target")

    def stop(job: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "_publish", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(job)
    monkeypatch.undo()
    damaged = bytearray((job.work / "model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (job.work / "model.safetensors").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"differs from .*differs by up to"):
        convert(job)
    assert not job.target.exists()
    convert(prepare(source, tmp_path / "target", dtype="float16"))
    assert {info.dtype for info in open_checkpoint(tmp_path / "target").source.tensors.values()} == {"F16"}
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


def test_a_tied_head_that_differs_is_not_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tiny(tmp_path / "source", tie_word_embeddings=True)
    assert run(source, tmp_path / "target") == 1
    assert "lm_head.weight and model.embed_tokens.weight differ" in capsys.readouterr().err
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, source / "model.safetensors")
    assert run(source, tmp_path / "target") == 0
    assert "lm_head.weight" not in loaded(tmp_path / "target")


PEAK = """
import sys
from bench.machine import peak_bytes
from jaxllm.commands.cli import main
code = main(sys.argv[1:])
print(peak_bytes())
sys.exit(code)
"""


def peak_bytes(*arguments: object) -> int:
    """Peak bytes of a process that runs the command line."""
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


LARGE = {
    # The largest tensor has 0.26 GB, and here 0.4 as one expert of Mixtral-8x22B does, two in a stack.
    "llama": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12, "num_attention_heads": 16},
    "mixtral": {"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 1, "num_attention_heads": 48,
                "num_local_experts": 2},
}  # fmt: skip


def write_large(folder: Path, family: str) -> Path:
    """3 GB of float32 zeros, which take no room on the disk."""
    config = CONFIG | {"model_type": family, "vocab_size": 32000, "num_key_value_heads": 4, "head_dim": 128} | LARGE[family]
    _, model, rules = read_hf(config, "config.json")
    mappings = rules.by_parameter(model)
    entries = [
        Entry(tensor, mappings[path].pattern.tensor_shape(axis_sizes(model)), np.dtype("f4"))
        for path in names_of_parameters(model)
        for tensor in mappings[path].tensors
    ]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    begin = header(entries)
    (folder / "model.safetensors").write_bytes(begin)
    os.truncate(folder / "model.safetensors", len(begin) + sum(entry.nbytes for entry in entries))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "to"),
    layered(product(LARGE, FORMATS), lambda *case: case in (("llama", "safetensors"), ("mixtral", "orbax"))),
)
def test_memory_is_bounded_whatever_the_models_size(tmp_path: Path, family: str, to: str) -> None:
    """Beyond a dry run's, under 1 GiB and twice the largest tensor, and under what the command promises."""
    source = write_large(tmp_path / "source", family)
    sizes = [info.nbytes for info in open_checkpoint(source).source.tensors.values()]
    assert sum(sizes) > 3e9
    arguments = ("convert", source, tmp_path / "target", "--to", to, "--dtype", "bfloat16")
    idle = peak_bytes(*arguments, "--dry-run")
    used = peak_bytes(*arguments) - idle
    assert used < min((1 << 30) + 2 * max(sizes), PEAK_BYTES)
    shutil.rmtree(tmp_path / "target")  # pytest keeps the folders of its last three runs


STOPPED = """
import os, sys
from pathlib import Path
from checkpoints.checkpoint import open_checkpoint
from checkpoints.convert import convert, prepare

left = int(sys.argv[3])

def dying(function):
    def call(*arguments, **keywords):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return function(*arguments, **keywords)
    return call

for name in ("rename", "replace", "unlink", "mkdir", "rmdir"):
    setattr(os, name, dying(getattr(os, name)))
convert(prepare(open_checkpoint(sys.argv[1]), Path(sys.argv[2]), max_shard_bytes=20_000), force=True)
"""


@pytest.mark.slow
def test_stopped_before_any_change_of_a_folder_the_target_is_whole_or_absent(tmp_path: Path) -> None:
    """A conversion over an older one dies before the first, second, ... file or folder that it makes, renames or removes."""
    source, target = write_tiny(tmp_path / "source"), tmp_path / "target"
    older = write_tiny(tmp_path / "older", rms_norm_eps=0.5)
    for changes in range(40):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(older, target)
        code = subprocess.run([sys.executable, "-c", STOPPED, str(source), str(target), str(changes)], check=False).returncode
        if target.exists():
            assert any(all(one.equal for one in compare(open_checkpoint(s), open_checkpoint(target))) for s in (source, older))
        convert(prepare(open_checkpoint(source), target, max_shard_bytes=20_000), force=True)
        assert open_checkpoint(target).config == open_checkpoint(source).config
        assert sorted(os.listdir(tmp_path)) == ["older", "source", "target"]
        if code == 0:
            break
    assert 5 < changes < 39


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
def test_killed_at_random_moments_the_target_is_whole_or_absent(tmp_path: Path, to: str) -> None:
    """SIGKILL at 20 moments after a conversion has begun; each next run goes on, and the last one finishes."""
    sizes = {"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 700, "num_hidden_layers": 4}
    source, target = write_tiny(tmp_path / "source", **sizes), tmp_path / "target"
    job = prepare(open_checkpoint(source), target, to=to)
    command = [
        sys.executable,
        "-m",
        "jaxllm",
        "convert",
        str(source),
        str(target),
        "--max-shard-size",
        "400kB",
        "--to",
        to,
    ]
    rng = random.Random(0)
    killed = 0
    while killed < 20:
        shutil.rmtree(target, ignore_errors=True)
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not job.beside("lock").exists() and child.poll() is None:
            time.sleep(0.001)
        try:
            child.wait(rng.uniform(0, 0.2 if to == "safetensors" else 1.0))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
        killed += child.returncode != 0
        if target.exists():
            assert all(one.equal for one in compare(open_checkpoint(source), open_checkpoint(target)))
    assert subprocess.run([*command, "--force"], check=False).returncode == 0
    assert all(one.equal for one in compare(open_checkpoint(source), open_checkpoint(target)))
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]

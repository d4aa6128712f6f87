"""Two checkpoints are compared to the bit, and a checkpoint is told by what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import write_tiny

from checkpoints import verify, view
from checkpoints.checkpoint import open_checkpoint
from checkpoints.errors import CheckpointError
from checkpoints.verify import Compared, compare, differing_config
from jaxllm.commands.cli import main

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_tiny(tmp_path / "a"), write_tiny(tmp_path / "b")


def change(folder: Path, name: str, tensor: np.ndarray | None) -> None:
    """Put `tensor` under `name` in a folder's one file, or take it out."""
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def tensor(folder: Path, name: str) -> np.ndarray:
    return load_file(folder / "model.safetensors")[name]


def differing(a: Path, b: Path) -> list[Compared]:
    return [one for one in compare(open_checkpoint(a), open_checkpoint(b)) if not one.equal]


def test_equal_checkpoints_are_equal(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert differing(*pair) == []
    assert main(["verify", *map(str, pair)]) == 0
    assert "21 of 21 parameters are equal bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize("slice_numbers", [1 << 24, 50])
def test_one_number_that_differs_is_found(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, slice_numbers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(view, "SLICE", slice_numbers)
    changed = tensor(pair[1], DOWN)
    changed[-1, -1] += 0.5
    change(pair[1], DOWN, changed)
    [found] = differing(*pair)
    assert found.parameter == "blocks.1.mlp.down.weight" and found.tensors == (DOWN, DOWN)
    assert found.largest == pytest.approx(0.5, rel=1e-5)
    assert main(["verify", "--json", *map(str, pair)]) == 1
    said = json.loads(capsys.readouterr().out)
    assert not said["same"] and len(said["parameters"]) == 21
    assert [one["verdict"] for one in said["parameters"] if not one["equal"]] == ["differs by up to 0.5"]


@pytest.mark.parametrize(
    ("first", "second", "equal", "largest"),
    [
        ([1.0, 0.0], [1.0, -0.0], False, 0),  # the same numbers, other bits
        ([1.0, np.nan], [1.0, np.nan], True, 0),
        ([1.0, np.nan], [1.0, 2.0], False, np.inf),
        ([1.0, np.inf], [1.0, np.inf], True, 0),
        ([1.0, np.inf], [1.0, 2.0], False, np.inf),
    ],
)
def test_bits_are_compared_and_not_numbers_alone(first: list[float], second: list[float], equal: bool, largest: float) -> None:
    assert verify._difference(np.array(first, "f4"), np.array(second, "f4")) == (equal, largest)


def test_another_dtype_may_hold_the_same_numbers(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    rounded = tensor(pair[0], DOWN).astype(ml_dtypes.bfloat16)
    change(pair[0], DOWN, rounded)
    change(pair[1], DOWN, rounded.astype(np.float32))
    assert differing(*pair) == []
    assert main(["verify", *map(str, pair)]) == 0
    assert "20 of 21 parameters are equal bit for bit, 1 are the same numbers in another dtype" in capsys.readouterr().out
    change(pair[1], DOWN, tensor(pair[1], DOWN) * np.float32(1 + 2**-12))
    [found] = differing(*pair)
    assert found.dtypes == ("BF16", "F32") and found.largest is not None and 0 < found.largest < 0.01


def test_what_one_side_lacks_is_named(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    change(pair[1], DOWN, None)
    change(pair[0], "model.layers.0.extra", np.zeros(3, np.float32))
    missing, extra = differing(*pair)
    assert (missing.parameter, missing.verdict) == ("blocks.1.mlp.down.weight", "only in A")
    assert (extra.parameter, extra.verdict) == ("model.layers.0.extra", "only in A")
    assert main(["verify", *map(str, pair)]) == 1
    assert "blocks.1.mlp.down.weight" in capsys.readouterr().out


def test_other_architectures_and_shapes(tmp_path: Path) -> None:
    a = write_tiny(tmp_path / "a")
    b = write_tiny(tmp_path / "b", intermediate_size=44, rms_norm_eps=1e-3)
    said = differing_config(open_checkpoint(a), open_checkpoint(b))
    assert said == ["intermediate_size: 40 and 44", "norm_eps: 1e-06 and 0.001"]
    shapes = {one.parameter: one.verdict for one in differing(a, b)}
    assert shapes["blocks.0.mlp.gate.weight"] == "shapes differ: (24, 40) and (24, 44)"
    change(b, DOWN, np.zeros((24, 40), np.float32))
    with pytest.raises(CheckpointError, match=r"down_proj.weight is \(24, 40\), not \(24, 44\)"):
        differing(a, b)


def test_inspect_tells_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny(tmp_path / "model")
    change(folder, DOWN, tensor(folder, DOWN).astype(np.float16))
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    config = open_checkpoint(folder).config
    assert f"{config.num_params:,} parameters in 21 tensors" in said
    assert "960 F16" in said
    assert "over 4 devices: padded query heads 6 -> 8, KV heads 3 -> 4, vocabulary 97 -> 100" in said
    assert main(["inspect", str(folder), "--json", "--devices", "1"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["padded"] == {} and found["bytes"] == 4 * config.num_params - 2 * 960
    assert main(["inspect", str(folder), "--devices", "0"]) == 1
    assert main(["inspect", str(tmp_path / "nothing")]) == 1

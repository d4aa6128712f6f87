"""Rates of the devices here are measured once, kept, and used in place of data sheets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny_checkpoint import CONFIG

from jaxllm.commands.cli import main
from jaxllm.planning import measure
from jaxllm.planning.measure import measured
from jaxllm.planning.presets import PRESETS
from jaxllm.planning.roofline import decode_step
from sharding.hardware import Hardware
from sharding.layout import make_layout


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' machine is busy anyway."""
    for name, value in {"ROWS": (1, 8), "REPEATS": 1, "CALLS": 1, "LARGE": 1 << 14, "WIDTH": 256}.items():
        monkeypatch.setattr(measure, name, value)


@pytest.mark.usefixtures("quick")
def test_rates_are_measured_once_and_broken_ones_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices, real = jax.devices()[:2], measure.measure
    found: list[Any] = []

    def once(*given: Any) -> Any:  # measuring takes seconds
        found.append(found[0] if found else real(*given))
        return found[-1]

    monkeypatch.setattr(measure, "measure", once)
    first = measured(devices, "float32", tmp_path)
    assert min(first.flops, first.bandwidth, first.link, first.hop) > 0
    assert [rows for rows, _ in first.curve] == [1, 8]
    (file,) = tmp_path.iterdir()
    again = measured(devices, "float32", tmp_path)
    assert (again.curve, again.bandwidth) == (first.curve, first.bandwidth) and len(found) == 1
    for i, broken in enumerate(("", "[]", "{}", json.dumps({"curve": [[1, "x"]]}), file.read_text()[:-9])):
        file.write_text(broken)
        assert measured(devices, "float32", tmp_path).curve and len(found) == 2 + i
        assert json.loads(file.read_text())["curve"]
    measured(devices[:1], "float32", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # one device of one is not one of two


def test_a_curve_stands_for_the_products() -> None:
    config, layout = PRESETS["llama-7b"], make_layout("tensor", jax.devices()[:1], 4096)
    curve = ((1, 1e-10), (9, 3e-10), (64, 6e-10))
    here = Hardware("cpu", "", 1 << 40, 1e15, 1e15, 1e15, 1e15, 0.0, None, curve)

    def seconds(rows: int) -> float:
        weights = config.num_layers * config.layer_params + config.vocab_size * config.hidden_size
        return decode_step(config, layout, "bfloat16", here, rows, 1).products / weights

    assert seconds(1) == pytest.approx(1e-10)
    assert seconds(5) == pytest.approx(2e-10)
    assert seconds(9) == pytest.approx(3e-10)
    assert seconds(64) == pytest.approx(6e-10)
    assert seconds(128) == pytest.approx(12e-10)


@pytest.mark.usefixtures("quick")
def test_a_plan_of_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert main(["plan", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == len(jax.devices()) and found["dtype"] == "float32"
    assert all(one["steps"][0]["seconds"] > 0 for one in found["layouts"])
    assert list((tmp_path / "jaxllm" / "rates").iterdir())
    assert main(["plan", str(tmp_path), "--on", "H100", "--virtual-devices", "4"]) == 1
    assert "--virtual-devices are those of --on here" in capsys.readouterr().err


def test_what_takes_longer_on_a_cpu_than_the_curve_says() -> None:
    """A cache that was timed as a whole, and operations."""
    config, layout = PRESETS["llama-7b"], make_layout("tensor", jax.devices()[:1], 4096)
    here = Hardware("cpu", "", 1 << 40, 1e15, 1e15, 1e15, 1e15, 0.0, None, ((1, 1e-10), (64, 1e-10)), launch=0.0)
    plain, timed, slow = (
        decode_step(config, layout, "float32", rates, 8, 1000)
        for rates in (here, replace(here, cache_rate=1e10), replace(here, launch=1e-6))
    )
    assert timed.attention == pytest.approx(8 * 1000 * config.kv_bytes_per_token(4) / 1e10)
    assert slow.total - plain.total == pytest.approx(config.num_layers * 40e-6)

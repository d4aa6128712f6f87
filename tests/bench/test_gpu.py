"""`python -m bench.gpu` runs, on a CPU and tiny models: on the day that a GPU is there nothing but its numbers is new."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from paths import ROOT, SHARED

from bench.gpu.parts import PARTS
from bench.gpu.profile import profile
from bench.gpu.results import Results

KEPT = [part.name for part in PARTS if part.name != "llama-30b"]  # the same as the smaller one


@pytest.mark.full
@pytest.mark.skipif(not SHARED.exists(), reason="HellaSwag is not beside this repository")
def test_a_rehearsal(tmp_path: Path) -> None:
    """Each part ends well and finds something; a second run has nothing left to do."""
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path), "--rehearse", "--minutes", "9", "--only", *KEPT]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # what is measured runs often
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    results = Results(tmp_path / "gpu.jsonl")
    rows = results.rows()
    log = (tmp_path / "gpu.log").read_text()
    assert not [row for row in rows if "error" in row], log
    assert results.done() == set(KEPT), log
    assert all(len([row for row in rows if row["part"] == name]) > 1 for name in KEPT)
    rates = [row for row in rows if row["part"] == "llama-7b"]
    assert all(row["decode_mbu"] > 0 for row in rates if "step_seconds" in row)
    assert any("mfu" in row for row in rates) and any(row.get("kernels") for row in rates)
    assert next(row for row in rows if "tests" in row)["tests"] == {"PASSED": 1}
    again = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert results.rows() == rows and ": " not in again.stdout.splitlines()[0].partition("  ")[0]


@pytest.mark.fast
def test_a_part_that_takes_too_long_is_stopped_and_run_again(tmp_path: Path) -> None:
    from bench.gpu.__main__ import run

    slow: Any = SimpleNamespace(
        name="slow", environment={}, command=lambda *_, **__: ["-c", "import time; print('begun'); time.sleep(60)"]
    )
    results = Results(tmp_path / "gpu.jsonl")
    assert run(slow, results, tmp_path, 1.0, rehearse=True) == "stopped after 1 s"
    assert not results.done() and "begun" in (tmp_path / "gpu.log").read_text()


@pytest.mark.fast
def test_a_profile_counts_what_ran() -> None:
    import jax
    import jax.numpy as jnp

    step = jax.jit(lambda x: jnp.sin(x) @ x)
    x = jnp.ones((300, 300))
    step(x)
    found = profile(lambda: step(x).block_until_ready())
    assert 0 < found["busy_seconds"] <= found["span_seconds"] < 10
    assert found["launches"] == sum(count for _, count, _ in found["kernels"])

"""Logits and greedy continuations are transformers', whole and in chunks, in every layout on every number of devices."""

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layers import layered
from paths import DATA
from tiny import DEFAULTS, Row, Run, random_row, reference, write

from checkpoints.errors import CheckpointError
from checkpoints.hub import resolve
from jaxllm import LLM, SamplingParams

pytestmark = pytest.mark.optimised

TOLERANCE = 1e-4


def model(heads: int, kv_heads: int, hidden: int, **others: Any) -> dict[str, Any]:
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": hidden} | others


BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
MODELS = {
    # hidden sizes divide by none of 2, 3, 4, 8; by 3; by all; by 4; by 2 and 3; by 2, 4, 8
    "1/1": model(1, 1, 25, **TIED, attention_bias=True, vocab_size=53),
    "3/1": model(3, 1, 21, mlp_bias=True, intermediate_size=40, vocab_size=64),
    "3/3": model(3, 3, 24, **TIED),
    "5/1": model(5, 1, 20, **BIASES, intermediate_size=29),
    "6/1": model(6, 1, 30, **TIED, **BIASES, head_dim=4),
    "6/3": model(6, 3, 24, intermediate_size=31, vocab_size=59),
    "9/1": model(9, 1, 36, **TIED, mlp_bias=True, head_dim=6),
    "9/3": model(9, 3, 45, **BIASES, intermediate_size=37),
    "13/1": model(13, 1, 104, **TIED, attention_bias=True, head_dim=4, hidden_act="gelu_pytorch_tanh"),
}
LAYOUTS = [
    *((name, devices) for name in ("tensor", "gathered", "replicated") for devices in (1, 2, 3, 4, 8)),
    ("replicated-2x2", 4),
    ("gathered-2x2", 4),
]
EVERYWHERE = ("9/3", "13/1")
ELSEWHERE = {
    "1/1": [("tensor", 3), ("gathered", 4), ("replicated-2x2", 4)],
    "3/1": [("tensor", 4), ("gathered", 2), ("gathered-2x2", 4)],
    "3/3": [("tensor", 8), ("gathered", 3), ("replicated", 2)],
    "5/1": [("tensor", 2), ("gathered", 8), ("gathered-2x2", 4), ("replicated", 3)],
    "6/1": [("tensor", 4), ("gathered", 4), ("replicated-2x2", 4)],
    "6/3": [("tensor", 4), ("gathered-2x4", 8), ("replicated-4x2", 8)],
    "9/1": [("tensor", 4), ("gathered", 2), ("gathered-3x2", 6)],
}
CASES = [(name, *layout) for name in EVERYWHERE for layout in LAYOUTS]
CASES += [(name, *layout) for name, layouts in ELSEWHERE.items() for layout in layouts]
ALWAYS = [("9/3", *layout) for layout in LAYOUTS if layout[1] == 4]
ALWAYS += [("13/1", "tensor", 3), ("13/1", "gathered", 3), ("13/1", "replicated", 8)]
ALWAYS += [(name, *layouts[0]) for name, layouts in ELSEWHERE.items()]


def run_always(*case: Any) -> bool:
    return case in ALWAYS


def is_fast(*case: Any) -> bool:
    return case in (("9/3", "tensor", 4), ("9/3", "gathered-2x2", 4))


def test_the_cases_cover_what_they_should() -> None:
    assert {name for name, *_ in CASES} == set(MODELS)
    for config in MODELS.values():
        assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert all(sum(one == name for one, *_ in CASES) >= 3 for name in MODELS)
    assert len(CASES) == len(set(CASES))
    values = [DEFAULTS | config for config in MODELS.values()]
    for flag in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        assert {bool(config.get(flag)) for config in values} == {True, False}
    for size in ("intermediate_size", "vocab_size"):
        assert {config[size] % 2 for config in values} == {0, 1}
    for devices in (2, 3, 4, 8):
        assert {config["hidden_size"] % devices == 0 for config in values} == {True, False}


@pytest.mark.parametrize(("name", "layout", "devices"), layered(CASES, run_always, is_fast))
def test_logits_are_those_of_transformers(tmp_path_factory: pytest.TempPathFactory, name: str, layout: str, devices: int) -> None:
    """A prompt in one chunk and a prompt in two, in either order on the data shards, then decode steps of all rows."""
    pytest.importorskip("torch")
    path = write(tmp_path_factory, MODELS[name])
    run = Run(path, layout, devices)
    shapes = [[16, 11], [13]]
    rows = [random_row(i, shapes[(i // 2 + i) % 2], 4, run.config.vocab_size) for i in range(run.rows)]
    assert_equal(run.logits(rows), [reference(path, row) for row in rows])


def assert_equal(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float = TOLERANCE) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.std() > 0.5  # the tolerance is small against what is compared
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)


def test_a_cache_of_several_blocks(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Attention sums over blocks of 256 positions: prompts of three, and decode steps from one block into the next."""
    pytest.importorskip("torch")
    path = write(tmp_path_factory, MODELS["9/3"] | {"max_position_embeddings": 1024})
    run = Run(path, "tensor", 4, chunk=256, length=768)
    rows = [random_row(0, [256, 256, 9], 4, 61), random_row(1, [254], 4, 61)]
    assert_equal(run.logits(rows), [reference(path, row) for row in rows])


# The real model. What transformers says of it is recorded by record_smollm2.py; a few prompts are run again where torch is there.

RECORD: list[dict[str, Any]] = json.loads((DATA / "smollm2_greedy.json").read_text(encoding="utf-8"))
REAL_TOLERANCE = 2e-4


@cache
def smollm2() -> Path:
    try:
        return resolve("smollm2-135m")
    except CheckpointError as error:
        pytest.skip(f"SmolLM2-135M cannot be fetched: {error}")


@pytest.mark.slow
def test_smollm2_continues_as_transformers_does() -> None:
    llm = LLM(smollm2(), layout="tensor", devices=4, dtype="float32", max_model_len=512)
    prompts: list[Any] = [
        line["prompt"] if isinstance(line["prompt"], str) else llm.chat_prompt(line["prompt"]) for line in RECORD
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True))
    assert len(outputs) == 20
    for output, line in zip(outputs, RECORD, strict=True):
        assert output.prompt_token_ids == line["ids"]
        assert output.outputs[0].token_ids == line["tokens"], line["prompt"]


SHORT = [[line["ids"]] for line in RECORD if 2 <= len(line["ids"]) <= 32]


@cache
def smollm2_logits(layout: str, devices: int, data: int) -> list[np.ndarray]:
    run = Run(smollm2(), layout, devices, chunk=32, slots=-(-4 // data))
    rows = [Row(chunks, []) for chunks in SHORT[:4]]
    return run.logits([rows[i % 4] for i in range(run.rows)])[:4]


LAYOUTS_OF_SMOLLM2 = [
    *(("tensor", n, 1) for n in (2, 3, 4)),
    *((name, n, n) for n in (2, 3, 4) for name in ("gathered", "replicated")),
    ("replicated-2x2", 4, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "devices", "data"),
    layered(LAYOUTS_OF_SMOLLM2, lambda name, devices, data: (name, devices) == ("tensor", 4)),
)
def test_layouts_agree_on_smollm2(layout: str, devices: int, data: int) -> None:
    assert_equal(smollm2_logits(layout, devices, data), smollm2_logits("tensor", 1, 1))


@pytest.mark.slow
def test_smollm2_gives_the_recorded_logits() -> None:
    for logits, chunks in zip(smollm2_logits("tensor", 1, 1), SHORT, strict=False):
        (line,) = [line for line in RECORD if [line["ids"]] == chunks]
        ids, expected = [int(token) for token in line["top"]], list(line["top"].values())
        np.testing.assert_allclose(logits[-1][ids], expected, atol=REAL_TOLERANCE, rtol=0)
        assert np.argsort(-logits[-1])[0] == ids[0] == line["tokens"][0]


@pytest.mark.full  # what transformers says is recorded, see above
@pytest.mark.slow
def test_smollm2_gives_transformers_logits_live() -> None:
    """Every position of a short prompt, a conversation and a long one in chunks, and the recorded continuation token by token."""
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    path = smollm2()
    lines = [RECORD[0], RECORD[16], RECORD[18]]
    cuts = [[*range(0, len(line["ids"]), 64), len(line["ids"])] for line in lines]
    chunks = [[line["ids"][a:b] for a, b in pairwise(cut)] for line, cut in zip(lines, cuts, strict=True)]
    rows = [Row(pieces, line["tokens"][:16]) for pieces, line in zip(chunks, lines, strict=True)]
    expected = [reference(path, row) for row in rows]
    for logits, line in zip(expected, lines, strict=True):
        assert logits[len(line["ids"]) - 1 :].argmax(-1).tolist() == line["tokens"][:17]
    run = Run(path, "tensor", 4, chunk=64, slots=3, length=512)
    assert_equal(run.logits(rows), expected, REAL_TOLERANCE)

"""Every family answers as transformers does, in every layout, generating and scoring, through a conversion and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from families import CASES, CONTEXT, CONTINUATIONS, LONG, NEW, RECORDED, ROWS, records, write
from layers import layered
from record_families import load as load_in_transformers
from record_families import record, recorded_logits
from tiny import Run

from checkpoints.checkpoint import open_checkpoint
from checkpoints.convert import convert, prepare
from checkpoints.families import FAMILIES
from checkpoints.parameters import names_of_parameters
from checkpoints.verify import compare
from jaxllm import LLM, SamplingParams

TOLERANCE = 1e-4
LAYOUTS = [("tensor", 1), ("tensor", 3), ("tensor", 4), ("gathered", 3), ("gathered", 4), ("replicated", 3), ("replicated", 4)]
FIRST = [name for name in CASES if " " not in name]  # of each family; the others differ in flags
# Three layouts always for those that have every mechanism between them, one for the others, whose answers have another.
MECHANISMS = ("llama", "gemma3_text", "qwen3_moe", "gpt2")
# Those between whose scoring and pages everything differs that does: the others' logits are compared all the same.
SCORED = (*MECHANISMS, "gemma2", "mixtral", "phi3", "smollm3", "opt", "gpt_neox", "qwen2_moe")
THREE = [("tensor", 4), ("gathered", 4), ("replicated", 3)]
ONE = [("gathered", 4)]
ALONE = ("tensor", 1)  # as a GPU runs them, see `bench/gpu/exactness.py`
RUNS = [(name, *layout) for name in CASES for layout in (LAYOUTS if name in FIRST else [ALONE, *ONE])]
GENERATED = [(name, *layout) for name in CASES for layout in (("tensor", 3), ALONE)] + [
    (name, *layout) for name in FIRST for layout in (("gathered", 4), ("replicated", 3))
]


def run_always(name: str, layout: str, devices: int) -> bool:
    return (layout, devices) in (THREE if name in MECHANISMS else ONE)


def generated_always(name: str, layout: str, devices: int) -> bool:
    return (layout, devices) != ALONE and name in SCORED and layout == "tensor"


def is_fast(name: str, layout: str, devices: int) -> bool:
    # Of plain LLaMA `decoder/test_model.py` has as much.
    return name in MECHANISMS and name != "llama" and (layout, devices) == ("gathered", 4)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: write(root / name.replace(" ", "-"), one.config, one.shapes) for name, one in records().items()}


def test_every_family_is_here() -> None:
    assert {values["model_type"] for values in CASES.values()} == set(FAMILIES) == set(FIRST)
    assert set(records()) == set(CASES)
    configs = [one.config for one in records().values()]
    for family in FAMILIES:
        tied = {config["tie_word_embeddings"] for config in configs if config["model_type"] == family}
        assert tied == {True, False} or family == "llama"  # whose are in test_model


@pytest.mark.parametrize(("name", "layout", "devices"), layered(RUNS, run_always, is_fast))
def test_logits_are_those_of_transformers(folders: dict[str, Path], name: str, layout: str, devices: int) -> None:
    """Prompts in one chunk and in two, then decode steps, across windows of 7."""
    run = Run(folders[name], layout, devices)
    found = run.logits([ROWS[(i // 2 + i) % 2] for i in range(run.rows)])
    for i, logits in enumerate(found):
        which = (i // 2 + i) % 2
        np.testing.assert_allclose(logits[RECORDED[which]], records()[name].logits[which], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "layout", "devices"), layered(GENERATED, generated_always))
def test_generated_and_scored_as_by_transformers(folders: dict[str, Path], name: str, layout: str, devices: int) -> None:
    """Greedily through a prompt and over the edge of a block of the cache; continuations in trees that share a context."""
    llm = LLM(folders[name], layout=layout, devices=devices, max_model_len=256, max_num_seqs=2)
    (output,) = llm.generate(LONG, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True))
    assert output.outputs[0].token_ids == records()[name].greedy
    (scores,) = llm.score([(CONTEXT, CONTINUATIONS)])
    np.testing.assert_allclose([one.logprob for one in scores], records()[name].scores, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_round_trip_through_orbax(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    source = open_checkpoint(folders[name])
    convert(prepare(source, tmp_path / "orbax", to="orbax"))
    convert(prepare(open_checkpoint(tmp_path / "orbax"), tmp_path / "back"))
    back = open_checkpoint(tmp_path / "back")
    assert {n: info.shape for n, info in back.source.tensors.items()} == {n: i.shape for n, i in source.source.tensors.items()}
    compared = list(compare(source, back))
    assert {one.parameter for one in compared} == set(names_of_parameters(source.config))
    assert all(one.equal for one in compared)


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_counted(folders: dict[str, Path], name: str) -> None:
    one = records()[name]
    assert open_checkpoint(folders[name]).config.num_params == sum(int(np.prod(shape)) for shape in one.shapes.values())


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_what_is_recorded_is_what_transformers_says(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Asked again; and it loads what a round trip wrote, to the same logits."""
    pytest.importorskip("torch")
    again = record(CASES[name], tmp_path / "fresh")
    assert json.loads(json.dumps(again.config)) == records()[name].config
    assert (again.shapes, again.greedy) == (records()[name].shapes, records()[name].greedy)
    for ours, theirs in zip(again.logits, records()[name].logits, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
    np.testing.assert_allclose(again.scores, records()[name].scores, atol=1e-5, rtol=0)
    convert(prepare(open_checkpoint(folders[name]), tmp_path / "orbax", to="orbax"))
    convert(prepare(open_checkpoint(tmp_path / "orbax"), tmp_path / "back"))
    for ours, theirs in zip(recorded_logits(load_in_transformers(tmp_path / "back")), again.logits, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)  # torch adds in an order that addresses decide

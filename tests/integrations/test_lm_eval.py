"""lm-eval reports of jaxllm what it reports of its own `hf` model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from tiny_checkpoint import write_tiny, write_tokenizer

from jaxllm.commands.cli import main
from jaxllm.evaluation.delimiter import delimiter_for
from jaxllm.evaluation.multiple_choice import Question, accuracy
from jaxllm.evaluation.results import Answer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")
pytest.importorskip("torch", reason="lm-eval's own model needs torch: pip install -e '.[reference]'")

TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: "{{gold}}"
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "answer": """
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


LINES: list[dict[str, Any]] = [
    {
        "query": f"question {i % 3} ",
        "choices": ["one", "two", f"{i} or more"],
        "gold": i % 3,
        "text": f"a text of {i} words " * 9,
    }
    for i in range(9)
]


def write_tasks(folder: Path, tasks: dict[str, str], lines: list[dict[str, Any]]) -> Path:
    """Tasks by name, over these lines of data.jsonl."""
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, body in tasks.items():
        where = f"dataset_path: json\ndataset_kwargs: {{data_files: {{validation: {folder / 'data.jsonl'}}}}}\n"
        where += "validation_split: validation\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{where}{body}metadata: {{version: 1.0}}\n")
    return folder


def evaluate(tasks: Path, output: Path, *arguments: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """lm-eval in a process of its own -> its results by task, and its samples by task."""
    names = [file.stem for file in tasks.glob("*.yaml")]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(output / "home"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", *arguments, "--include_path", str(tasks), "--tasks", ",".join(names), "--log_samples"]
    done = subprocess.run([*command, "--output_path", str(output)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = output.glob("**/results*.json")
    samples = {}
    for name in names:
        [file] = output.glob(f"**/samples_{name}_*.jsonl")
        samples[name] = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return json.loads(results.read_text())["results"], samples


# What commands for `hf` hold too, and what they do not.
OF_HF = ",trust_remote_code=True,parallelize=True,device_map=auto,max_batch_size=8,enable_thinking=False,virtual_devices=2"
HF = ("lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "4")


@pytest.mark.slow
def test_lm_eval_reports_what_it_reports_of_hf(tmp_path: Path) -> None:
    # A context of 64: the rolling windows of longer texts are several.
    sizes = {"vocab_size": 258, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 257}
    model = write_tokenizer(write_tiny(tmp_path / "model", **sizes))
    tasks = write_tasks(tmp_path, TASKS, LINES)
    args = f"pretrained={model},dtype=auto"
    ours, our_samples = evaluate(
        tasks, tmp_path / "ours", "jaxllm.integrations.lm_eval", "--model", "jaxllm", "--model_args", args + OF_HF
    )
    theirs, their_samples = evaluate(tasks, tmp_path / "theirs", *HF, "--model_args", args)
    assert set(ours) == set(TASKS)
    for task in TASKS:
        for metric, value in theirs[task].items():
            assert ours[task][metric] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), (task, metric)
    for task in TASKS:
        for mine, other in zip(our_samples[task], their_samples[task], strict=True):
            assert same(mine["resps"], other["resps"]), (mine, other)


def same(mine: Any, other: Any) -> bool:
    """Equal, numbers within 1e-3 of each other; lm-eval writes some of them as texts."""
    if isinstance(mine, list):
        return len(mine) == len(other) and all(map(same, mine, other))
    try:
        return float(mine) == pytest.approx(float(other), abs=1e-3)
    except ValueError:
        return bool(mine == other)


def test_lm_eval_finds_the_model_where_it_reads_entry_points() -> None:
    from lm_eval.api.registry import Registry

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    registry = Registry("model")
    for name, value in declared["lm_eval.models"].items():
        registry.register(name, target=EntryPoint(name, value, "lm_eval.models"))
    assert registry.get("jaxllm").__name__ == "JaxLM"


# A file in lm-eval's own form, one with bare letters, queries that are empty or end in white space, and scripts without spaces.
JOINTS: list[dict[str, Any]] = [
    {"query": query, "choices": choices, "gold": i % 2}
    for i, (query, choices) in enumerate(
        (query, choices)
        for query in ("Is it so? Answer:", "Is it so? ", "So it is\n", "", "\u9996\u90fd\u662f")
        for choices in (["A", "B"], [" A", " Bcd"], ["\u5317\u4eac", "\u6771\u4eac\u90fd", " \u4eac"], [" mixed", "forms"])
    )
]
DELIMITERS = {"space": " ", "bare": "", "line": "\n"}


@pytest.mark.slow
def test_score_puts_before_choices_what_lm_eval_does(tmp_path: Path) -> None:
    sizes = {"vocab_size": 258, "max_position_embeddings": 128, "bos_token_id": 256, "eos_token_id": 257}
    model = write_tokenizer(write_tiny(tmp_path / "model", **sizes))
    bodies = {name: f"{TASKS['choice']}target_delimiter: {json.dumps(text)}\n" for name, text in DELIMITERS.items()}
    tasks = write_tasks(tmp_path, bodies, JOINTS)
    _, samples = evaluate(tasks, tmp_path / "theirs", *HF, "--model_args", f"pretrained={model},dtype=float32")
    theirs = {
        DELIMITERS[name]: [[float(logprob) for [[logprob, _]] in sample["resps"]] for sample in found]
        for name, found in samples.items()
    }
    for name, text in DELIMITERS.items():
        ours = scored(model, tasks / "data.jsonl", tmp_path / name, "--delimiter", text)
        assert_close(ours, theirs[text])
        for i, sample in enumerate(samples[name]):
            question = Question(JOINTS[i]["query"], tuple(JOINTS[i]["choices"]), JOINTS[i]["gold"], "")
            found = accuracy([question], [Answer(0, ours[i], 0)])
            assert (found.acc, found.acc_norm) == (sample["acc"], sample["acc_norm"])
    picked = [[delimiter_for(line["query"], choice, None) for choice in line["choices"]] for line in JOINTS]
    expected = [[theirs[text][i][j] for j, text in enumerate(texts)] for i, texts in enumerate(picked)]
    assert_close(scored(model, tasks / "data.jsonl", tmp_path / "default"), expected)


def scored(model: Path, file: Path, output: Path, *options: str) -> list[list[float]]:
    """Log-probabilities that `jaxllm score` keeps, by question."""
    assert main(["score", str(model), str(file), "--output", str(output), "--devices", "1", *options]) == 0
    _, *lines = map(json.loads, output.read_text().splitlines())
    return [line["logprobs"] for line in sorted(lines, key=lambda line: line["index"])]


def assert_close(ours: list[list[float]], theirs: list[list[float]]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, abs=1e-4)

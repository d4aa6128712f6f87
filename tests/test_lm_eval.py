"""lm-eval reports of jaxllm what it reports of its own `hf` model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import write_tiny, write_tokenizer

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


def write_tasks(folder: Path) -> Path:
    lines = [
        {
            "query": f"question {i % 3} ",
            "choices": ["one", "two", f"{i} or more"],
            "gold": i % 3,
            "text": f"a text of {i} words " * 9,
        }
        for i in range(9)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, body in TASKS.items():
        where = f"dataset_path: json\ndataset_kwargs: {{data_files: {{validation: {folder / 'data.jsonl'}}}}}\n"
        where += "validation_split: validation\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{where}{body}metadata: {{version: 1.0}}\n")
    return folder


def evaluate(tasks: Path, output: Path, *arguments: str) -> tuple[dict[str, Any], list[Any]]:
    """lm-eval in a process of its own -> its results by task, and the answers it had of the model."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(output / "home"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", *arguments, "--include_path", str(tasks), "--tasks", ",".join(TASKS), "--log_samples"]
    done = subprocess.run([*command, "--output_path", str(output)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = output.glob("**/results*.json")
    samples = [json.loads(line) for file in sorted(output.glob("**/samples*.jsonl")) for line in file.read_text().splitlines()]
    return json.loads(results.read_text())["results"], [sample["resps"] for sample in samples]


@pytest.mark.slow
def test_lm_eval_reports_what_it_reports_of_hf(tmp_path: Path) -> None:
    # A context of 64: the rolling windows of longer texts are several.
    sizes = {"vocab_size": 258, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 257}
    model = write_tokenizer(write_tiny(tmp_path / "model", **sizes))
    tasks = write_tasks(tmp_path)
    args = f"pretrained={model},dtype=float32"
    ours, our_answers = evaluate(
        tasks, tmp_path / "ours", "jaxllm.integrations.lm_eval", "--model", "jaxllm", "--model_args", args + ",virtual_devices=2"
    )
    theirs, their_answers = evaluate(
        tasks, tmp_path / "theirs", "lm_eval", "--model", "hf", "--model_args", args, "--device", "cpu", "--batch_size", "4"
    )
    assert set(ours) == set(TASKS)
    for task in TASKS:
        for metric, value in theirs[task].items():
            assert ours[task][metric] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), (task, metric)
    for mine, other in zip(our_answers, their_answers, strict=True):
        assert same(mine, other), (mine, other)


def same(mine: Any, other: Any) -> bool:
    """Equal, numbers within 1e-3 of each other; lm-eval writes some of them as texts."""
    if isinstance(mine, list):
        return len(mine) == len(other) and all(map(same, mine, other))
    try:
        return float(mine) == pytest.approx(float(other), abs=1e-3)
    except ValueError:
        return bool(mine == other)

"""Published configs are accepted or refused, with the reason; those accepted give transformers' tokens."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from published_configs import ACCEPTED, REFUSED
from tiny import random_row, randomise

from checkpoints.checkpoint import open_checkpoint, read_config
from checkpoints.errors import CheckpointError
from jaxllm import LLM, SamplingParams
from jaxllm.config import ModelConfig

PROMPT = random_row(0, [20], 0, 96).prompt
NEW = 12
# Their models differ from another row's in numbers alone: the base of the rope, epsilons, heads, a tied head.
VARIANTS = {
    "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.2-1B", "transformers 5's own",
    "togethercomputer/LLaMA-2-7B-32K", "codellama/CodeLlama-7b-hf", "TinyLlama-1.1B-Chat-v1.0", "HuggingFaceTB/SmolLM2-135M",
    "deepseek-ai/deepseek-coder-6.7b-base", "01-ai/Yi-6B", "01-ai/Yi-1.5-9B-Chat", "unsloth/llama-3-8b",
    "mistralai/Mistral-7B-Instruct-v0.2", "mistralai/Mistral-Nemo-Base-2407", "mistralai/Mistral-Small-24B",
    "openchat/openchat-3.5", "NousResearch/Yarn-Mistral-7b-128k", "Qwen/Qwen2-7B-Instruct",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "Qwen/Qwen3-8B", "Qwen/Qwen2-57B-A14B", "google/gemma-1.1-7b-it",
    "microsoft/Phi-3-mini-128k-instruct", "microsoft/phi-4", "stabilityai/stablelm-base-alpha-3b",
}  # fmt: skip
# Every third runs always: of most families one does.
RUN = [pytest.param(name, marks=pytest.mark.full if name in VARIANTS or i % 3 else ()) for i, name in enumerate(ACCEPTED)]


@pytest.fixture(scope="module")
def answers() -> dict[ModelConfig, list[int]]:
    """Tokens of each model that was run: rows whose configs say the same have the same weights, too."""
    return {}


@pytest.mark.parametrize("name", RUN)
def test_accepted_configs_give_transformers_tokens(name: str, tmp_path: Path, answers: dict[ModelConfig, list[int]]) -> None:
    pytest.importorskip("torch")
    (tmp_path / "config.json").write_text(json.dumps(ACCEPTED[name]))
    model = _transformers_model(tmp_path)
    config = replace(open_checkpoint(tmp_path).config, dtype="float32", max_position=64, bos_token_id=None, eos_token_ids=())
    if config not in answers:
        llm = LLM(tmp_path, layout="tensor", devices=1, dtype="float32", max_model_len=64, max_num_seqs=1)
        (output,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True))
        answers[config] = output.outputs[0].token_ids
    assert answers[config] == _greedy(model)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variants_are_accepted(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ACCEPTED[name]))
    assert read_config(tmp_path).num_layers == 2


def _transformers_model(folder: Path) -> Any:
    """As its own class makes it of the config in `folder`, which gets its random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    randomise(model)
    model.save_pretrained(folder / "saved")
    shutil.move(folder / "saved" / "model.safetensors", folder / "model.safetensors")
    if any(hasattr(config, key) for key in ("num_experts", "num_local_experts")):
        model.set_experts_implementation("eager")  # grouped products want sizes of multiples of four
    return model


def _greedy(model: Any) -> list[int]:
    import torch

    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(NEW):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_configs_say_why(name: str, tmp_path: Path) -> None:
    config, reason = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/config\.json: .*{reason}") as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)

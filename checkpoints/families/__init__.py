"""The known families, by the name their files give: one entry for Hugging Face's, one for GGUF's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from checkpoints.config_reader import ConfigReader
from checkpoints.errors import CheckpointError
from checkpoints.families import (
    gemma,
    gemma2,
    gemma3,
    gguf_llama,
    gpt2,
    gpt_neox,
    granite,
    llama,
    meta_llama,
    ministral,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    opt,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
    starcoder2,
)
from checkpoints.families.judge import judge
from checkpoints.families.limits import limited
from checkpoints.families.refusal import refuse_quantised, refuse_unknown
from checkpoints.gguf import GGUFSource
from checkpoints.meta import MetaSource
from checkpoints.names import Rules
from jaxllm.config import ModelConfig


class Family(NamedTuple):
    """A Hugging Face family: reader of config.json, rules of its tensors, writer of the config where other formats have it."""

    read_config: Callable[[ConfigReader], ModelConfig]
    rules: Rules
    write_config: Callable[[ModelConfig], dict[str, Any]] | None = None


class GGUFFamily(NamedTuple):
    """A family of GGUF files: reader of the metadata, rules of the tensors."""

    read_config: Callable[[GGUFSource], ModelConfig]
    rules: Rules


FAMILIES = {
    "gemma": Family(gemma.read_config, gemma.RULES),
    "gemma2": Family(gemma2.read_config, gemma2.RULES),
    "gemma3_text": Family(gemma3.read_config, gemma3.RULES),
    "gpt2": Family(gpt2.read_config, gpt2.RULES),
    "gpt_neox": Family(gpt_neox.read_config, gpt_neox.RULES),
    "granite": Family(granite.read_config, granite.RULES),
    "llama": Family(llama.read_config, llama.RULES, llama.write_config),
    "ministral": Family(ministral.read_config, ministral.RULES),
    "mistral": Family(mistral.read_config, mistral.RULES),
    "mixtral": Family(mixtral.read_config, mixtral.RULES),
    "olmo2": Family(olmo2.read_config, olmo2.RULES),
    "olmo3": Family(olmo3.read_config, olmo3.RULES),
    "opt": Family(opt.read_config, opt.RULES),
    "phi3": Family(phi3.read_config, phi3.RULES),
    "qwen2": Family(qwen2.read_config, qwen2.RULES),
    "qwen2_moe": Family(qwen2_moe.read_config, qwen2_moe.RULES),
    "qwen3": Family(qwen3.read_config, qwen3.RULES),
    "qwen3_moe": Family(qwen3_moe.read_config, qwen3_moe.RULES),
    "smollm3": Family(smollm3.read_config, smollm3.RULES),
    "starcoder2": Family(starcoder2.read_config, starcoder2.RULES),
}
GGUF_FAMILIES = {"llama": GGUFFamily(gguf_llama.read_config, gguf_llama.RULES)}


def read_hf(values: dict[str, Any], where: str) -> tuple[str, ModelConfig, Rules]:
    """config.json -> the family's name, the model's architecture and its tensor names. Raises CheckpointError."""
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        refuse_unknown(values, where, sorted(FAMILIES))
    refuse_quantised(values, where)
    reader = ConfigReader(values, where)
    try:
        config = limited(reader, FAMILIES[name].read_config(reader))
        judge(reader, name)
        return name, config, FAMILIES[name].rules
    except ValueError as error:
        raise _located(error, where) from error


def read_gguf(source: GGUFSource) -> tuple[str, ModelConfig, Rules]:
    """A GGUF file -> the name of the family, the model's architecture and its tensor names. Raises CheckpointError."""
    name = source.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in GGUF_FAMILIES:
        known = ", ".join(sorted(GGUF_FAMILIES))
        raise CheckpointError(
            f"{source.where}: architecture {name!r} is not supported in GGUF; there are: {known}; use the model's safetensors"
        )
    try:
        return name, GGUF_FAMILIES[name].read_config(source), GGUF_FAMILIES[name].rules
    except ValueError as error:
        raise _located(error, source.where) from error


def read_meta(source: MetaSource) -> tuple[str, ModelConfig, Rules]:
    """A folder of Meta's, which is LLaMA always -> the same. Raises CheckpointError."""
    try:
        return "llama", meta_llama.read_config(source), meta_llama.RULES
    except ValueError as error:
        raise _located(error, source.where) from error


def _located(error: ValueError, where: str) -> CheckpointError:
    """ModelConfig refuses impossible sizes; say in which file they are."""
    return error if isinstance(error, CheckpointError) else CheckpointError(f"{where}: {error}; correct the config")

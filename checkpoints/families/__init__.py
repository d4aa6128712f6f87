"""The known families, by the name their files give: one entry for Hugging Face's, one for GGUF's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from checkpoints.errors import CheckpointError
from checkpoints.families import gguf_llama, llama, meta_llama
from checkpoints.gguf import GGUFSource
from checkpoints.meta import MetaSource
from checkpoints.names import Rules
from jaxllm.config import ModelConfig


class Family(NamedTuple):
    """How a Hugging Face config.json is read and written, and the names of its tensors."""

    read_config: Callable[[dict[str, Any], str], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    rules: Rules


class GGUFFamily(NamedTuple):
    """How a GGUF file's metadata is read, and the names of its tensors."""

    read_config: Callable[[GGUFSource], ModelConfig]
    rules: Rules


FAMILIES = {"llama": Family(llama.read_config, llama.write_config, llama.RULES)}
GGUF_FAMILIES = {"llama": GGUFFamily(gguf_llama.read_config, gguf_llama.RULES)}


def read_hf(values: dict[str, Any], where: str) -> tuple[str, ModelConfig, Rules]:
    """config.json -> the family's name, the model's architecture and its tensor names. Raises CheckpointError."""
    name = _known(FAMILIES, values.get("model_type"), where)
    try:
        return name, FAMILIES[name].read_config(values, where), FAMILIES[name].rules
    except ValueError as error:
        raise _located(error, where) from error


def read_gguf(source: GGUFSource) -> tuple[str, ModelConfig, Rules]:
    """A GGUF file -> the name of the family, the model's architecture and its tensor names. Raises CheckpointError."""
    name = _known(GGUF_FAMILIES, source.metadata.get("general.architecture"), source.where)
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


def _known(families: Mapping[str, object], name: Any, where: str) -> str:
    if not isinstance(name, str) or name not in families:
        known = ", ".join(sorted(families))
        raise CheckpointError(f"{where}: architecture {name!r} is not supported; there are: {known}; convert to one of them")
    return name


def _located(error: ValueError, where: str) -> CheckpointError:
    """ModelConfig refuses impossible sizes; say in which file they are."""
    return error if isinstance(error, CheckpointError) else CheckpointError(f"{where}: {error}; correct the config")

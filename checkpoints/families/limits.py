"""Keys that no decoder here follows, and the lengths of rows up to which they make no difference."""

from __future__ import annotations

import logging
from dataclasses import replace

from checkpoints.config_reader import ConfigReader
from checkpoints.errors import CheckpointError
from jaxllm.config import ModelConfig

_log = logging.getLogger("jaxllm")


def limited(reader: ConfigReader, config: ModelConfig) -> ModelConfig:
    """The model up to where the first of these keys begins to matter, which is said in one line.

    A window or a chunk that a family's reader has not taken is one that transformers' class does not define and its cache obeys.
    """
    lengths = {
        "sliding_window": reader.nullable_size("sliding_window"),
        "attention_chunk_size": reader.nullable_size("attention_chunk_size"),
        "dual_chunk_attention_config": _read_dual_chunks(reader),
    }
    for key, length in lengths.items():
        if length is not None and length < config.max_position:
            _log.warning(
                "%s: `%s` begins to matter beyond %d tokens, and is not supported: the model opens for %d in place of %d",
                reader.where, key, length, length, config.max_position,
            )  # fmt: skip
            config = replace(config, max_position=length)
    return config


def _read_dual_chunks(reader: ConfigReader) -> int | None:
    """Within the first chunk, less what is local, all distances are as they are (An et al. 2024); beyond the original context
    queries are scaled as well. Defaults are those of vLLM."""
    values = reader.optional("dual_chunk_attention_config", dict)
    if values is None:
        return None
    chunks = reader.part(values, "dual_chunk_attention_config")
    length = chunks.size("chunk_size", 8192) - chunks.size("local_size", 1024)
    length = min(length, chunks.optional("original_max_position_embeddings", int) or length)
    if length < 1:
        raise CheckpointError(f"{chunks.where}: its chunks leave {length} tokens; correct it, or set it to null")
    chunks.leave_unread("dual_chunk_attention_config")
    return length

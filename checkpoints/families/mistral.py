"""Mistral: LLaMA with a sliding window, `MistralForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.hf_common import read_decoder
from checkpoints.families.rope import read_rope
from jaxllm.config import ModelConfig

RULES = tables.table(*tables.NORMS_BEFORE, *tables.ATTENTION, *tables.MLP)


def read_config(reader: ConfigReader) -> ModelConfig:
    """Without the key `sliding_window` it is 4096, as in the first release; null is none."""
    shared = read_decoder(reader, positions=131072, kv_heads=8, bos=1, eos=2)
    window = reader.nullable_size("sliding_window", 4096)
    return ModelConfig(**shared, rope=read_rope(reader, shared["max_position"]), windows=(window,))

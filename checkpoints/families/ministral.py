"""Ministral: Mistral with a window in some layers, `MinistralForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.hf_common import read_decoder, read_windows
from checkpoints.families.rope import read_rope
from jaxllm.config import ModelConfig

RULES = tables.table(*tables.NORMS_BEFORE, *tables.ATTENTION, *tables.MLP)


def read_config(reader: ConfigReader) -> ModelConfig:
    shared = read_decoder(reader, positions=131072, kv_heads=8, bos=1, eos=2)
    window = reader.nullable_size("sliding_window", 4096)
    windows = read_windows(reader, shared["num_layers"], window, lambda i: window is not None)
    return ModelConfig(**shared, rope=read_rope(reader, shared["max_position"]), windows=windows)

"""Qwen3: LLaMA with a norm on each query and key head, `Qwen3ForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.hf_common import read_decoder
from checkpoints.families.qwen2 import read_late_windows
from checkpoints.families.rope import read_rope
from jaxllm.config import ModelConfig

RULES = tables.table(*tables.NORMS_BEFORE, *tables.ATTENTION, *tables.HEAD_NORMS, *tables.MLP)


def read_config(reader: ConfigReader) -> ModelConfig:
    shared = read_decoder(reader, positions=32768, kv_heads=32, head_dim=128)
    bias = reader.take("attention_bias", False)
    return ModelConfig(
        **shared,
        rope=read_rope(reader, shared["max_position"]),
        windows=read_late_windows(reader, shared["num_layers"]),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
    )

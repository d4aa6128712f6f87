"""Qwen2 and Qwen2.5: LLaMA with biases on queries, keys and values, `Qwen2ForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.hf_common import Windows, read_decoder, read_windows
from checkpoints.families.rope import read_rope
from jaxllm.config import ModelConfig

RULES = tables.table(*tables.NORMS_BEFORE, *tables.ATTENTION, *tables.MLP)


def read_config(reader: ConfigReader) -> ModelConfig:
    shared = read_decoder(reader, positions=32768, kv_heads=32)
    reader.ignore("attention_bias", "use_mrope")
    rope, windows = read_rope(reader, shared["max_position"]), read_late_windows(reader, shared["num_layers"])
    return ModelConfig(**shared, rope=rope, windows=windows, qkv_bias=True)


def read_late_windows(reader: ConfigReader, num_layers: int) -> Windows:
    """With `use_sliding_window` the layers from `max_window_layers` on slide, or those that `layer_types` says."""
    used = reader.take("use_sliding_window", False)
    window = reader.nullable_size("sliding_window", 4096)
    first = reader.take("max_window_layers", 28)
    window = window if used else None
    return read_windows(reader, num_layers, window, lambda i: window is not None and i >= first)

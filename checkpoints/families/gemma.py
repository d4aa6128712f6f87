"""Gemma 1: scaled embeddings, norms whose scale is stored less one, `GemmaForCausalLM`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.hf_common import read_decoder
from checkpoints.families.rope import read_rope
from jaxllm.config import ModelConfig

RULES = tables.table(*tables.NORMS_BEFORE, *tables.ATTENTION, *tables.MLP)


def read_config(reader: ConfigReader) -> ModelConfig:
    reader.ignore("hidden_activation")  # written by some, read by none
    shared = read_shared(reader, 8192, 16, "hidden_act")
    config = ModelConfig(**shared, rope=read_rope(reader, shared["max_position"]))
    # Exact GELU is what the first files said, and never what the model was.
    return replace(config, activation="gelu_tanh") if config.activation == "gelu" else config


def read_shared(reader: ConfigReader, positions: int, kv_heads: int, activation_key: str) -> dict[str, Any]:
    """The fields of `ModelConfig` that all Gemmas share."""
    options: dict[str, Any] = {"head_dim": 256, "activation_key": activation_key, "activation": "gelu_pytorch_tanh"}
    shared = read_decoder(reader, positions=positions, kv_heads=kv_heads, tied=True, bos=2, eos=1, **options)
    reader.default("use_bidirectional_attention", None, False)
    bias = reader.take("attention_bias", False)
    return shared | {
        "qkv_bias": bias,
        "out_bias": bias,
        "norm": "rms_float32",
        "norm_offset": 1.0,
        "embedding_scale": shared["hidden_size"] ** 0.5,
    }

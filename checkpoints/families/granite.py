"""Granite 3: LLaMA with multipliers, `GraniteForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.hf_common import read_decoder
from checkpoints.families.rope import read_rope
from jaxllm.config import ModelConfig

RULES = tables.table(*tables.NORMS_BEFORE, *tables.ATTENTION, *tables.MLP)


def read_config(reader: ConfigReader) -> ModelConfig:
    shared = read_decoder(reader, positions=2048, bos=1, eos=2)
    bias = reader.take("attention_bias", False)
    return ModelConfig(
        **shared,
        rope=read_rope(reader, shared["max_position"]),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=reader.take("mlp_bias", False),
        embedding_scale=reader.take("embedding_multiplier", 1.0),
        attention_scale=reader.take("attention_multiplier", 1.0),
        residual_scale=reader.take("residual_multiplier", 1.0),
        logit_scale=1 / reader.above_zero("logits_scaling", 1.0),
    )

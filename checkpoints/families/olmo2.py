"""OLMo 2: norms after each half and of all query and key heads together, `Olmo2ForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.hf_common import read_decoder
from checkpoints.families.rope import read_rope
from checkpoints.names import Rule
from jaxllm.config import ModelConfig

RULES = tables.table(
    Rule.of(tables.LAYER + "post_attention_layernorm.weight", "d -> d", "blocks.{i}.attention_post_norm.scale"),
    Rule.of(tables.LAYER + "post_feedforward_layernorm.weight", "d -> d", "blocks.{i}.mlp_post_norm.scale"),
    *tables.ATTENTION,
    Rule.of(tables.LAYER + "self_attn.q_norm.weight", "(n h) -> (n h)", "blocks.{i}.attention.query_norm.scale"),
    Rule.of(tables.LAYER + "self_attn.k_norm.weight", "(k h) -> (k h)", "blocks.{i}.attention.key_norm.scale"),
    *tables.MLP,
)


def read_config(reader: ConfigReader) -> ModelConfig:
    shared = read_decoder(reader, positions=2048, eps=1e-5, eos=50279)
    bias = reader.take("attention_bias", False)
    rope = read_rope(reader, shared["max_position"])
    return ModelConfig(**shared, rope=rope, qkv_bias=bias, out_bias=bias, norm="rms_float32", norm_place="after", qk_norm="all")

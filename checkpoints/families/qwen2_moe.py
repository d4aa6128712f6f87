"""Qwen1.5 and Qwen2 with experts, and one that all tokens share, `Qwen2MoeForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.hf_common import read_decoder, read_windows
from checkpoints.families.qwen3_moe import read_routed
from checkpoints.families.rope import read_rope
from jaxllm.config import Experts, ModelConfig

RULES = tables.table(*tables.NORMS_BEFORE, *tables.ATTENTION, *tables.MLP, *tables.EXPERTS, *tables.SHARED_EXPERT)


def read_config(reader: ConfigReader) -> ModelConfig:
    """With `use_sliding_window` every other layer slides, up to `max_window_layers`."""
    shared = read_decoder(reader, positions=32768, kv_heads=16)
    layers = shared["num_layers"]
    used = reader.take("use_sliding_window", False)
    window = reader.nullable_size("sliding_window", 4096) if used else None
    reader.optional("sliding_window", int)  # written as 0 where it is not used
    last = reader.take("max_window_layers", 28)
    reader.ignore("attention_bias")
    experts = Experts(
        count=reader.size("num_experts", 60),
        top_k=reader.size("num_experts_per_tok", 4),
        size=reader.size("moe_intermediate_size"),
        normalised=reader.take("norm_topk_prob", False),
        shared_size=reader.size("shared_expert_intermediate_size"),
    )
    return ModelConfig(
        **shared,
        rope=read_rope(reader, shared["max_position"]),
        windows=read_windows(reader, layers, window, lambda i: used and i % 2 == 0 and i < last),
        qkv_bias=reader.take("qkv_bias", True),
        experts=experts,
        routed=read_routed(reader, layers),
    )

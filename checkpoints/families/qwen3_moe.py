"""Qwen3 with experts in some layers, `Qwen3MoeForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.hf_common import read_decoder, repeated
from checkpoints.families.rope import read_rope
from jaxllm.config import Experts, ModelConfig

RULES = tables.table(*tables.NORMS_BEFORE, *tables.ATTENTION, *tables.HEAD_NORMS, *tables.MLP, *tables.EXPERTS)


def read_config(reader: ConfigReader) -> ModelConfig:
    """All layers slide or none: `max_window_layers` is written and not read."""
    shared = read_decoder(reader, positions=32768, kv_heads=4)
    bias = reader.take("attention_bias", False)
    window = reader.nullable_size("sliding_window", 4096)
    used = reader.take("use_sliding_window", False)
    reader.ignore("max_window_layers")
    reader.ignore_at(qkv_bias=False, shared_expert_intermediate_size=0, use_qk_norm=True)
    return ModelConfig(
        **shared,
        rope=read_rope(reader, shared["max_position"]),
        windows=(window if used else None,),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        experts=read_experts(reader),
        routed=read_routed(reader, shared["num_layers"]),
    )


def read_experts(reader: ConfigReader) -> Experts:
    """`num_local_experts` is what transformers 5 writes, and wins."""
    count = reader.size("num_experts", 128)
    return Experts(
        count=reader.size("num_local_experts", count),
        top_k=reader.size("num_experts_per_tok", 8),
        size=reader.size("moe_intermediate_size"),
        normalised=reader.take("norm_topk_prob", False),
    )


def read_routed(reader: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """Which layers have experts: every `decoder_sparse_step`-th, but for those of `mlp_only_layers`."""
    step = reader.size("decoder_sparse_step", 1)
    dense = reader.optional("mlp_only_layers", list) or []
    return repeated([i not in dense and (i + 1) % step == 0 for i in range(num_layers)])

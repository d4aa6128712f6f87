"""Mixtral: Mistral with eight experts in every layer, `MixtralForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.hf_common import read_decoder
from checkpoints.families.rope import read_rope
from checkpoints.names import Rule
from jaxllm.config import Experts, ModelConfig

_MOE = tables.LAYER + "block_sparse_moe."

RULES = tables.table(
    *tables.NORMS_BEFORE,
    *tables.ATTENTION,
    Rule.of(_MOE + "gate.weight", "e d -> d e", "blocks.{i}.experts.router.weight"),
    Rule.of(_MOE + "experts.{e}.w1.weight", "m d -> e d m", "blocks.{i}.experts.gate.weight"),
    Rule.of(_MOE + "experts.{e}.w3.weight", "m d -> e d m", "blocks.{i}.experts.up.weight"),
    Rule.of(_MOE + "experts.{e}.w2.weight", "d m -> e m d", "blocks.{i}.experts.down.weight"),
)


def read_config(reader: ConfigReader) -> ModelConfig:
    """`intermediate_size` is an expert's. The router's choice is always made to sum to one."""
    shared = read_decoder(reader, positions=131072, kv_heads=8, eps=1e-5, bos=1, eos=2)
    reader.ignore("router_jitter_noise")  # of training
    count = reader.size("num_local_experts", reader.size("num_experts", 8))
    window = reader.nullable_size("sliding_window")
    return ModelConfig(
        **shared,
        rope=read_rope(reader, shared["max_position"], 1e6),
        windows=(window,),
        experts=Experts(count, reader.size("num_experts_per_tok", 2), shared["intermediate_size"]),
    )

"""StarCoder2: norms with biases, an ffn without a gate, a sliding window; `Starcoder2ForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.hf_common import read_decoder
from checkpoints.families.rope import read_rope
from checkpoints.names import Rule
from jaxllm.config import ModelConfig

RULES = tables.table(
    *tables.NORMS_BEFORE,
    Rule.of(tables.LAYER + "input_layernorm.bias", "d -> d", "blocks.{i}.attention_norm.bias"),
    Rule.of(tables.LAYER + "post_attention_layernorm.bias", "d -> d", "blocks.{i}.mlp_norm.bias"),
    *tables.ATTENTION,
    Rule.of(tables.LAYER + "mlp.c_fc.weight", "f d -> d f", "blocks.{i}.mlp.up.weight"),
    Rule.of(tables.LAYER + "mlp.c_fc.bias", "f -> f", "blocks.{i}.mlp.up.bias"),
    Rule.of(tables.LAYER + "mlp.c_proj.weight", "d f -> f d", "blocks.{i}.mlp.down.weight"),
    Rule.of(tables.LAYER + "mlp.c_proj.bias", "d -> d", "blocks.{i}.mlp.down.bias"),
    Rule.of("model.norm.bias", "d -> d", "norm.bias"),
)


def read_config(reader: ConfigReader) -> ModelConfig:
    shared = read_decoder(
        reader, positions=4096, kv_heads=2, activation="gelu_pytorch_tanh", eps_key="norm_epsilon", eps=1e-5, tied=True,
        bos=50256, eos=50256,
    )  # fmt: skip
    reader.ignore_at(mlp_type="default", norm_type="layer_norm")
    bias, window = reader.take("use_bias", True), reader.nullable_size("sliding_window")
    return ModelConfig(
        **shared,
        rope=read_rope(reader, shared["max_position"]),
        windows=(window,),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        norm="layer",
        gated_mlp=False,
    )

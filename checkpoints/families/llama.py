"""LLaMA as published on the Hugging Face hub: `LlamaForCausalLM`, model_type `llama`."""

from __future__ import annotations

from typing import Any

from checkpoints.config_reader import ConfigReader
from checkpoints.families.hf_common import ACTIVATIONS, read_activation, read_common, read_dtype, token_ids
from checkpoints.families.rope import read_rope, write_rope
from checkpoints.names import Rule, Rules
from jaxllm.config import ModelConfig

_LAYER = "model.layers.{i}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."

RULES = Rules(
    table=(
        Rule.of("model.embed_tokens.weight", "v d -> v d", "embedding"),
        Rule.of(_LAYER + "input_layernorm.weight", "d -> d", "blocks.{i}.attention_norm.scale"),
        Rule.of(_ATTENTION + "q_proj.weight", "(n h) d -> d (n h)", "blocks.{i}.attention.query"),
        Rule.of(_ATTENTION + "k_proj.weight", "(k h) d -> d (k h)", "blocks.{i}.attention.key"),
        Rule.of(_ATTENTION + "v_proj.weight", "(k h) d -> d (k h)", "blocks.{i}.attention.value"),
        Rule.of(_ATTENTION + "o_proj.weight", "d (n h) -> (n h) d", "blocks.{i}.attention.out"),
        Rule.of(_ATTENTION + "q_proj.bias", "(n h) -> (n h)", "blocks.{i}.attention.query_bias"),
        Rule.of(_ATTENTION + "k_proj.bias", "(k h) -> (k h)", "blocks.{i}.attention.key_bias"),
        Rule.of(_ATTENTION + "v_proj.bias", "(k h) -> (k h)", "blocks.{i}.attention.value_bias"),
        Rule.of(_ATTENTION + "o_proj.bias", "d -> d", "blocks.{i}.attention.out_bias"),
        Rule.of(_LAYER + "post_attention_layernorm.weight", "d -> d", "blocks.{i}.mlp_norm.scale"),
        Rule.of(_MLP + "gate_proj.weight", "f d -> d f", "blocks.{i}.mlp.gate"),
        Rule.of(_MLP + "up_proj.weight", "f d -> d f", "blocks.{i}.mlp.up"),
        Rule.of(_MLP + "down_proj.weight", "d f -> f d", "blocks.{i}.mlp.down"),
        Rule.of(_MLP + "gate_proj.bias", "f -> f", "blocks.{i}.mlp.gate_bias"),
        Rule.of(_MLP + "up_proj.bias", "f -> f", "blocks.{i}.mlp.up_bias"),
        Rule.of(_MLP + "down_proj.bias", "d -> d", "blocks.{i}.mlp.down_bias"),
        Rule.of("model.norm.weight", "d -> d", "norm.scale"),
        Rule.of("lm_head.weight", "v d -> v d", "head"),
    ),
    # Buffers that old versions of transformers saved; they follow from the config.
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)


def read_config(values: dict[str, Any], where: str) -> ModelConfig:
    """config.json -> ModelConfig. Raises CheckpointError naming a key.

    Absent keys have transformers' defaults, but for the sizes that it always writes: without them a plan would be of LLaMA-7B.
    """
    reader = ConfigReader(values, where)
    read_common(reader)
    reader.default("is_llama_config", True)
    reader.default("rope_interleaved", False)
    reader.ignore("pretraining_tp")  # splits the products of training differently; the sums are the same
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    max_position = reader.size("max_position_embeddings", 2048)
    config = ModelConfig(
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.size("intermediate_size"),
        num_layers=reader.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=reader.size("num_key_value_heads", heads),
        head_dim=reader.size("head_dim", hidden // heads),
        max_position=max_position,
        norm_eps=reader.take("rms_norm_eps", 1e-6),
        activation=read_activation(reader, "hidden_act", "silu"),
        rope=read_rope(reader, max_position),
        tied_head=reader.take("tie_word_embeddings", False),
        attention_bias=reader.take("attention_bias", False),
        mlp_bias=reader.take("mlp_bias", False),
        dtype=read_dtype(reader),
        bos_token_id=_first(token_ids(values.get("bos_token_id", 1), where, "bos_token_id")),
        eos_token_ids=token_ids(values.get("eos_token_id", 2), where, "eos_token_id"),
    )
    reader.ignore("bos_token_id", "eos_token_id")
    reader.finish()
    return config


def write_config(config: ModelConfig) -> dict[str, Any]:
    """What `read_config` reads the same architecture from, in transformers' own keys."""
    eos = list(config.eos_token_ids)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": next(name for name, known in ACTIVATIONS.items() if known == config.activation),
        "rope_parameters": write_rope(config.rope),
        "tie_word_embeddings": config.tied_head,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "dtype": config.dtype,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None

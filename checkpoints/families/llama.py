"""LLaMA, Llama 2 to 3.3, SmolLM2 and others of its shape: `LlamaForCausalLM`."""

from __future__ import annotations

from typing import Any

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.hf_common import ACTIVATIONS, read_decoder
from checkpoints.families.rope import read_rope, write_rope
from jaxllm.config import ModelConfig

RULES = tables.table(*tables.NORMS_BEFORE, *tables.ATTENTION, *tables.MLP)


def read_config(reader: ConfigReader) -> ModelConfig:
    """Absent keys have transformers' defaults, but for sizes."""
    shared = read_decoder(reader, positions=2048, bos=1, eos=2)
    reader.ignore_at(is_llama_config=True, rope_interleaved=False)
    bias = reader.take("attention_bias", False)
    return ModelConfig(
        **shared,
        rope=read_rope(reader, shared["max_position"]),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=reader.take("mlp_bias", False),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config from which `read_config` reads the same architecture, in transformers' own keys."""
    assert config.rope is not None
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
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "dtype": config.dtype,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }

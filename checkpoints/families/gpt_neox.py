"""GPT-NeoX and Pythia: both halves of a block read the same state, part of each head is turned; `GPTNeoXForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.hf_common import decoder_keys, read_activation
from checkpoints.families.rope import read_rope
from checkpoints.names import Rule, Rules
from checkpoints.pattern import TensorSlice
from jaxllm.config import ModelConfig

_LAYER = "gpt_neox.layers.{i}."
_QKV = _LAYER + "attention.query_key_value."

RULES = Rules(
    table=(
        Rule.of("gpt_neox.embed_in.weight", "v w -> v w", "embedding.weight"),
        Rule.of(_LAYER + "input_layernorm.weight", "d -> d", "blocks.{i}.attention_norm.scale"),
        Rule.of(_LAYER + "input_layernorm.bias", "d -> d", "blocks.{i}.attention_norm.bias"),
        # Query, key and value of one head, then those of the next.
        Rule.of(_QKV + "weight", "(n t h) d -> d (n h)", "blocks.{i}.attention.query.weight", TensorSlice("t", 0)),
        Rule.of(_QKV + "weight", "(n t h) d -> d (n h)", "blocks.{i}.attention.key.weight", TensorSlice("t", 1)),
        Rule.of(_QKV + "weight", "(n t h) d -> d (n h)", "blocks.{i}.attention.value.weight", TensorSlice("t", 2)),
        Rule.of(_QKV + "bias", "(n t h) -> (n h)", "blocks.{i}.attention.query.bias", TensorSlice("t", 0)),
        Rule.of(_QKV + "bias", "(n t h) -> (n h)", "blocks.{i}.attention.key.bias", TensorSlice("t", 1)),
        Rule.of(_QKV + "bias", "(n t h) -> (n h)", "blocks.{i}.attention.value.bias", TensorSlice("t", 2)),
        Rule.of(_LAYER + "attention.dense.weight", "d (n h) -> (n h) d", "blocks.{i}.attention.out.weight"),
        Rule.of(_LAYER + "attention.dense.bias", "d -> d", "blocks.{i}.attention.out.bias"),
        Rule.of(_LAYER + "post_attention_layernorm.weight", "d -> d", "blocks.{i}.mlp_norm.scale"),
        Rule.of(_LAYER + "post_attention_layernorm.bias", "d -> d", "blocks.{i}.mlp_norm.bias"),
        Rule.of(_LAYER + "mlp.dense_h_to_4h.weight", "f d -> d f", "blocks.{i}.mlp.up.weight"),
        Rule.of(_LAYER + "mlp.dense_h_to_4h.bias", "f -> f", "blocks.{i}.mlp.up.bias"),
        Rule.of(_LAYER + "mlp.dense_4h_to_h.weight", "d f -> f d", "blocks.{i}.mlp.down.weight"),
        Rule.of(_LAYER + "mlp.dense_4h_to_h.bias", "d -> d", "blocks.{i}.mlp.down.bias"),
        Rule.of("gpt_neox.final_layer_norm.weight", "d -> d", "norm.scale"),
        Rule.of("gpt_neox.final_layer_norm.bias", "d -> d", "norm.bias"),
        Rule.of("embed_out.weight", "v w -> v w", "head.weight"),
        tables.CLASSIFIER,
    ),
    # The causal mask and the rotary frequencies, in old files.
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    renamed=((r"lm_head\.weight", r"embed_out.weight"), (r"(embed_in|layers|final_layer_norm)\.(.*)", r"gpt_neox.\1.\2")),
)


def read_config(reader: ConfigReader) -> ModelConfig:
    shared = decoder_keys(reader, bos=0, eos=2)
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    positions = reader.size("max_position_embeddings", 2048)
    bias = reader.take("attention_bias", True)
    theta, fraction = reader.take("rotary_emb_base", 1e4), reader.take("rotary_pct", 0.25)
    # Written by some, and read by none where they stand.
    reader.ignore("rope_theta", "partial_rotary_factor", "attention_probs_dropout_prob", "hidden_dropout_prob")
    reader.default("head_dim", hidden // heads, None)  # asked for by the rope, and by nothing else
    return ModelConfig(
        **shared,
        hidden_size=hidden,
        intermediate_size=reader.size("intermediate_size"),
        num_layers=reader.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position=positions,
        norm_eps=reader.take("layer_norm_eps", 1e-5),
        activation=read_activation(reader, "hidden_act", "gelu"),
        rope=read_rope(reader, positions, theta, fraction),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        norm="layer",
        parallel=reader.take("use_parallel_residual", True),
        gated_mlp=False,
    )

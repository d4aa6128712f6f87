"""OPT, all sizes: learned positions, layer norms; the one of 350M norms sums and projects its embeddings; `OPTForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.hf_common import decoder_keys, read_activation
from checkpoints.names import Rule, Rules
from jaxllm.config import ModelConfig

_DECODER = "model.decoder."
_LAYER = _DECODER + "layers.{i}."
_ATTENTION = _LAYER + "self_attn."

RULES = Rules(
    table=(
        Rule.of(_DECODER + "embed_tokens.weight", "v w -> v w", "embedding.weight"),
        Rule.of(_DECODER + "embed_positions.weight", "l d -> l d", "positions"),
        Rule.of(_DECODER + "project_in.weight", "d w -> w d", "project_in.weight"),
        # Of the model of 350M these norms are of the sums, and none is before.
        Rule.of(_LAYER + "self_attn_layer_norm.weight", "d -> d", "blocks.{i}.attention_norm.scale"),
        Rule.of(_LAYER + "self_attn_layer_norm.bias", "d -> d", "blocks.{i}.attention_norm.bias"),
        Rule.of(_ATTENTION + "q_proj.weight", "(n h) d -> d (n h)", "blocks.{i}.attention.query.weight"),
        Rule.of(_ATTENTION + "k_proj.weight", "(n h) d -> d (n h)", "blocks.{i}.attention.key.weight"),
        Rule.of(_ATTENTION + "v_proj.weight", "(n h) d -> d (n h)", "blocks.{i}.attention.value.weight"),
        Rule.of(_ATTENTION + "out_proj.weight", "d (n h) -> (n h) d", "blocks.{i}.attention.out.weight"),
        Rule.of(_ATTENTION + "q_proj.bias", "(n h) -> (n h)", "blocks.{i}.attention.query.bias"),
        Rule.of(_ATTENTION + "k_proj.bias", "(n h) -> (n h)", "blocks.{i}.attention.key.bias"),
        Rule.of(_ATTENTION + "v_proj.bias", "(n h) -> (n h)", "blocks.{i}.attention.value.bias"),
        Rule.of(_ATTENTION + "out_proj.bias", "d -> d", "blocks.{i}.attention.out.bias"),
        Rule.of(_LAYER + "final_layer_norm.weight", "d -> d", "blocks.{i}.mlp_norm.scale"),
        Rule.of(_LAYER + "final_layer_norm.bias", "d -> d", "blocks.{i}.mlp_norm.bias"),
        Rule.of(_LAYER + "fc1.weight", "f d -> d f", "blocks.{i}.mlp.up.weight"),
        Rule.of(_LAYER + "fc1.bias", "f -> f", "blocks.{i}.mlp.up.bias"),
        Rule.of(_LAYER + "fc2.weight", "d f -> f d", "blocks.{i}.mlp.down.weight"),
        Rule.of(_LAYER + "fc2.bias", "d -> d", "blocks.{i}.mlp.down.bias"),
        Rule.of(_DECODER + "final_layer_norm.weight", "d -> d", "norm.scale"),
        Rule.of(_DECODER + "final_layer_norm.bias", "d -> d", "norm.bias"),
        Rule.of(_DECODER + "project_out.weight", "w d -> d w", "project_out.weight"),
        Rule.of("lm_head.weight", "v w -> v w", "head.weight"),
        tables.CLASSIFIER,
    ),
    renamed=((r"decoder\.(.*)", r"model.decoder.\1"),),
)
_OFFSET = 2  # the table's first rows are of no position


def read_config(reader: ConfigReader) -> ModelConfig:
    shared = decoder_keys(reader, tied=True, bos=2, eos=2)
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    positions = reader.size("max_position_embeddings", 2048)
    before = reader.take("do_layer_norm_before", True)
    removed = reader.take("_remove_final_layer_norm", False)
    bias = reader.take("enable_bias", True)
    embed = reader.size("word_embed_proj_dim", hidden)
    reader.ignore("activation_dropout", "output_projection")
    return ModelConfig(
        **shared,
        hidden_size=hidden,
        intermediate_size=reader.size("ffn_dim"),
        num_layers=reader.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position=positions,
        norm_eps=1e-5,
        activation=read_activation(reader, "activation_function", "relu"),
        rope=None,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        norm="layer",
        norm_affine=reader.take("layer_norm_elementwise_affine", True),
        norm_place="before" if before else "sum",
        final_norm=before and not removed,
        gated_mlp=False,
        learned_positions=positions + _OFFSET,
        position_offset=_OFFSET,
        embed_size=0 if embed == hidden else embed,
    )

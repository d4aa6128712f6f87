"""GPT-2: learned positions, queries, keys and values in one matrix that is stored [in, out]; `GPT2LMHeadModel`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.hf_common import decoder_keys, read_activation
from checkpoints.names import Rule, Rules
from checkpoints.pattern import TensorSlice
from jaxllm.config import ModelConfig

_LAYER = "transformer.h.{i}."
_QKV = _LAYER + "attn.c_attn."

RULES = Rules(
    table=(
        Rule.of("transformer.wte.weight", "v w -> v w", "embedding.weight"),
        Rule.of("transformer.wpe.weight", "l d -> l d", "positions"),
        Rule.of(_LAYER + "ln_1.weight", "d -> d", "blocks.{i}.attention_norm.scale"),
        Rule.of(_LAYER + "ln_1.bias", "d -> d", "blocks.{i}.attention_norm.bias"),
        Rule.of(_QKV + "weight", "d (t n h) -> d (n h)", "blocks.{i}.attention.query.weight", TensorSlice("t", 0)),
        Rule.of(_QKV + "weight", "d (t n h) -> d (n h)", "blocks.{i}.attention.key.weight", TensorSlice("t", 1)),
        Rule.of(_QKV + "weight", "d (t n h) -> d (n h)", "blocks.{i}.attention.value.weight", TensorSlice("t", 2)),
        Rule.of(_QKV + "bias", "(t n h) -> (n h)", "blocks.{i}.attention.query.bias", TensorSlice("t", 0)),
        Rule.of(_QKV + "bias", "(t n h) -> (n h)", "blocks.{i}.attention.key.bias", TensorSlice("t", 1)),
        Rule.of(_QKV + "bias", "(t n h) -> (n h)", "blocks.{i}.attention.value.bias", TensorSlice("t", 2)),
        Rule.of(_LAYER + "attn.c_proj.weight", "(n h) d -> (n h) d", "blocks.{i}.attention.out.weight"),
        Rule.of(_LAYER + "attn.c_proj.bias", "d -> d", "blocks.{i}.attention.out.bias"),
        Rule.of(_LAYER + "ln_2.weight", "d -> d", "blocks.{i}.mlp_norm.scale"),
        Rule.of(_LAYER + "ln_2.bias", "d -> d", "blocks.{i}.mlp_norm.bias"),
        Rule.of(_LAYER + "mlp.c_fc.weight", "d f -> d f", "blocks.{i}.mlp.up.weight"),
        Rule.of(_LAYER + "mlp.c_fc.bias", "f -> f", "blocks.{i}.mlp.up.bias"),
        Rule.of(_LAYER + "mlp.c_proj.weight", "f d -> f d", "blocks.{i}.mlp.down.weight"),
        Rule.of(_LAYER + "mlp.c_proj.bias", "d -> d", "blocks.{i}.mlp.down.bias"),
        Rule.of("transformer.ln_f.weight", "d -> d", "norm.scale"),
        Rule.of("transformer.ln_f.bias", "d -> d", "norm.bias"),
        Rule.of("lm_head.weight", "v w -> v w", "head.weight"),
        tables.CLASSIFIER,
    ),
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),  # the causal mask, in old files
    renamed=((r"(wte|wpe|h|ln_f)\.(.*)", r"transformer.\1.\2"),),
)


def read_config(reader: ConfigReader) -> ModelConfig:
    """Keys have GPT-2's own names, or those of other families, which win."""

    def size(own: str, other: str, default: int | None = None) -> int:
        given = reader.size(own, default) if default or reader.has(own) or not reader.has(other) else None
        return reader.size(other, given)

    shared = decoder_keys(reader, tied=True, bos=50256, eos=50256)
    hidden, heads = size("n_embd", "hidden_size"), size("n_head", "num_attention_heads")
    positions = size("n_positions", "max_position_embeddings", 1024)
    scaled = reader.take("scale_attn_weights", True)
    reader.ignore("n_ctx", "n_special", "predict_special_tokens")
    reader.ignore_prefix("summary_")
    return ModelConfig(
        **shared,
        hidden_size=hidden,
        intermediate_size=reader.size("n_inner", 4 * hidden),
        num_layers=size("n_layer", "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position=positions,
        norm_eps=reader.take("layer_norm_epsilon", 1e-5),
        activation=read_activation(reader, "activation_function", "gelu_new"),
        rope=None,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        norm="layer",
        gated_mlp=False,
        learned_positions=positions,
        attention_scale=None if scaled else 1.0,
        scale_by_depth=reader.take("scale_attn_by_inverse_layer_idx", False),
    )

"""Rules that many families share, for each to put its table together."""

from __future__ import annotations

from checkpoints.names import Rule, Rules

LAYER = "model.layers.{i}."
_ATTENTION = LAYER + "self_attn."
_MLP = LAYER + "mlp."

EMBEDDING = Rule.of("model.embed_tokens.weight", "v w -> v w", "embedding.weight")
FINAL_NORM = Rule.of("model.norm.weight", "d -> d", "norm.scale")
CLASSIFIER = Rule.of("score.weight", "y w -> w y", "classifier.weight")
HEAD = Rule.of("lm_head.weight", "v w -> v w", "head.weight")
NORMS_BEFORE = (
    Rule.of(LAYER + "input_layernorm.weight", "d -> d", "blocks.{i}.attention_norm.scale"),
    Rule.of(LAYER + "post_attention_layernorm.weight", "d -> d", "blocks.{i}.mlp_norm.scale"),
)
NORMS_AROUND = (
    Rule.of(LAYER + "input_layernorm.weight", "d -> d", "blocks.{i}.attention_norm.scale"),
    Rule.of(LAYER + "post_attention_layernorm.weight", "d -> d", "blocks.{i}.attention_post_norm.scale"),
    Rule.of(LAYER + "pre_feedforward_layernorm.weight", "d -> d", "blocks.{i}.mlp_norm.scale"),
    Rule.of(LAYER + "post_feedforward_layernorm.weight", "d -> d", "blocks.{i}.mlp_post_norm.scale"),
)
OUT = Rule.of(_ATTENTION + "o_proj.weight", "d (n h) -> (n h) d", "blocks.{i}.attention.out.weight")
ATTENTION = (
    Rule.of(_ATTENTION + "q_proj.weight", "(n h) d -> d (n h)", "blocks.{i}.attention.query.weight"),
    Rule.of(_ATTENTION + "k_proj.weight", "(k h) d -> d (k h)", "blocks.{i}.attention.key.weight"),
    Rule.of(_ATTENTION + "v_proj.weight", "(k h) d -> d (k h)", "blocks.{i}.attention.value.weight"),
    OUT,
    Rule.of(_ATTENTION + "q_proj.bias", "(n h) -> (n h)", "blocks.{i}.attention.query.bias"),
    Rule.of(_ATTENTION + "k_proj.bias", "(k h) -> (k h)", "blocks.{i}.attention.key.bias"),
    Rule.of(_ATTENTION + "v_proj.bias", "(k h) -> (k h)", "blocks.{i}.attention.value.bias"),
    Rule.of(_ATTENTION + "o_proj.bias", "d -> d", "blocks.{i}.attention.out.bias"),
)
HEAD_NORMS = (
    Rule.of(_ATTENTION + "q_norm.weight", "h -> h", "blocks.{i}.attention.query_norm.scale"),
    Rule.of(_ATTENTION + "k_norm.weight", "h -> h", "blocks.{i}.attention.key_norm.scale"),
)
MLP = (
    Rule.of(_MLP + "gate_proj.weight", "f d -> d f", "blocks.{i}.mlp.gate.weight"),
    Rule.of(_MLP + "up_proj.weight", "f d -> d f", "blocks.{i}.mlp.up.weight"),
    Rule.of(_MLP + "down_proj.weight", "d f -> f d", "blocks.{i}.mlp.down.weight"),
    Rule.of(_MLP + "gate_proj.bias", "f -> f", "blocks.{i}.mlp.gate.bias"),
    Rule.of(_MLP + "up_proj.bias", "f -> f", "blocks.{i}.mlp.up.bias"),
    Rule.of(_MLP + "down_proj.bias", "d -> d", "blocks.{i}.mlp.down.bias"),
)
# Of experts, each stored on its own.
EXPERTS = (
    Rule.of(_MLP + "gate.weight", "e d -> d e", "blocks.{i}.experts.router.weight"),
    Rule.of(_MLP + "experts.{e}.gate_proj.weight", "m d -> e d m", "blocks.{i}.experts.gate.weight"),
    Rule.of(_MLP + "experts.{e}.up_proj.weight", "m d -> e d m", "blocks.{i}.experts.up.weight"),
    Rule.of(_MLP + "experts.{e}.down_proj.weight", "d m -> e m d", "blocks.{i}.experts.down.weight"),
)
SHARED_EXPERT = (
    Rule.of(_MLP + "shared_expert.gate_proj.weight", "s d -> d s", "blocks.{i}.experts.shared.gate.weight"),
    Rule.of(_MLP + "shared_expert.up_proj.weight", "s d -> d s", "blocks.{i}.experts.shared.up.weight"),
    Rule.of(_MLP + "shared_expert.down_proj.weight", "d s -> s d", "blocks.{i}.experts.shared.down.weight"),
    Rule.of(_MLP + "shared_expert_gate.weight", "o d -> d o", "blocks.{i}.experts.shared_gate.weight"),
)
# Buffers that old versions of transformers saved; they follow from the config.
ROPE_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
# A checkpoint of the model without its head has no such prefix.
WITHOUT_PREFIX = ((r"(embed_tokens|layers|norm)\.(.*)", r"model.\1.\2"),)


def table(*layer: Rule) -> Rules:
    """Rules of a decoder with these rules for each layer, named as LLaMA's is."""
    return Rules((EMBEDDING, *layer, FINAL_NORM, HEAD, CLASSIFIER), ROPE_BUFFERS, WITHOUT_PREFIX)

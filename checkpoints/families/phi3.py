"""Phi-3, Phi-3.5 and Phi-4: queries, keys and values in one matrix, gate and up in another, longrope; `Phi3ForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.errors import CheckpointError
from checkpoints.families import tables
from checkpoints.families.hf_common import read_decoder
from checkpoints.families.rope import read_rope
from checkpoints.names import Rule
from checkpoints.pattern import TensorSlice
from jaxllm.config import ModelConfig, RopeConfig

_QKV = tables.LAYER + "self_attn.qkv_proj.weight"
_GATE_UP = tables.LAYER + "mlp.gate_up_proj.weight"

RULES = tables.table(
    *tables.NORMS_BEFORE,
    Rule.of(_QKV, "(a h) d -> d (n h)", "blocks.{i}.attention.query.weight", TensorSlice("a", (), "n")),
    Rule.of(_QKV, "(a h) d -> d (k h)", "blocks.{i}.attention.key.weight", TensorSlice("a", ("n",), "k")),
    Rule.of(_QKV, "(a h) d -> d (k h)", "blocks.{i}.attention.value.weight", TensorSlice("a", ("n", "k"), "k")),
    tables.OUT,
    Rule.of(_GATE_UP, "(u f) d -> d f", "blocks.{i}.mlp.gate.weight", TensorSlice("u", 0)),
    Rule.of(_GATE_UP, "(u f) d -> d f", "blocks.{i}.mlp.up.weight", TensorSlice("u", 1)),
    Rule.of(tables.LAYER + "mlp.down_proj.weight", "d f -> f d", "blocks.{i}.mlp.down.weight"),
)


def read_config(reader: ConfigReader) -> ModelConfig:
    shared = read_decoder(reader, positions=4096, eps=1e-5, bos=1, eos=32000)
    reader.ignore("attention_bias", "lm_head_bias", "mlp_bias")  # written by some, read by none
    reader.ignore_at(full_attn_mod=1, interpolate_factor=1)
    window = reader.nullable_size("sliding_window")
    rope = _read_rope(reader, shared["max_position"])
    return ModelConfig(**shared, rope=rope, windows=(window,))


def _read_rope(reader: ConfigReader, max_position: int) -> RopeConfig:
    """`su` and `yarn` are older names of longrope here. The context it was trained for stands beside its parameters."""
    beside = {
        "rope_theta": reader.take("rope_theta", 1e4),
        "original_max_position_embeddings": reader.size("original_max_position_embeddings", 4096),
    }
    fraction = reader.nullable("partial_rotary_factor", 1.0) or 1.0
    new = reader.optional("rope_parameters", dict)
    rope = dict(reader.optional("rope_scaling", dict) or new or {})
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    if kind not in ("default", "longrope", "su", "yarn"):
        raise CheckpointError(f"{reader.where}: rope type {kind!r} is not supported; there are default, longrope")
    for key in ("type", "short_mscale", "long_mscale"):  # written by some, read by none
        rope.pop(key, None)
    if kind == "default":
        for values in (rope, beside):
            values.pop("original_max_position_embeddings", None)
    rope["rope_type"] = "default" if kind == "default" else "longrope"
    return read_rope(reader.part(beside | {"rope_parameters": rope}), max_position, fraction=fraction)

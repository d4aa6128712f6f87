"""Gemma 2: Gemma with norms around each half, soft caps, and a window in every other layer, `Gemma2ForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.gemma import read_shared
from checkpoints.families.hf_common import read_windows
from checkpoints.families.rope import read_rope
from jaxllm.config import ModelConfig

RULES = tables.table(*tables.NORMS_AROUND, *tables.ATTENTION, *tables.MLP)


def read_config(reader: ConfigReader) -> ModelConfig:
    """Without their keys the caps are 50 and 30; null is none."""
    reader.ignore("hidden_act", "sliding_window_size")  # written by some, read by none
    shared = read_shared(reader, 8192, 4, "hidden_activation")
    window = reader.size_if_there("sliding_window", 4096)
    return ModelConfig(
        **shared,
        rope=read_rope(reader, shared["max_position"]),
        norm_place="around",
        windows=read_windows(reader, shared["num_layers"], window, lambda i: i % 2 == 0),
        attention_scale=reader.above_zero("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_cap=reader.nullable("attn_logit_softcapping", 50.0) or 0.0,
        logit_cap=reader.nullable("final_logit_softcapping", 30.0) or 0.0,
    )

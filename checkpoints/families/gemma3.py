"""The text models of Gemma 3: two rotary bases, five layers with a window to each without, `Gemma3ForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.gemma import read_shared
from checkpoints.families.hf_common import read_windows
from checkpoints.families.rope import read_ropes
from jaxllm.config import ModelConfig

RULES = tables.table(*tables.NORMS_AROUND, *tables.ATTENTION, *tables.HEAD_NORMS, *tables.MLP)


def read_config(reader: ConfigReader) -> ModelConfig:
    reader.ignore("hidden_act", "attn_logit_softcapping")  # written, and read by none
    shared = read_shared(reader, 131072, 4, "hidden_activation")
    window, pattern = reader.size_if_there("sliding_window", 4096), reader.size_if_there("sliding_window_pattern", 6)
    reader.ignore("_sliding_window_pattern")
    theta, local_theta = reader.take("rope_theta", 1e6), reader.take("rope_local_base_freq", 1e4)
    rope, local = read_ropes(reader, shared["max_position"], theta, local_theta)
    return ModelConfig(
        **shared,
        rope=rope,
        local_rope=local,
        norm_place="around",
        windows=read_windows(reader, shared["num_layers"], window, lambda i: (i + 1) % pattern != 0),
        qk_norm="head",
        attention_scale=reader.above_zero("query_pre_attn_scalar", 256.0) ** -0.5,
        logit_cap=reader.optional("final_logit_softcapping", float) or 0.0,
    )
